"""Settings of a YAML file or a command line, made into the dataclasses that hold them; errors in one sentence."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader, set_loader

from muvit.errors import InputError, MuViTError, ReadError, first_line
from muvit.plain_yaml import BoundsError, check_yaml, read_text, yaml_problem

Settings = TypeVar("Settings")

YAML_MODE = "muvit"
"""Parser mode of jsonargparse under which all YAML is read within bounds."""

_UNION = re.compile(
    r"Parser key \"(?P<key>[\w.]+)\": Does not validate against any of the Union subtypes.*?"
    r"Problem with given class_path '[^']+': (?P<inner>.*?) - Expected a <class 'NoneType'>.*"
)
_LITERAL = re.compile(
    r"Parser key \"(?P<key>[\w.]+)\": Expected a typing\.Literal\[(?P<allowed>.*?)\]\. Got value: (?P<got>.*)"
)
_TYPE = re.compile(r"(?P<key>[\w.]+): Expected a <class '(?P<kind>\w+)'>\. Got value: (?P<got>.*)")
_GROUP = re.compile(r"(?P<key>[\w.]+): Unable to load config ['\"](?P<got>.*?)['\"].*")
_UNKNOWN = re.compile(
    r"(?:(?:Subcommand|Group) '[^']*' does not accept option|(?P<group>[\w.]+\.)?Option) '(?P<key>[^']*)'"
    r"(?: is not accepted)?"
)
_NO_SETTING = "there is no setting "
_LONGEST = 400
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
_CHOICE = re.compile(
    r"(?:argument )?(?P<what>[\w.-]+): invalid choice: '?(?P<got>[^']*?)'? \(choose from (?P<allowed>.*)\)"
)


def _load(text: str) -> Any:
    check_yaml(text)
    try:
        return get_loader("yaml")(text)
    except ValueError as error:  # a number of thousands of digits
        raise BoundsError(yaml_problem(error).partition(";")[0]) from error


set_loader(YAML_MODE, _load, (yaml.YAMLError,))


def read_settings(file: Path | str, kind: type[Settings]) -> Settings:
    """Read a recipe or other settings, as the command line does.

    Args:
        file: YAML.
        kind: the dataclass, such as `muvit.training.recipes.Recipe`.

    Raises:
        ReadError: the file cannot be read, is not YAML, or is too large or deep.
        InputError: its settings do not fit ``kind``; names the setting.
    """
    text = read_text(file)
    try:
        values = _load(text)
    except yaml.YAMLError as error:
        raise ReadError(file, expected="settings in YAML", got=yaml_problem(error)) from error
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
    parsed = parsed_class(kind, values)
    misfit = find_misfit(values, parsed)
    if misfit is not None:
        raise InputError(subject, expected=expected, got=misfit)
    parser = ArgumentParser(exit_on_error=False, parser_mode=YAML_MODE)
    parser.add_class_arguments(parsed, as_group=False)
    try:
        return settings_from(parser.parse_object(values), kind)
    except ArgumentError as error:
        raise InputError(subject, expected=expected, got=sentence(str(error))) from error


def yaml_mode(kind: type, chosen: str | None = None) -> str:
    """Parser mode that reads bounded YAML with settings of ``kind``, also in the spelling of earlier versions.

    Args:
        kind: a dataclass; its ``upgrade``, if it has one, takes and returns a mapping of settings.
        chosen: kind of model to change the settings to, with the ``with_kind`` of the dataclass.
    """

    def load(text: str) -> Any:
        values = _load(text)
        if not isinstance(values, Mapping):
            return values
        values = _upgraded(values, kind)
        return values if chosen is None else kind.with_kind(values, chosen)  # type: ignore[attr-defined]

    mode = f"{YAML_MODE} {kind.__name__} {chosen or ''}".rstrip()
    set_loader(mode, load, (yaml.YAMLError,))
    return mode


def _upgraded(values: Mapping[str, Any], kind: type) -> Mapping[str, Any]:
    upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = getattr(kind, "upgrade", None)
    return values if upgrade is None else upgrade(values)


def parsed_class(kind: type, values: Mapping[str, Any]) -> type:
    """The dataclass to parse settings of ``kind`` as: where their types depend on a kind of model, that with its types.

    Args:
        kind: a dataclass; if it has alternatives, its ``kind_of`` finds the kind in a mapping of settings, and its
            ``of_kind`` returns the dataclass for it, a subclass with the same fields.
        values: mappings in mappings; a key may be a path such as ``model.kind``.
    """
    if not hasattr(kind, "of_kind"):
        return kind
    chosen: type = kind.of_kind(kind.kind_of(values))  # type: ignore[attr-defined]
    return chosen


def settings_from(arguments: Namespace, kind: type[Settings]) -> Settings:
    """The settings that parsed arguments hold, beside which there may be others.

    Raises:
        MuViTError: what the dataclass itself refuses.
    """
    parser = ArgumentParser(parser_mode=YAML_MODE)
    parser.add_class_arguments(parsed_class(kind, {"model.kind": arguments.get("model.kind")}), "settings")
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    values = {name: arguments[name] for name in names}
    try:
        made = parser.instantiate(Namespace(settings=Namespace(**values))).settings
    except ValueError as error:  # so the parser wraps what an optional group of settings refuses
        if isinstance(error.__cause__, MuViTError):
            raise error.__cause__ from None
        raise
    except TypeError as error:  # null where a setting has parts
        raise InputError("settings", expected=f"those of a {kind.__name__}", got=first_line(error)) from error
    return kind(**{name: getattr(made, name) for name in names})


def find_misfit(values: Mapping[Any, Any], kind: type, beside: Collection[str] = ()) -> str | None:
    """One sentence on the first key that is no setting, or group of settings that is no mapping; None if all fit.

    Args:
        values: as YAML gives them, mappings in mappings; a key may be a path such as ``optim.lr``.
        kind: the dataclass that they are for.
        beside: further keys that may stand at the top.
    """
    return _find_misfit(values, [kind], beside, "")


def setting_types(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Path and type of each setting of a dataclass, those of nested (also optional) dataclasses included."""
    for name, hint in _hints([kind]).items():
        nested = dataclasses_of(hint)
        if not nested:
            yield prefix + name, hint
        for group in nested:
            yield from setting_types(group, f"{prefix}{name}.")


