"""``muvit train``."""

import dataclasses
from pathlib import Path
from typing import TypeVar

from jsonargparse import ArgumentParser, Namespace

from muvit.errors import MuViTError
from muvit.training.recipe import PretrainRecipe, Recipe

Kind = TypeVar("Kind", Recipe, PretrainRecipe)


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--config", action="config", help="recipe in YAML; later arguments override it")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    parser.add_argument("--overwrite", action="store_true", help="delete a run that is there already")
    parser.add_class_arguments(Recipe, as_group=False)


def run(arguments: Namespace) -> None:
    """Train, and say where the model is."""
    from muvit.training.run import is_first_process
    from muvit.training.train import train_segmenter

    model = train_segmenter(
        recipe_from(arguments), arguments.output, resume=arguments.resume, overwrite=arguments.overwrite
    )
    if is_first_process():
        print(model)


def recipe_from(arguments: Namespace, kind: type[Kind] = Recipe) -> Kind:  # type: ignore[assignment]
    """The recipe that parsed arguments describe."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "recipe")
    fields = {field.name: arguments[field.name] for field in dataclasses.fields(kind)}
    try:
        return parser.instantiate(Namespace(recipe=Namespace(**fields))).recipe
    except ValueError as error:  # so the parser wraps what an optional group of settings refuses
        if isinstance(error.__cause__, MuViTError):
            raise error.__cause__ from None
        raise
