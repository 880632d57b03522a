"""Placement of the views of a sample: windows of several levels as plain integers, without pixels.

A view is a `Window`: whole pixels of one level, so that a pyramid can be read exactly there and its world box is true.
`place_views` is the only place that decides where coarse views lie; training, validation, prediction and classification
all call it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from muvit.checks import check_fields, freeze_lists
from muvit.errors import InputError
from muvit.levels import Level, level_factors

if TYPE_CHECKING:
    from torch import Tensor

Placement = Literal["nested", "concentric", "grid", "free"]
"""Placement of coarse views: around the next finer view and inside the image (nested); centred on the finest view, also
beyond the image (concentric); around the next finer view, on a grid of half-crop steps that neighbouring tiles share
(grid); or independently of the finest view (free)."""


class Window(NamedTuple):
    """A crop: ``size`` pixels from ``start``, in pixels of ``level``; may leave the image."""

    level: Level
    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def box(self) -> "Tensor":
        """World box ``(2, ndim)``, float64."""
        from muvit.geometry import window_to_box

        return window_to_box(self.start, self.size, self.level)

    def slices_inside(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """The part of the crop, per axis in its own pixels, that lies in an image of ``shape`` pixels at its level."""
        edges = zip(self.start, self.size, shape, strict=True)
        return tuple(slice(min(max(0, -a), n), max(0, min(n, extent - a))) for a, n, extent in edges)


class PlacedViews(NamedTuple):
    """The views of one sample, finest first."""

    windows: tuple[Window, ...]
    """The windows to read."""
    claimed: tuple[Window, ...]
    """The windows whose boxes the model is told: `windows` themselves, except for shuffled boxes of free views."""

    @property
    def boxes(self) -> "Tensor":
        """World boxes ``(L, 2, ndim)`` that the model is told, float64."""
        import torch

        return torch.stack([window.box for window in self.claimed])


@dataclass(frozen=True, kw_only=True)
class FreeViews:
    """Offsets and boxes of the coarse views of placement ``free``: elsewhere in the image, or in another slice."""

    offset_px: tuple[tuple[float, float], ...] | None = None
    """For each axis, (t)(z)yx, lowest and highest offset from the centre of the finest view to that of a free one, in
    world pixels; unset, anywhere in the image. A view that would leave the image moves back to its border."""
    boxes: Literal["true", "shuffled"] = "true"
    """Boxes of the free views: their own, or those of other draws, which hide where they lie (a control)."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_fields(self, "free_views.")
        if self.offset_px is not None:
            for span in self.offset_px:
                if len(span) != 2 or not -math.inf < span[0] <= span[1] < math.inf:
                    raise InputError("offset_px", expected="a finite (lowest, highest) for each axis", got=span)


def check_placement(placement: Placement, free_views: FreeViews | None, ndim: int) -> None:
    """Refuse a placement whose settings do not fit each other or the image.

    Raises:
        InputError: an unknown placement, free views with another placement than ``free``, or a number of offsets
            other than ``ndim``.
    """
    if placement not in get_args(Placement):
        raise InputError("placement", expected=f"one of {', '.join(get_args(Placement))}", got=repr(placement))
    if free_views is not None and placement != "free":
        raise InputError("placement", expected="free, since free_views are given", got=placement)
    offsets = None if free_views is None else free_views.offset_px
    if offsets is not None and len(offsets) != ndim:
        raise InputError("offset_px", expected=f"a range for each of {ndim} axes", got=offsets)


