"""Does a model whose coarse tokens never see finer ones score as well as one with full attention?

The pattern ``coarse_to_fine`` is what makes contexts cachable (`benchmarks/context_caching.py`). Here models with it
and with full attention are trained by ``recipes/synthetic_small.yaml`` and score whole test images. Remedies for a
gap, none of which costs anything at prediction:

- ``supervised``: the coarse view is decoded too and compared with its own labels, so that coarse tokens learn what they
  see from all of their view, and not only from what finer ones ask of them. Full attention gets the same.
- ``longer``: twice the epochs, for both.
- ``from_full``: the encoder starts from that of the model with full attention; the weights are the same ones.

    python benchmarks/coarse_to_fine.py
    python benchmarks/coarse_to_fine.py --variants full coarse_to_fine --epochs 26 --seed 1 --output runs/longer
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from markdown_table import markdown_table

from muvit.data.synthetic.images import SyntheticConfig, write_synthetic
from muvit.evaluation.comparison import compare
from muvit.evaluation.variants import Variant
from muvit.settings import read_settings
from muvit.training.recipes import InitConfig, Recipe

NAMES = (
    "full",
    "coarse_to_fine",
    "full_supervised",
    "coarse_to_fine_supervised",
    "full_longer",
    "coarse_to_fine_longer",
    "coarse_to_fine_from_full",
)


def variant(name: str, recipe: Recipe, full: Path) -> Variant:
    """The model of this name; ``full`` is the run of the one with full attention."""
    model, data, run = recipe.model, recipe.data, recipe.run
    if name.startswith("coarse_to_fine"):
        model = replace(model, encoder=replace(model.encoder, attention_mode="coarse_to_fine"))
    if name.endswith("supervised"):
        model, data = replace(model, decode="all"), replace(data, label_levels="all")
    if name.endswith("longer"):
        run = replace(run, epochs=2 * run.epochs)
    init = InitConfig(encoder=str(full)) if name.endswith("from_full") else None
    changed = replace(recipe, model=model, data=data, run=run, init=init)
    return Variant(name=name, description=name.replace("_", " "), recipe=changed)


def run(variants: Sequence[Variant], test: Path, output: Path) -> dict[str, list[str]]:
    """Train and score what is not done yet; the rows of the table, by model."""
    if variants and not (output / "metrics.csv").exists():
        compare(variants, test, output, title="Coarse to fine", intro=str(__doc__).splitlines()[0], resume=True)
    if not (output / "metrics.csv").exists():
        return {}
    with (output / "metrics.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    return {"model": head[1:]} | {row[0]: row[1:] for row in rows}


def main() -> None:
    """Train, score, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--data", type=Path, default=Path("data/synthetic_small"), help="made if it is not there")
    parser.add_argument("--output", type=Path, default=Path("runs/coarse_to_fine"))
    parser.add_argument(
        "--epochs", type=int, default=13, help="of the recipe; the variants that train longer take twice"
    )
    parser.add_argument("--samples", type=int, default=1600, help="crops per epoch")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.data.exists():
        write_synthetic(arguments.data, num_train=240, num_val=12, num_test=16, config=SyntheticConfig.small())
    recipe = read_settings(Path(__file__).parents[1] / "recipes" / "synthetic_small.yaml", Recipe)
    folders = {split: str(arguments.data / split) for split in ("train", "val")}
    recipe = replace(
        recipe,
        run=replace(recipe.run, epochs=arguments.epochs, seed=arguments.seed),
        data=replace(recipe.data, samples_per_epoch=arguments.samples, **folders),
    )
    first, second = arguments.output / "first", arguments.output / "from_full"
    variants = [variant(name, recipe, first / "runs" / "full") for name in arguments.variants]
    test = arguments.data / "test"
    rows = run([v for v in variants if v.recipe.init is None], test, first)
    rows |= run([v for v in variants if v.recipe.init is not None], test, second)
    print(f"{arguments.epochs} epochs of {arguments.samples} crops, seed {arguments.seed}\n")
    head = rows.pop("model")
    print(markdown_table(["model", *head], [[name, *row] for name, row in rows.items()]))


if __name__ == "__main__":
    main()
