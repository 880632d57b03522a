"""The parser of every verb: no abbreviations, bounded YAML, help in words, and groups for the settings of a recipe."""

import re
import types
from argparse import SUPPRESS, Action, HelpFormatter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    get_loader,
)
from yaml import YAMLError

from muvit.errors import ReadError
from muvit.plain_yaml import read_text, yaml_problem
from muvit.settings import (
    YAML_MODE,
    dataclasses_of,
    find_misfit,
    parsed_class,
    sentence,
    setting_types,
    suggestion,
    yaml_mode,
)

KIND = "model.kind"
"""The setting on which the other settings of a model depend."""

_WORDS = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "true|false", type(None): "null", dict: "{...}"}
_NO_SETTING = re.compile(r"there is no setting (?P<name>[\w.]+)")
_UNKNOWN = re.compile(r"unrecognized arguments: (?P<first>\S+).*")


class Parser(ArgumentParser):
    """A parser that takes options by their whole names and ends with an `ArgumentError`."""

    recipe: type | None = None
    """The dataclass whose fields are settings of this verb."""
    given: Sequence[str] | None = None
    """Arguments to be parsed, if known: of a verb's own verbs only those that they name need to be imported."""

    renamed: Mapping[str, str] = MappingProxyType({})
    """Earlier names of options, with the present ones, which the error message suggests."""

    def __init__(self, *args: Any, **options: Any) -> None:
        fixed = {"allow_abbrev": False, "parser_mode": YAML_MODE, "formatter_class": PlainHelp, "exit_on_error": False}
        super().__init__(*args, **options | fixed)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an `ArgumentError` with ``message`` as one sentence."""
        unknown = _UNKNOWN.fullmatch(" ".join(message.split()))
        if unknown:
            given = unknown["first"].partition("=")[0]
            options = [option for action in self._actions for option in action.option_strings]
            options += [f"--{name}" for name in self._setting_types()]
            meant = suggestion(self.renamed.get(given, given), options) if given.startswith("-") else ""
            message = f"there is no option {given}" if given.startswith("-") else f"unexpected argument {given}"
            message += f"; {meant}" if meant else ""
        message = sentence(message)
        setting = _NO_SETTING.fullmatch(message)
        if setting:
            meant = suggestion(setting["name"], self._setting_types())
            message += f"; {meant}" if meant else ""
        raise ArgumentError(None, message) from ex

    def add_recipe(self, recipe: type, *, job: str = "run", required: str = "") -> None:
        """Add the options of a verb that follows a recipe: the file, the run's folder, and every setting.

        Args:
            recipe: dataclass of the recipe.
            job: name of what the output folder holds, for the help.
            required: further required options, for the usage line.
        """
        self.recipe, self.parser_mode = self._chosen(recipe)
        self.description = (
            f"{self.description or ''} The recipe is a YAML file. Each of its settings is an option too, which "
            "overrides the recipe: --optim.lr 3e-4 stands for lr in the section optim."
        ).strip()
        if hasattr(recipe, "kinds"):
            self.description += (
                f" The settings of the model are those of its kind, one of {', '.join(recipe.kinds())}: name it with "
                f"--{KIND}, before --help, too."
            )
        self.usage = " ".join(
            ["%(prog)s --config RECIPE --output FOLDER", *filter(None, [required]), "[--section.key VALUE ...]"]
        )
        self.add_argument(
            "--config", action="config", metavar="RECIPE", help="recipe in YAML; later options override it"
        )
        self.add_argument("--output", type=Path, required=True, metavar="FOLDER", help=f"folder of the {job}")
        self.add_argument("--resume", action="store_true", help=f"continue the {job} in the output folder")
        self.add_argument("--overwrite", action="store_true", help=f"delete a {job} that is there already")
        self.add_class_arguments(self.recipe, as_group=False)
        for action in self._actions:
            if "--print_config" in action.option_strings:
                action.help = "print all settings as YAML and exit; =skip_default leaves out those at their defaults"

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """Settings of the command line; the keys of a recipe are checked before its values."""
        given = args[0] if args else options.get("args")
        for file in recipe_files(given or ()) if self.recipe is not None else ():
            self._check_recipe(file)
        return super().parse_args(*args, **options)

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Help text; the settings of a recipe stand in one group per section, named by its path."""
        groups = self._action_groups
        try:
            if self.recipe is not None:
                self._group_settings(self.recipe)
            return super().format_help(formatter)
        finally:
            self._action_groups = groups

    def _chosen(self, recipe: type) -> tuple[type, str]:
        """The recipe for the kind of model that the arguments or the recipe file name, and the mode that reads it."""
        if not hasattr(recipe, "of_kind"):
            return recipe, yaml_mode(recipe)
        given = option_values(self.given or (), f"--{KIND}")
        if given:
            return parsed_class(recipe, {KIND: given[-1]}), yaml_mode(recipe, given[-1])
        values: dict[str, Any] = {}
        for file in recipe_files(self.given or ()):
            with suppress(ReadError, YAMLError):  # told when the file is parsed
                found = get_loader(yaml_mode(recipe))(read_text(file))
                values |= found if isinstance(found, dict) else {}
        return parsed_class(recipe, values), yaml_mode(recipe)

    def _check_recipe(self, file: str) -> None:
        assert self.recipe is not None
        try:
            settings = get_loader(self.parser_mode)(read_text(file))
        except (ReadError, YAMLError) as error:
            self.error(f"{file}: {yaml_problem(error)}")
        own = [a.dest for a in self._actions if a.option_strings and a.dest not in ("config", "help", SUPPRESS)]
        misfit = find_misfit(settings, self.recipe, own) if isinstance(settings, dict) else None
        if misfit is not None:
            self.error(f"{file}: {misfit}")

    def _setting_types(self) -> dict[str, Any]:
        return {} if self.recipe is None else dict(setting_types(self.recipe))

    def _group_settings(self, recipe: type) -> None:
        """Show each section of the recipe as a group, those of optional sections too, which are one option to parse."""
        sections, (options, titles) = {field.name for field in fields(recipe)}, _documentation(recipe)
        own = [a for a in self._actions if not _is_setting(a, sections)]
        self._action_groups = []
        self.add_argument_group("options")._group_actions.extend(own)
        groups: dict[str, Any] = {}
        for name, hint in setting_types(recipe):
            section = name.rpartition(".")[0]
            for one in (section.rpartition(".")[0] or section, section):  # the outer section first
                if one not in groups:
                    text = titles[one].rstrip(".") if one else "Settings beside the sections"
                    groups[one] = self.add_argument_group(one or "recipe", f"{text}.")
            options[name].metavar = type_words(hint)
            groups[section]._group_actions.append(options[name])