def upgrade_placement(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of crops in today's spelling.

    Earlier files say ``context: random`` (nested) or ``context: centered`` (concentric), and free views follow from
    ``free_views`` alone.
    """
    upgraded = dict(settings)
    if "placement" not in upgraded:
        context = upgraded.pop("context", None)
        if upgraded.get("free_views") is not None:
            upgraded["placement"] = "free"
        elif context is not None:
            upgraded["placement"] = {"random": "nested", "centered": "concentric"}.get(context, context)
    return upgraded


def tile_placements(trained: Placement) -> tuple[Placement, ...]:
    """Placements that show a model of this training placement what it knows, its own first.

    Coarse views of `grid` are a choice of those of `nested`, so either suits models of both.
    """
    nested: tuple[Placement, ...] = ("nested", "grid")
    return nested[:: 1 if trained == "nested" else -1] if trained in nested else (trained,)


def place_views(
    placement: Placement,
    shapes: Sequence[Sequence[int]],
    levels: Sequence[Level],
    size: Sequence[int],
    *,
    start: Sequence[int] | None = None,
    rng: np.random.Generator | None = None,
    contains: Sequence[int] | None = None,
    free_views: FreeViews | None = None,
) -> PlacedViews:
    """Place the views of one sample.

    The finest view lies at ``start``, or is drawn uniformly in the image. The coarser ones follow their placement:

    * ``nested``: each holds the next finer view and stays in the image (or holds the whole image, if it is larger).
      With ``rng`` it is drawn uniformly among these places (the paper's nested crops), without it is centred on the
      finest view as well as they allow. At a border where a coarse level ends before the image does, because its last
      pixels did not fill one of the level, a view leaves the image rather than cut the finer view.
    * ``concentric``: centred on the finest view to half a pixel of its level, also beyond the image (Relay Tokens).
    * ``grid``: of the views on a grid of half-crop steps (smaller steps where a level is less than twice as coarse as
      the one before) that hold the next finer view, the one centred nearest to it. So equal views of one level lie in
      equal views of all coarser levels. Where no view of the grid holds the finer one, it is placed as ``nested``.
    * ``free``: drawn independently of each other, from ``rng``, or else from ``start`` alone.

    Without ``rng`` the result depends on ``start`` alone, as tiles of validation and prediction need it.

    Args:
        placement: where the coarse views lie.
        shapes: ``(L, ndim)``, pixels of the image at each level.
        levels: ``L`` downsampling factors, finest first.
        size: ``(ndim)``, pixels of every view.
        start: ``(ndim)``, first pixel of the finest view, in pixels of its level; by default drawn from ``rng``.
        rng: source of randomness.
        contains: ``(ndim)``, a pixel of the finest level that a drawn finest view must hold.
        free_views: offsets and boxes of placement ``free``; by default anywhere in the image, at true boxes.

    Raises:
        InputError: neither ``start`` nor ``rng`` is given, or the placement is unknown.
    """
    if start is None:
        if rng is None:
            raise InputError("start", expected="a first pixel, or a generator to draw it", got=None)
        start = draw_start(rng, shapes[0], size, contains=contains)
    first = Window(levels[0], tuple(int(a) for a in start), tuple(size))
    if placement == "free":
        free, rng = free_views or FreeViews(), rng or _tile_generator(start)
        windows = (first, *_free_views(rng, first, shapes, levels, free))
        shuffled = free.boxes == "shuffled"
        return PlacedViews(windows, (first, *_free_views(rng, first, shapes, levels, free)) if shuffled else windows)
    rules: dict[str, Callable[[_Axis], int]] = {
        "nested": _centered if rng is None else lambda axis: int(rng.integers(axis.low, axis.high, endpoint=True)),
        "concentric": lambda axis: _rounded(axis.on_finest),
        "grid": _on_grid,
    }
    if placement not in rules:
        raise InputError("placement", expected=f"one of {', '.join(get_args(Placement))}", got=repr(placement))
    windows = _around(first, shapes, levels, rules[placement])
    return PlacedViews(windows, windows)


def place_at(
    placement: Placement,
    shapes: Sequence[Sequence[int]],
    levels: Sequence[Level],
    size: Sequence[int],
    point: Sequence[float],
    *,
    free_views: FreeViews | None = None,
) -> PlacedViews:
    """Place the views of one sample about a point, as prediction would: the finest centred on it, but in the image.

    Args:
        placement: as of `place_views`.
        shapes: as of `place_views`.
        levels: as of `place_views`.
        size: as of `place_views`.
        point: ``(ndim)``, world coordinates.
        free_views: as of `place_views`.
    """
    start = []
    for a, n, extent, factor in zip(point, size, shapes[0], level_factors(levels[0], len(size)), strict=True):
        low, high = start_range(n, extent)
        start.append(min(max(math.floor(a / factor - n / 2 + 0.5), low), high))
    return place_views(placement, shapes, levels, size, start=start, free_views=free_views)


def start_range(size: int, extent: int) -> tuple[int, int]:
    """Lowest and highest start of a crop on one axis: inside the image, or, if larger, with the image inside it."""
    return min(0, extent - size), max(0, extent - size)


def draw_start(
    rng: np.random.Generator, shape: Sequence[int], size: Sequence[int], *, contains: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Draw the first pixel ``(ndim)`` of a crop uniformly in the image.

    Args:
        rng: source of randomness.
        shape: ``(ndim)``, pixels of the image at the crop's level.
        size: ``(ndim)``, pixels of the crop.
        contains: ``(ndim)``, a pixel that the crop must hold.
    """
    start = []
    for axis, n in enumerate(size):
        low, high = start_range(n, shape[axis])
        if contains is not None:
            low, high = max(low, contains[axis] - n + 1), min(high, contains[axis])
        start.append(int(rng.integers(low, high, endpoint=True)))
    return tuple(start)


class _Axis(NamedTuple):
    """One axis of a coarse view that is to be placed around finer ones; starts are pixels of the coarse level."""

    low: int
    """Lowest start at which the view holds the next finer one and stays in the image, as far as both can be had."""
    high: int
    """Highest such start."""
    on_finest: Fraction
    """Start at which it is centred on the finest view."""
    on_finer: Fraction
    """Start at which it is centred on the next finer view."""
    size: int
    """Pixels of the view."""
    extent: int
    """Pixels of the image."""
    ratio: Fraction
    """Factor of the next finer level over that of this one."""


def _around(
    first: Window, shapes: Sequence[Sequence[int]], levels: Sequence[Level], rule: Callable[[_Axis], int]
) -> tuple[Window, ...]:
    """Place the coarser views around the first, axis by axis, by a rule that picks a start."""
    from muvit.geometry import nested_start_range

    size = first.size
    factors = [level_factors(level, len(size)) for level in levels]
    starts = [first.start]
    for k in range(1, len(levels)):
        start = []
        for axis, n in enumerate(size):
            factor, outer = Fraction(factors[k - 1][axis]), Fraction(factors[k][axis])
            low, high = nested_start_range(starts[-1][axis], factors[k - 1][axis], factors[k][axis], n, shapes[k][axis])
            half = Fraction(n, 2)
            on_finest = (first.start[axis] + half) * Fraction(factors[0][axis]) / outer - half
            on_finer = (starts[-1][axis] + half) * factor / outer - half
            start.append(rule(_Axis(low, high, on_finest, on_finer, n, shapes[k][axis], factor / outer)))
        starts.append(tuple(start))
    return tuple(Window(level, start, size) for level, start in zip(levels, starts, strict=True))


def _rounded(start: Fraction) -> int:
    return math.floor(start + Fraction(1, 2))


def _centered(axis: _Axis) -> int:
    return min(max(_rounded(axis.on_finest), axis.low), axis.high)


def _on_grid(axis: _Axis) -> int:
    step = max(min(axis.size // 2, math.floor(axis.size * (1 - axis.ratio))), 1)
    # half a step beside the origin, so that tiles whose crop is the same fill a square that blocks of the output share
    shift = step // 2
    # a crop held by one crop of the grid may also be held by its neighbours
    indices = [math.floor((axis.on_finer + shift) / step), math.ceil((axis.on_finer + shift) / step)]
    indices += [math.ceil(Fraction(axis.low + shift, step)), (axis.high + shift) // step]
    multiples = [i * step - shift for i in indices]
    candidates = [a for a in (*multiples, *start_range(axis.size, axis.extent)) if axis.low <= a <= axis.high]
    if not candidates:
        return min(max(_rounded(axis.on_finer), axis.low), axis.high)
    return min(candidates, key=lambda a: (abs(a - axis.on_finer), a))


def _free_views(
    rng: np.random.Generator,
    first: Window,
    shapes: Sequence[Sequence[int]],
    levels: Sequence[Level],
    free: FreeViews,
) -> list[Window]:
    """Draw one window for each level but the finest; it lies in the image, or holds it if the image is smaller."""
    from muvit.geometry import box_center

    size, center, windows = first.size, box_center(first.box).tolist(), []
    for level, shape in zip(levels[1:], shapes[1:], strict=True):
        start = []
        for axis, factor in enumerate(level_factors(level, len(size))):
            low, high = start_range(size[axis], shape[axis])
            if free.offset_px is not None:
                middle = (center[axis] + rng.uniform(*free.offset_px[axis])) / factor
                low = high = min(max(math.floor(middle - size[axis] / 2 + 0.5), low), high)
            start.append(int(rng.integers(low, high, endpoint=True)))
        windows.append(Window(level, tuple(start), size))
    return windows


def _tile_generator(start: Sequence[int]) -> np.random.Generator:
    """Generator seeded by a tile's first pixel, so that tiles can be placed in any order."""
    return np.random.default_rng([abs(int(a)) for a in start])
