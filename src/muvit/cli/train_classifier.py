"""``muvit train-classifier``."""

from jsonargparse import Namespace

from muvit.cli.parser import Parser
from muvit.cli.train import train_and_report
from muvit.settings import settings_from
from muvit.training.recipes import ClassifyRecipe


def add_arguments(parser: Parser) -> None:
    """Arguments of the verb."""
    parser.add_recipe(ClassifyRecipe)


def run(arguments: Namespace) -> None:
    """Train, and print the folder of the model."""
    recipe = settings_from(arguments, ClassifyRecipe)  # before Lightning is imported, which takes long

    from muvit.training.fit import train_classifier

    train_and_report(train_classifier, recipe, arguments)
