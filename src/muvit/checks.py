"""Checks of settings: a frozen dataclass declares in its types what its fields allow, and the rest is refused.

A field whose type is a ``Literal``, a number with `Bounds` or another dataclass is checked, also inside unions and
tuples:

    @dataclass(frozen=True, kw_only=True)
    class Config:
        mode: Literal["all", "same"] = "all"
        sides: PositiveInt | tuple[PositiveInt, ...] = 8

        def __post_init__(self) -> None:
            check_fields(self)
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from math import inf
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from muvit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Interval of the finite numbers that a setting may be."""

    min: float = -inf
    """Smallest number."""
    max: float = inf
    """Largest number."""
    above: float = -inf
    """All numbers are larger than this."""
    below: float = inf
    """All numbers are smaller than this."""

    def __contains__(self, value: float) -> bool:
        # neither infinity nor NaN is inside, whatever the bounds
        return -inf < value < inf and self.min <= value <= self.max and self.above < value < self.below

    def __str__(self) -> str:
        parts = (f"{sign} {edge:g}" for edge, sign in self._edges())
        return " and ".join(parts) or "that is finite"

    def _edges(self) -> Iterator[tuple[float, str]]:
        for edge, sign in ((self.min, ">="), (self.above, ">"), (self.max, "<="), (self.below, "<")):
            if abs(edge) < inf:
                yield edge, sign


PositiveInt = Annotated[int, Bounds(min=1)]
"""A whole number of at least 1."""
NonNegative = Annotated[float, Bounds(min=0)]
"""A finite number of at least 0."""
Positive = Annotated[float, Bounds(above=0)]
"""A finite number above 0."""
Share = Annotated[float, Bounds(min=0, below=1)]
"""A share in [0, 1)."""


def freeze_lists(config: Any) -> None:
    """Replace the lists in the fields of a frozen dataclass, as YAML gives them, by tuples."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            object.__setattr__(config, field.name, _as_tuple(value))


def check_fields(config: Any, prefix: str = "") -> None:
    """Refuse a dataclass with a field that its type does not allow.

    Args:
        config: the dataclass.
        prefix: placed before the name of the field in the message.

    Raises:
        InputError: names the field, and the values that it may have.
    """
    for name, kind in _checked_fields(type(config)):  # type: ignore[arg-type]
        value = getattr(config, name)
        if not _allows(kind, value):
            raise InputError(f"{prefix}{name}", expected=_describe(kind), got=repr(value))


@cache
def _checked_fields(kind: type) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(kind, include_extras=True)
    declared = fields(kind)
    return tuple((field.name, hints[field.name]) for field in declared if _is_limited(hints[field.name]))


def _is_limited(kind: Any) -> bool:
    if get_origin(kind) is Literal or _bounds(kind) is not None or is_dataclass(kind):
        return True
    return get_origin(kind) in (Union, UnionType, tuple) and any(map(_is_limited, get_args(kind)))


def _bounds(kind: Any) -> Bounds | None:
    if get_origin(kind) is not Annotated:
        return None
    return next((extra for extra in get_args(kind)[1:] if isinstance(extra, Bounds)), None)


def _allows(kind: Any, value: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_allows(part, value) for part in arguments)
    if origin is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in arguments)
    if origin is Annotated:
        bounds = _bounds(kind)
        return _allows(arguments[0], value) and (bounds is None or value in bounds)
    if origin is tuple:
        return isinstance(value, tuple) and _allows_items(arguments, value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return kind is Any or isinstance(value, NoneType if kind is None else origin or kind)


def _allows_items(kinds: tuple[Any, ...], values: tuple[Any, ...]) -> bool:
    if kinds[-1] is Ellipsis:
        return all(_allows(kinds[0], value) for value in values)
    return len(kinds) == len(values) and all(map(_allows, kinds, values))


def _describe(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_describe(part) for part in arguments if part is not NoneType)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is Annotated:
        return f"{_describe(arguments[0])} {_bounds(kind) or ''}".rstrip()
    if origin is tuple:
        parts = [_describe(part) for part in arguments if part is not Ellipsis]
        return f"a list, each item {parts[0]}" if Ellipsis in arguments else f"({', '.join(parts)})"
    return {int: "a whole number", float: "a number"}.get(kind, getattr(kind, "__name__", str(kind)))


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
