"""``muvit train``."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.settings import read_old_files, settings_from
from muvit.training.recipes import Recipe


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    read_old_files(parser, Recipe)
    parser.add_argument("--config", action="config", help="recipe in YAML; later arguments override it")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    parser.add_argument("--overwrite", action="store_true", help="delete a run that is there already")
    parser.add_class_arguments(Recipe, as_group=False)


def run(arguments: Namespace) -> None:
    """Train, and say where the model is."""
    from muvit.training.runs import is_first_process
    from muvit.training.train import train_segmenter

    model = train_segmenter(
        settings_from(arguments, Recipe), arguments.output, resume=arguments.resume, overwrite=arguments.overwrite
    )
    if is_first_process():
        print(model)
