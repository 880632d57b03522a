"""Levels as plain numbers: the downsampling factor of a view, one for all axes or one per axis."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from muvit.errors import InputError

Level = float | tuple[float, ...]
"""Downsampling factor relative to the finest pixels: one number, or one per axis."""


def level_factors(level: Level, ndim: int) -> tuple[float, ...]:
    """Downsampling factor of each axis, in axis order.

    Raises:
        InputError: a factor is not positive and finite, or their number is not ``ndim``.
    """
    factors = (float(level),) * ndim if isinstance(level, int | float) else _floats(level)
    if len(factors) != ndim or not all(0 < f < math.inf for f in factors):
        raise InputError("level", expected=f"a positive number, or {ndim} of them", got=repr(level))
    return factors


def plain_level(level: Level) -> Level:
    """A level as it is stored and compared: a number where the axes agree, else a tuple; ``[1, 4, 4] -> (1, 4, 4)``.

    Raises:
        InputError: it is neither a number nor a sequence of numbers.
    """
    if isinstance(level, int | float):
        return level
    factors = _floats(level)
    return factors[0] if len(set(factors)) == 1 else factors


def _floats(level: Iterable[float]) -> tuple[float, ...]:
    try:
        return tuple(map(float, level))
    except (TypeError, ValueError):
        raise InputError("level", expected="a number, or one for each axis", got=repr(level)) from None


def level_name(level: Level) -> str:
    """Text of a level: ``4``, or ``1x4x4`` where the axes differ."""
    level = plain_level(level)
    return f"{level:g}" if isinstance(level, int | float) else "x".join(f"{factor:g}" for factor in level)


def check_levels(levels: Sequence[Level], ndim: int) -> None:
    """Refuse levels that are not listed from the finest to the coarsest, each once.

    Raises:
        InputError: there is none, a factor shrinks from one level to the next, or two levels are equal.
    """
    factors = [level_factors(level, ndim) for level in levels]
    ascending = all(a != b and all(f <= g for f, g in zip(a, b, strict=True)) for a, b in pairwise(factors))
    if not factors or not ascending:
        raise InputError("levels", expected="different levels in ascending order, finest first", got=list(levels))
