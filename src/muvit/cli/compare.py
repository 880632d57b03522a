"""``muvit compare``."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from muvit.cli.parser import Parser
from muvit.cli.terminal import Progress
from muvit.errors import InputError
from muvit.evaluation.report.tables import conclusion
from muvit.evaluation.variants import CONTROLS, PRESETS, Variant, preset
from muvit.models.folder import plain
from muvit.plain_yaml import read_yaml
from muvit.settings import make_settings, settings_from
from muvit.training.recipes import Recipe

INTRO = "Models trained alike on the same slides, and scored on slides that none of them has seen."


def add_arguments(parser: Parser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "--test", type=Path, required=True, help="folder with images and labels to score the models on, or a table"
    )
    parser.add_argument(
        "--models",
        type=list[str],
        default=list(CONTROLS),
        help=f"what to train on the recipe's data with its budget: any of {', '.join(PRESETS)} "
        "(default: the recipe's model and its controls)",
    )
    parser.add_argument(
        "--variants",
        type=Path | None,
        default=None,
        help="YAML file with models to train as well: settings of the recipe to change, by name of the model",
    )
    parser.add_argument(
        "--seeds",
        type=list[int],
        default=[],
        help="train each model once with each of these seeds, as in [0,1,2,3,4], and report means with intervals; "
        "unset, once with run.seed",
    )
    parser.add_argument(
        "--devices",
        type=str | None,
        default=None,
        help="where to train, one model at a time on each: such as cuda:0,cuda:1, or cpu, whose cores as many models "
        "share; unset, every GPU if there is one",
    )
    parser.add_argument("--title", default="A model and its controls", help="headline of the report")
    parser.add_recipe(Recipe, job="comparison", required="--test FOLDER")


def run(arguments: Namespace) -> None:
    """Train the models, score them, write the report."""
    from muvit.evaluation.comparison import compare

    recipe = settings_from(arguments, Recipe)
    variants = [preset(recipe, name) for name in arguments.models]
    if arguments.variants is not None:
        variants += _variants(arguments.variants, recipe)
    trainings = len(variants) * max(len(arguments.seeds), 1)
    with Progress(f"Training {trainings} models", "step") as progress:
        results = compare(
            variants,
            arguments.test,
            arguments.output,
            title=arguments.title,
            intro=INTRO,
            seeds=arguments.seeds,
            devices=arguments.devices,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    for result in results:
        seeds = f"  seeds {' '.join(f'{score:.3f}' for score in result.by_seed)}" if result.by_seed else ""
        print(f"{result.name:<32} mDSC {result.mean_dice:.3f}{seeds}")
    print(*conclusion(results))
    print(arguments.output / "index.html")


def _variants(file: Path, recipe: Recipe) -> list[Variant]:
    """Models of a file: name to ``description`` and ``settings``, which change those of the recipe."""
    entries = read_yaml(file, "a YAML file of models")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        got = f"{str(entries)[:80]!r}"
        raise InputError(file, expected="name: {description: ..., settings: {...}} for each model", got=got)
    settings = plain(asdict(recipe))
    variants = []
    for name, entry in entries.items():
        unknown = set(entry) - {"description", "settings"}
        if unknown:
            raise InputError(f"{file}, {name}", expected="description and settings", got=sorted(unknown))
        given = entry.get("settings", {})
        if not isinstance(given, dict):
            raise InputError(f"{file}, {name}", expected="settings as name: value", got=repr(given))
        changes = Recipe.upgrade(given)
        base = Recipe.with_kind(settings, Recipe.kind_of(_merged(settings, changes)))
        changed = make_settings(_merged(base, changes), Recipe, subject=f"{file}, {name}")
        variants.append(Variant(name=name, description=entry.get("description", ""), recipe=changed))
    return variants


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``changes``, mapping by mapping."""
    nested = {
        k: _merged(base[k], v) for k, v in changes.items() if isinstance(v, dict) and isinstance(base.get(k), dict)
    }
    return base | changes | nested