def dataclasses_of(hint: Any) -> list[type]:
    """The dataclasses that a type allows."""
    return [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)]


def suggestion(word: str, known: Collection[str]) -> str:
    """``did you mean x?`` for the known word that is most like ``word``; empty if none is."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""


def sentence(message: str) -> str:
    """The message of a parser in one line, without the names of internal types.

    An optional group of settings is a union of types to the parser, which reports why each of them does not fit; the
    user's mistake stands in the first report.
    """
    text = " ".join(message.split())
    told = _sentence(text)
    return told if len(told) <= _LONGEST else f"{told[:_LONGEST]}..."


def _sentence(text: str) -> str:
    union = _UNION.fullmatch(text)
    if union:
        inner = union["inner"].replace('Parser key "', f'Parser key "{union["key"]}.')
        if inner.startswith(_NO_SETTING):
            return f"{_NO_SETTING}{union['key']}.{inner.removeprefix(_NO_SETTING)}"
        text = inner if inner.startswith("Parser key") else f"{union['key']}.{inner}"
    literal = _LITERAL.fullmatch(text)
    if literal:
        allowed = literal["allowed"].replace("'", "")
        return f"{literal['key']}: expected one of {allowed}, got {literal['got']}"
    text = re.sub(r'Parser key "([\w.]+)":', r"\1:", text)
    kind = _TYPE.fullmatch(text)
    if kind:
        return f"{kind['key']}: expected {_WORDS.get(kind['kind'], kind['kind'])}, got {kind['got']}"
    group = _GROUP.fullmatch(text)
    if group:
        return f"{group['key']}: expected settings as name: value, got {group['got']}"
    unknown = _UNKNOWN.fullmatch(text)
    if unknown:
        return f"{_NO_SETTING}{unknown['group'] or ''}{unknown['key']}"
    choice = _CHOICE.fullmatch(text)
    if choice:
        allowed = choice["allowed"].replace("'", "")
        meant = suggestion(choice["got"], allowed.split(", "))
        return f"{choice['what']}: expected one of {allowed}, got {choice['got']}{f'; {meant}' if meant else ''}"
    return text


def _find_misfit(values: Mapping[Any, Any], kinds: list[type], beside: Collection[str], path: str) -> str | None:
    hints = _hints(kinds)
    known = [*hints, *beside]
    for key, value in values.items():
        name, _, rest = str(key).partition(".")
        if name not in known:
            where, meant = f"{path}: " if path else "", suggestion(name, known)
            if meant:
                return f"{where}there is no setting {name!r}; {meant}"
            return f"{where}expected one of {', '.join(known)}, got {name!r}"
        nested, inner = dataclasses_of(hints.get(name)), {rest: value} if rest else value
        if not nested:
            continue
        place = f"{path}.{name}".lstrip(".")
        if isinstance(inner, Mapping):
            misfit = _find_misfit(inner, nested, (), place)
            if misfit is not None:
                return misfit
        elif not isinstance(inner, str) and not (inner is None and _is_optional(hints[name])):
            return f"{place}: expected settings as name: value, got {'null' if inner is None else repr(inner)}"
    return None


def _hints(kinds: list[type]) -> dict[str, Any]:
    return {field.name: get_type_hints(kind)[field.name] for kind in kinds for field in fields(kind)}


def _is_optional(hint: Any) -> bool:
    return type(None) in get_args(hint)
