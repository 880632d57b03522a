"""The command ``muvit``: one verb for each step from images to a labelled slide."""

import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from muvit import __version__
from muvit.cli.signals import stopped_as_by_ctrl_c
from muvit.errors import MuViTError
from muvit.settings import sentence

VERBS = {
    "demo": "from nothing to trained models, labelled images and a report",
    "convert": "turn images or label masks into OME-Zarr pyramids",
    "info": "show what is in an image: size, levels, channels, pixel size, labels",
    "prepare": "turn a downloaded data set into folders to train and test on",
    "synthetic": "make the Synthetic data set, whose classes show only at a coarse scale",
    "pretrain": "pre-train a masked autoencoder on unlabelled images",
    "train": "train a segmentation model from a recipe",
    "train-classifier": "train a classifier of slides from a recipe",
    "predict": "label whole slides with a trained model",
    "export": "turn predicted labels into polygons for QuPath, area tables and pictures",
    "classify": "tell the class of whole slides with a trained classifier",
    "features": "write the features of every patch of a slide, for other tools to learn from",
    "evaluate": "score predicted labels against true ones",
    "study": "find out what trained models rely on, what they cost and what their features tell",
    "convert-checkpoint": "turn a model folder of an earlier version into the present format",
    "compare": "train a recipe's model and its controls, and report how they differ",
}
"""Verbs and what they do; ``muvit.cli.<verb>`` (with _ for -) has the ``add_arguments`` and ``run`` of each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; unset, those of the process.

    Returns:
        0 when done, 1 when something went wrong on the way, 2 when the arguments do not fit.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # only the verb that is called is imported: `muvit info` need not wait for Lightning
    chosen = arguments[0] if arguments[:1] and arguments[0] in VERBS else ""
    command = f"muvit {chosen}" if chosen else "muvit"
    try:
        settings = _parse(chosen, arguments)
        with stopped_as_by_ctrl_c():
            _module(chosen).run(settings)
    except SystemExit as stop:  # how the parser ends after --help and --version
        return int(stop.code or 0)
    except ArgumentError as error:
        print(f"{command}: {sentence(str(error))} (see {command} --help)", file=sys.stderr)
        return 2
    except MuViTError as error:
        print(f"muvit: {error}", *_notes(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("muvit: interrupted.", *_notes(interrupt), file=sys.stderr)
        return 1
    except Exception as error:
        from muvit.cli.failures import failure

        told = failure(error)
        if told is None:
            raise
        print(f"muvit: {told}", *_notes(error), file=sys.stderr)
        return 1
    return 0


def _notes(error: BaseException) -> list[str]:
    """What was added to an error on its way, such as what is left of the work."""
    return getattr(error, "__notes__", [])


def entrypoint() -> None:
    """What the installed command calls."""
    sys.exit(main())


def _parse(chosen: str, arguments: list[str]) -> Namespace:
    try:
        return _parser(chosen).parse_args(arguments)[chosen]
    except UnicodeDecodeError as error:  # of a recipe
        raise ArgumentError(None, "--config: expected a text file in YAML, got a binary one") from error


def _module(verb: str) -> ModuleType:
    return import_module(f"muvit.cli.{verb.replace('-', '_')}")


def _parser(chosen: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="muvit",
        description="Multi-resolution vision transformers for gigapixel microscopy.",
        version=__version__,
        exit_on_error=False,
    )
    verbs = parser.add_subcommands(required=True, dest="verb", metavar="VERB")
    for verb, summary in VERBS.items():
        verb_parser = ArgumentParser(description=f"{summary[0].upper()}{summary[1:]}.", exit_on_error=False)
        verbs.add_subcommand(verb, verb_parser, help=summary)
        if verb == chosen:  # last: a verb may have verbs of its own
            _module(verb).add_arguments(verb_parser)
    return parser
