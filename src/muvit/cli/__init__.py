"""The command ``muvit``: one verb for each step from images to a labelled slide."""

import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from jsonargparse import Namespace, set_parsing_settings

from muvit.cli.parser import Parser, recipe_files
from muvit.cli.terminal import sigterm_as_interrupt
from muvit.errors import MuViTError, ReadError
from muvit.plain_yaml import read_text
from muvit.settings import sentence
from muvit.version import __version__

VERBS = {
    "demo": "generate images, train three small models, label test images and write a report",
    "convert": "convert images or label masks to OME-Zarr pyramids",
    "info": "show the size, levels, channels, pixel size and labels of an image",
    "doctor": "check the installation, devices, and images, models or predictions, and say what to do",
    "prepare": "convert a downloaded data set to folders to train and test on",
    "synthetic": "generate the Synthetic data set, whose classes differ only at a coarse scale",
    "samples": "draw training samples of a recipe, before and after augmentation",
    "pretrain": "pre-train a masked autoencoder on unlabelled images",
    "init": "look at slides and labels, and write a recipe for them with the reason for each setting",
    "train": "train a segmentation model from a recipe",
    "train-classifier": "train a classifier of slides from a recipe",
    "predict": "label whole slides with a trained model",
    "view": "show an image and its labels in napari",
    "export": "convert predicted labels to polygons for QuPath, tables of areas and pictures",
    "explain": "show what the label of a point rests on: attention at every level, and what happens without it",
    "suggest": "propose regions of slides to annotate next",
    "classify": "classify whole slides with a trained classifier",
    "features": "write the features of every patch of a slide to a Zarr store",
    "evaluate": "score predicted labels against true ones",
    "study": "experiments on trained models: box noise, cost, features, reconstruction",
    "export-model": "write a trained model for other software: ONNX, or a program of torch.export",
    "push": "upload a trained model to huggingface.co",
    "convert-checkpoint": "convert a model folder of an earlier version to the present format",
    "completion": "print a script that completes verbs and options in the shell",
    "compare": "train a recipe's model and its controls, and report how they differ",
}
"""Verbs and their summaries; ``muvit.cli.<verb>`` (with _ for -) has the ``add_arguments`` and ``run`` of each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; unset, those of the process.

    Returns:
        0 on success, 1 if the work failed, 2 if the arguments do not fit.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # only the verb that is called is imported: `muvit info` needs no torch
    chosen = arguments[0] if arguments[:1] and arguments[0] in VERBS else ""
    command = f"muvit {chosen}" if chosen else "muvit"
    try:
        settings = _parse(chosen, arguments)
        with sigterm_as_interrupt():
            _module(chosen).run(settings)
    except SystemExit as stop:  # raised by the parser after --help and --version
        return int(stop.code or 0)
    except ArgumentError as error:
        said = re.sub(
            rf"(?<![\w.-]){chosen or ' '}\.(?=\w)", "", sentence(str(error))
        )  # settings are named without the verb
        print(f"{command}: {said} (see {command} --help)", file=sys.stderr)
        return 2
    except MuViTError as error:
        print(f"muvit: {error}", *_notes(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("muvit: interrupted.", *_notes(interrupt), file=sys.stderr)
        return 1
    except Exception as error:
        from muvit.cli.terminal import failure

        told = failure(error)
        if told is None:
            raise
        print(f"muvit: {told}", *_notes(error), file=sys.stderr)
        return 1
    return 0


def _notes(error: BaseException) -> list[str]:
    """Notes added to an error, such as how to resume."""
    return getattr(error, "__notes__", [])


def entrypoint() -> None:
    """Entry point of the installed command."""
    sys.exit(main())


def _parse(chosen: str, arguments: list[str]) -> Namespace:
    _check_recipe(arguments)
    return _parser(chosen, arguments[1:]).parse_args(arguments)[chosen]


def _check_recipe(arguments: list[str]) -> None:
    """Refuse a recipe that is no YAML before the verb's packages are imported, which takes seconds."""
    for file in recipe_files(arguments):
        try:
            read_text(file)
        except ReadError as error:
            raise ArgumentError(None, str(error).rstrip(".")) from error


def _module(verb: str) -> ModuleType:
    return import_module(f"muvit.cli.{verb.replace('-', '_')}")


def _parser(chosen: str, given: list[str]) -> Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog="muvit",
        description="Multi-resolution vision transformers for gigapixel microscopy.",
        version=__version__,
    )
    verbs = parser.add_subcommands(required=True, dest="verb", metavar="VERB")
    for verb, summary in VERBS.items():
        verb_parser = Parser(description=f"{summary[0].upper()}{summary[1:]}.")
        verbs.add_subcommand(verb, verb_parser, help=summary)
        verb_parser.prog = f"muvit {verb}"
        if verb == chosen:  # last: a verb may have verbs of its own
            verb_parser.given = given
            _module(verb).add_arguments(verb_parser)
    return parser
