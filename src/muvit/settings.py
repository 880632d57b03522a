"""Settings of a YAML file or a command line, made into the dataclasses that hold them; errors in one sentence."""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader, set_loader

from muvit.errors import InputError, MuViTError, ReadError

Settings = TypeVar("Settings")

_UNION = re.compile(
    r"Parser key \"(?P<key>[\w.]+)\": Does not validate against any of the Union subtypes.*?"
    r"Problem with given class_path '[^']+': (?P<inner>.*?) - Expected a <class 'NoneType'>.*"
)
_LITERAL = re.compile(
    r"Parser key \"(?P<key>[\w.]+)\": Expected a typing\.Literal\[(?P<allowed>.*?)\]\. Got value: (?P<got>.*)"
)


def read_settings(file: Path | str, kind: type[Settings]) -> Settings:
    """Read a recipe or other settings, as the command line does.

    Args:
        file: YAML.
        kind: the dataclass, such as `muvit.training.Recipe`.

    Raises:
        ReadError: the file cannot be read, or is not YAML.
        InputError: its settings do not fit ``kind``; names the setting.
    """
    try:
        values = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ReadError(Path(file), expected="settings in YAML", got=str(error).splitlines()[0]) from error
    return make_settings(values, kind, subject=file)


def make_settings(values: Mapping[str, Any], kind: type[Settings], *, subject: Path | str) -> Settings:
    """Settings from plain values.

    Args:
        values: as YAML gives them, mappings in mappings.
        kind: the dataclass.
        subject: what errors name.

    Raises:
        InputError: they do not fit ``kind``; names the setting.
    """
    expected = f"settings of a {kind.__name__}"
    if not isinstance(values, Mapping):
        raise InputError(subject, expected=expected, got=repr(values))
    values = _upgraded(values, kind)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False)
    try:
        return settings_from(parser.parse_object(values), kind)
    except ArgumentError as error:
        raise InputError(subject, expected=expected, got=sentence(str(error))) from error


def read_old_files(parser: ArgumentParser, kind: type) -> None:
    """Let a parser take files with settings of ``kind`` in the spelling of earlier versions, if it has an ``upgrade``.

    Args:
        parser: the parser.
        kind: a dataclass; its ``upgrade`` takes and returns a mapping of settings.
    """
    load = get_loader("yaml")

    def load_upgraded(text: str) -> Any:
        values = load(text)
        return _upgraded(values, kind) if isinstance(values, Mapping) else values

    set_loader(kind.__name__, load_upgraded, exceptions=(yaml.YAMLError,))
    parser.parser_mode = kind.__name__


def _upgraded(values: Mapping[str, Any], kind: type) -> Mapping[str, Any]:
    upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = getattr(kind, "upgrade", None)
    return values if upgrade is None else upgrade(values)


def settings_from(arguments: Namespace, kind: type[Settings]) -> Settings:
    """The settings that parsed arguments hold, beside which there may be others.

    Raises:
        MuViTError: what the dataclass itself refuses.
    """
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "settings")
    values = {field.name: arguments[field.name] for field in fields(kind)}  # type: ignore[arg-type]
    try:
        made: Settings = parser.instantiate(Namespace(settings=Namespace(**values))).settings
    except ValueError as error:  # so the parser wraps what an optional group of settings refuses
        if isinstance(error.__cause__, MuViTError):
            raise error.__cause__ from None
        raise
    return made


def sentence(message: str) -> str:
    """The message of a parser, shortened where it speaks of types that no user has heard of.

    An optional group of settings is a union of types to the parser, which reports why each of them does not fit; what
    the user got wrong stands in the first report.
    """
    text = " ".join(message.split())
    union = _UNION.fullmatch(text)
    if union:
        inner = union["inner"].replace('Parser key "', f'Parser key "{union["key"]}.')
        text = inner if inner.startswith("Parser key") else f"{union['key']}.{inner}"
    literal = _LITERAL.fullmatch(text)
    if literal:
        allowed = literal["allowed"].replace("'", "")
        return f"{literal['key']}: expected one of {allowed}, got {literal['got']}"
    return text