class PlainHelp(DefaultHelpFormatter):
    """Help that names no internal types: what an option does, whether it must be given, and its default."""

    def _format_action_invocation(self, action: Action) -> str:
        shown = copy(action)  # without the form that appends to a list, --levels+
        shown.option_strings = [option for option in action.option_strings if not option.endswith("+")]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        if not action.option_strings or "default" in text:
            return text
        if action.required:
            return f"{text} (required)"
        plain = action.default is None or action.default in (SUPPRESS, "", (), []) or action.nargs == 0
        return text if plain else f"{text} (default: {value_words(action.default)})"


def recipe_files(arguments: Sequence[str]) -> list[str]:
    """The values of ``--config FILE`` or ``--config=FILE`` in arguments."""
    return option_values(arguments, "--config")


def option_values(arguments: Sequence[str], name: str) -> list[str]:
    """The values of an option in arguments, ``--name VALUE`` or ``--name=VALUE``."""
    values = [value for option, value in pairwise([*arguments, ""]) if option == name and value]
    return values + [option.partition("=")[2] for option in arguments if option.startswith(f"{name}=")]


def type_words(hint: Any) -> str:
    """A type as users write its values: ``INT``, ``[NUMBER, ...]``, ``zero|edge|reflect``."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(type_words(kind) for kind in inner))
    if origin in (tuple, list):
        words = [type_words(kind) for kind in inner if kind is not Ellipsis]
        return f"[{', '.join(words)}{', ...' if origin is list or Ellipsis in inner else ''}]"
    return _WORDS.get(origin or hint, "VALUE")


def value_words(value: Any) -> str:
    """A value as YAML writes it in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {value_words(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_words, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _documentation(kind: type, section: str = "") -> tuple[dict[str, Action], dict[str, str]]:
    """Options that document the settings of a dataclass, by path, and the titles of its sections."""
    parser = ArgumentParser(parser_mode=YAML_MODE)
    parser.add_class_arguments(kind, section or None, as_group=False)
    options = {action.dest: action for action in parser._actions}
    titles = {name: str(group.title) for name, group in (parser.groups or {}).items()}
    for name, hint in get_type_hints(kind).items():
        path = f"{section}.{name}".lstrip(".")
        for group in dataclasses_of(hint):
            if hint is not group:  # an optional section, which is one option
                titles[path] = options[path].help or ""
            more, further = _documentation(group, path)
            options, titles = options | more, further | titles
    return options, titles


def _is_setting(action: Action, sections: set[str]) -> bool:
    """Whether an option is a setting of a recipe with these sections, or stands for a section as a whole."""
    name = action.option_strings[-1].lstrip("-") if action.option_strings else ""
    return name.partition(".")[0] in sections
