"""``muvit samples``."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from muvit.cli.parser import Parser
from muvit.errors import ExistsError, InputError
from muvit.settings import read_settings

if TYPE_CHECKING:
    from muvit.training.samples import AnyData


def add_arguments(parser: Parser) -> None:
    """Arguments of the verb."""
    parser.add_argument("recipe", type=Path, help="recipe in YAML")
    parser.add_argument("--output", type=Path, required=True, help="picture to write, .png")
    parser.add_argument("--count", type=int, default=3, help="number of samples, the first of the training")
    parser.add_argument(
        "--task",
        type=Literal["train", "pretrain", "train-classifier"],
        default="train",
        help="verb that the recipe is for",
    )
    parser.add_argument("--size", type=int, default=256, help="side of each view in the picture, in pixels")
    parser.add_argument("--overwrite", action="store_true", help="replace the picture")


def run(arguments: Namespace) -> None:
    """Draw the samples, and print the file."""
    output: Path = arguments.output
    if output.suffix.lower() != ".png":
        raise InputError("output", expected="a file ending in .png", got=output)
    if output.exists() and not arguments.overwrite:
        raise ExistsError(output)
    for name in ("count", "size"):
        if arguments[name] < 1:
            raise InputError(name, expected="a whole number of at least 1", got=arguments[name])

    write_samples(arguments.recipe, output, task=arguments.task, count=arguments.count, size=arguments.size)
    print(output)


def write_samples(recipe: Path, output: Path, *, task: str = "train", count: int = 3, size: int = 256) -> None:
    """Write the picture of a recipe's first samples; arguments as of the verb."""
    from muvit.durable import whole_file
    from muvit.training.samples import draw_samples

    picture = draw_samples(_open(recipe, task), count, size=size)
    with whole_file(output) as stream:
        picture.save(stream, format="png")


def _open(file: Path, task: str) -> "AnyData":
    from muvit.models.trained import build_model
    from muvit.training.datamodules import ClassificationData, PretrainData, SegmentationData
    from muvit.training.recipes import ClassifyRecipe, PretrainRecipe, Recipe
    from muvit.training.slides import complete

    if task == "pretrain":
        return PretrainData(read_settings(file, PretrainRecipe))
    if task == "train-classifier":
        return ClassificationData(read_settings(file, ClassifyRecipe))
    recipe = complete(read_settings(file, Recipe))
    return SegmentationData(recipe, build_model(recipe.model).views)
