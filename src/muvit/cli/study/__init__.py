"""``muvit study``: one sub-verb for each experiment on trained models."""

from importlib import import_module
from types import ModuleType
from typing import Any

from jsonargparse import Namespace

from muvit.cli.parser import Parser

STUDIES = {
    "noise": "mDSC against noise on the boxes, at inference only",
    "scaling": "run time and peak memory against the number of levels and the crop size",
    "probe": "classify images by the frozen features of an encoder",
    "epochs": "a logged score of several runs against the epochs",
    "reconstruction": "errors of masked autoencoders at each level, with true and with naive boxes",
    "groups": "scores of each group of slides, by models trained on one group or another",
}
"""Sub-verbs and their summaries; each is a module here with ``add_arguments`` and ``run``, as the verbs are."""


class _StudyParser(Parser):
    """A parser that checks its own settings: that of all verbs cannot name a setting that a verb of a verb lacks."""

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """Parsed settings, which may still be incomplete."""
        settings = super().parse_args(*args, **options)
        self.validate(settings, skip_required=True)
        return settings


def add_arguments(parser: Parser) -> None:
    """Arguments of the verb."""
    studies = parser.add_subcommands(required=True, dest="study", metavar="STUDY", help="the experiment")
    for name, summary in STUDIES.items():
        study = _StudyParser(description=f"{summary[0].upper()}{summary[1:]}.")
        if parser.given is None or name in parser.given:
            _module(name).add_arguments(study)
        studies.add_subcommand(name, study, help=summary)
        study.prog = f"muvit study {name}"


def run(arguments: Namespace) -> None:
    """Run the chosen study."""
    _module(arguments.study).run(arguments[arguments.study])


def _module(name: str) -> ModuleType:
    return import_module(f"muvit.cli.study.{name.replace('-', '_')}")
