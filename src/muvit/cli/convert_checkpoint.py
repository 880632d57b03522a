"""``muvit convert-checkpoint``."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", type=Path, help="model folder of an earlier version, such as 0.1.0")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is there already")


def run(arguments: Namespace) -> None:
    """Read the old folder, write a new one; its config records the settings that reproduce the model's outputs."""
    from muvit.models.trained import load_network

    load_network(arguments.source).save(arguments.target, overwrite=arguments.overwrite)
    print(arguments.target)
