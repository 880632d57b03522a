"""``muvit train``."""

import time
from collections.abc import Callable
from pathlib import Path

from jsonargparse import Namespace

from muvit.cli.parser import Parser
from muvit.settings import settings_from
from muvit.training.recipes import Recipe


def add_arguments(parser: Parser) -> None:
    """Arguments of the verb."""
    parser.add_recipe(Recipe)


def run(arguments: Namespace) -> None:
    """Train, and print the folder of the model; in a cross-validation the scores of all."""
    recipe = settings_from(arguments, Recipe)  # before Lightning is imported, which takes long

    if recipe.run.folds is not None:
        from muvit.evaluation.cross_validation import cross_validate

        folds = cross_validate(recipe, arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
        print(*folds.lines(), arguments.output, sep="\n")
        return

    from muvit.training.fit import train_segmenter

    train_and_report(train_segmenter, recipe, arguments)


def train_and_report(train: Callable[..., Path], recipe: object, arguments: Namespace) -> None:
    """Train by a function of `muvit.training.fit`, write the report of the run, and print the folder of the model."""
    from muvit.evaluation.report.runs import LivePage, write_run_page
    from muvit.training.runs import is_first_process

    start = time.monotonic()
    live = LivePage(arguments.output)
    try:
        model = train(
            recipe, arguments.output, resume=arguments.resume, overwrite=arguments.overwrite, callbacks=[live]
        )
    except BaseException:
        live.close()
        raise
    if is_first_process():
        write_run_page(arguments.output, time.monotonic() - start)
        print(model)
