"""``muvit pretrain``."""

from jsonargparse import Namespace

from muvit.cli.parser import Parser
from muvit.cli.train import train_and_report
from muvit.settings import settings_from
from muvit.training.recipes import PretrainRecipe


def add_arguments(parser: Parser) -> None:
    """Arguments of the verb."""
    parser.add_recipe(PretrainRecipe)


def run(arguments: Namespace) -> None:
    """Pre-train, and print the folder of the model."""
    recipe = settings_from(arguments, PretrainRecipe)  # before Lightning is imported, which takes long

    from muvit.training.fit import pretrain_mae

    train_and_report(pretrain_mae, recipe, arguments)
