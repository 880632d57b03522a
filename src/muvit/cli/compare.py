"""``muvit compare``."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.progress import Progress
from muvit.cli.train import recipe_from
from muvit.evaluation.comparison import compare, with_controls
from muvit.training.recipe import Recipe

INTRO = (
    "One model and two controls, trained alike on the same slides and scored on slides that none of them has seen. "
    "The model sees every level and knows where each view lies. One control sees the finest level only; the other sees "
    "every level without true positions."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--config", action="config", help="recipe in YAML; later arguments override it")
    parser.add_argument("--test", type=Path, required=True, help="folder with images and labels to score the models on")
    parser.add_argument("--output", type=Path, required=True, help="folder of the comparison")
    parser.add_argument("--title", default="A model and its controls", help="headline of the report")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier comparison")
    parser.add_class_arguments(Recipe, as_group=False)


def run(arguments: Namespace) -> None:
    """Train the recipe's model and its two controls, score them, write the report."""
    with Progress("Training three models", "step") as progress:
        results = compare(
            with_controls(recipe_from(arguments)),
            arguments.test,
            arguments.output,
            title=arguments.title,
            intro=INTRO,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    for result in results:
        print(f"{result.name:<24} mDSC {result.mean_dice:.3f}")
    print(arguments.output / "index.html")
