"""Which crops to look at: nested windows of one scene as plain integers, and the order of samples. No pixels.

A crop is a `Window`: whole pixels of one level, so that a pyramid can be read exactly there and its world box is true.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from muvit.errors import InputError
from muvit.geometry import box_center, nested_start_range, window_to_box
from muvit.levels import Level, level_factors

ContextPlace = Literal["random", "centered"]
"""Where coarse crops lie around the finest: somewhere around it, in the image, or centred on it, wherever that ends."""


class Window(NamedTuple):
    """A crop: ``size`` pixels from ``start``, in pixels of ``level``; may leave the image."""

    level: Level
    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def box(self) -> Tensor:
        """World box ``(2, ndim)``, float64."""
        return window_to_box(self.start, self.size, self.level)

    def slices_inside(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """The part of the crop, per axis in its own pixels, that lies in an image of ``shape`` pixels at its level."""
        edges = zip(self.start, self.size, shape, strict=True)
        return tuple(slice(min(max(0, -a), n), max(0, min(n, extent - a))) for a, n, extent in edges)


def start_range(size: int, extent: int) -> tuple[int, int]:
    """Lowest and highest start of a crop on one axis: inside the image, or, if larger, with the image inside it."""
    return min(0, extent - size), max(0, extent - size)


@dataclass(frozen=True, kw_only=True)
class FreeViews:
    """Where the coarser views of a sample lie if they need not hold the finest: at another place, in another slice."""

    offset_px: tuple[tuple[float, float], ...] | None = None
    """For each axis, (t)(z)yx, lowest and highest way from the centre of the finest view to that of a free one, in
    world pixels; unset, anywhere in the image. A view that would leave the image moves back to its border."""
    boxes: Literal["true", "shuffled"] = "true"
    """Boxes of the free views: their own, or those of other draws, which hide where they lie (a control)."""

    def __post_init__(self) -> None:
        if self.offset_px is not None:
            object.__setattr__(self, "offset_px", tuple(map(tuple, self.offset_px)))
            for span in self.offset_px:
                if len(span) != 2 or not -math.inf < span[0] <= span[1] < math.inf:
                    raise InputError("offset_px", expected="a finite (lowest, highest) for each axis", got=span)
        if self.boxes not in ("true", "shuffled"):
            raise InputError("boxes of free views", expected="true or shuffled", got=repr(self.boxes))


def sample_start(
    rng: np.random.Generator, shape: Sequence[int], size: Sequence[int], *, contains: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Place the finest crop uniformly in the image.

    Args:
        rng: source of randomness.
        shape: ``(ndim)``, pixels of the image at the finest level.
        size: ``(ndim)``, pixels of the crop.
        contains: a pixel that the crop must hold, ``(ndim)``.

    Returns:
        Its first pixel, ``(ndim)``.
    """
    start = []
    for axis, n in enumerate(size):
        low, high = start_range(n, shape[axis])
        if contains is not None:
            low, high = max(low, contains[axis] - n + 1), min(high, contains[axis])
        start.append(int(rng.integers(low, high, endpoint=True)))
    return tuple(start)


def sample_free(
    rng: np.random.Generator,
    start: Sequence[int],
    shapes: Sequence[Sequence[int]],
    levels: Sequence[Level],
    size: Sequence[int],
    free: FreeViews,
) -> tuple[Window, ...]:
    """Draw views that need not hold the finest one, each by itself.

    Args:
        rng: source of randomness.
        start: ``(ndim)``, first pixel of the finest crop.
        shapes: ``(L, ndim)``, pixels of the image at each level.
        levels: ``L`` downsampling factors, finest first.
        size: ``(ndim)``, pixels of every crop.
        free: where they may lie.

    Returns:
        One window per level, finest first; those of the coarser levels lie in the image, or hold it if it is smaller.
    """
    windows = [Window(levels[0], tuple(map(int, start)), tuple(size))]
    center = box_center(windows[0].box).tolist()
    for level, shape in zip(levels[1:], shapes[1:], strict=True):
        place = []
        for axis, factor in enumerate(level_factors(level, len(size))):
            low, high = start_range(size[axis], shape[axis])
            if free.offset_px is not None:
                middle = (center[axis] + rng.uniform(*free.offset_px[axis])) / factor
                low = high = min(max(math.floor(middle - size[axis] / 2 + 0.5), low), high)
            place.append(int(rng.integers(low, high, endpoint=True)))
        windows.append(Window(level, tuple(place), tuple(size)))
    return tuple(windows)


def fixed_free(
    start: Sequence[int],
    shapes: Sequence[Sequence[int]],
    levels: Sequence[Level],
    size: Sequence[int],
    free: FreeViews,
) -> tuple[Window, ...]:
    """The free views of one tile for inference: `sample_free` with a draw that depends on ``start`` alone."""
    return sample_free(tile_generator(start), start, shapes, levels, size, free)


def tile_generator(start: Sequence[int]) -> np.random.Generator:
    """Source of what is random about a tile: of its first pixel ``(ndim)`` alone, so that tiles come in any order."""
    return np.random.default_rng([abs(int(a)) for a in start])


def sample_nested(
    rng: np.random.Generator,
    shapes: Sequence[Sequence[int]],
    levels: Sequence[Level],
    size: Sequence[int],
    *,
    contains: Sequence[int] | None = None,
) -> tuple[Window, ...]:
    """Draw one crop per level, each inside the next coarser one (the paper's nested crops).

    The finest crop is placed uniformly in the image, then each coarser one uniformly among the places where it holds
    the finer crop and stays in the image (or holds the whole image, if it is larger); coarse crops are not centred.
    Crops lie on whole pixels of their level. At a border where a coarse level ends before the image does, because the
    last pixels did not fill one of its own, a coarse crop leaves the image rather than cutting the finer crop.

    Args:
        rng: source of randomness.
        shapes: ``(L, ndim)``, pixels of the image at each level.
        levels: ``L`` downsampling factors, finest first.
        size: ``(ndim)``, pixels of every crop.
        contains: a pixel of the finest level that its crop must hold, ``(ndim)``.

    Returns:
        One window per level, finest first.
    """
    first = sample_start(rng, shapes[0], size, contains=contains)
    return _nest(first, shapes, levels, size, lambda low, high, _: int(rng.integers(low, high, endpoint=True)))


def centered_nested(
    start: Sequence[int], shapes: Sequence[Sequence[int]], levels: Sequence[Level], size: Sequence[int]
) -> tuple[Window, ...]:
    """The context of one tile for inference: coarse crops centred on it as well as nesting and the image allow.

    Args:
        start: ``(ndim)``, first pixel of the tile, in pixels of the finest level.
        shapes: ``(L, ndim)``, pixels of the image at each level.
        levels: ``L`` downsampling factors, finest first.
        size: ``(ndim)``, pixels of every crop.

    Returns:
        One window per level, finest first; the first is the tile itself, and each lies inside the next.
    """
    return _nest(start, shapes, levels, size, lambda low, high, ideal: min(max(math.floor(ideal + 0.5), low), high))


def concentric(start: Sequence[int], levels: Sequence[Level], size: Sequence[int]) -> tuple[Window, ...]:
    """Crops of one centre (Relay Tokens): coarse crops centred on the finest, wherever the image ends.

    Args:
        start: ``(ndim)``, first pixel of the finest crop.
        levels: ``L`` downsampling factors, finest first.
        size: ``(ndim)``, pixels of every crop.

    Returns:
        One window per level, finest first; centres agree as exactly as whole pixels of the level allow.
    """
    return _nest(start, [tuple(size)] * len(levels), levels, size, lambda low, high, ideal: math.floor(ideal + 0.5))


def grid_nested(
    start: Sequence[int], shapes: Sequence[Sequence[int]], levels: Sequence[Level], size: Sequence[int]
) -> tuple[Window, ...]:
    """The context of one tile for inference, from coarse crops that many tiles share.

    The crops of every coarse level lie on a grid of half-crop steps (smaller ones where a level is less than twice as
    coarse as the one before), which begins and ends with the image. Of those that hold the crop of the finer level, the
    one whose centre is nearest to its centre is taken; so equal crops of one level lie in equal crops of all coarser
    ones. Where no crop of the grid holds the finer one (levels nearly alike, or a coarse level that ends before the
    image does), it is placed as by `centered_nested`.

    Args:
        start: ``(ndim)``, first pixel of the tile, in pixels of the finest level.
        shapes: ``(L, ndim)``, pixels of the image at each level.
        levels: ``L`` downsampling factors, finest first.
        size: ``(ndim)``, pixels of every crop.

    Returns:
        One window per level, finest first; the first is the tile itself, and each lies inside the next.
    """
    factors = [level_factors(level, len(size)) for level in levels]
    starts = [tuple(int(a) for a in start)]
    for k in range(1, len(levels)):
        starts.append(
            tuple(
                _on_grid(starts[-1][axis], factors[k - 1][axis], factors[k][axis], n, shapes[k][axis])
                for axis, n in enumerate(size)
            )
        )
    return tuple(Window(level, begin, tuple(size)) for level, begin in zip(levels, starts, strict=True))


def _on_grid(start: int, factor: float, outer_factor: float, size: int, outer_extent: int) -> int:
    """Start of the crop of the grid on one axis; arguments as of `nested_start_range`."""
    low, high = nested_start_range(start, factor, outer_factor, size, outer_extent)
    ratio = Fraction(factor) / Fraction(outer_factor)
    ideal = (start + Fraction(size, 2)) * ratio - Fraction(size, 2)
    step = max(min(size // 2, math.floor(size * (1 - ratio))), 1)
    # half a step beside the origin, so that tiles whose crop is the same fill a square that blocks of the output share
    shift = step // 2
    # a crop held by grid crop i may also be held by its neighbours
    indices = [math.floor((ideal + shift) / step), math.ceil((ideal + shift) / step)]
    indices += [math.ceil(Fraction(low + shift, step)), (high + shift) // step]
    multiples = [i * step - shift for i in indices]
    candidates = [a for a in (*multiples, *start_range(size, outer_extent)) if low <= a <= high]
    if not candidates:
        return min(max(math.floor(ideal + Fraction(1, 2)), low), high)
    return min(candidates, key=lambda a: (abs(a - ideal), a))


def _nest(
    first: Sequence[int],
    shapes: Sequence[Sequence[int]],
    levels: Sequence[Level],
    size: Sequence[int],
    place: Callable[[int, int, float], int],
) -> tuple[Window, ...]:
    """Place the coarser crops around the first; ``place`` gets the allowed starts and the one centred on the tile."""
    factors = [level_factors(level, len(size)) for level in levels]
    starts = [tuple(int(a) for a in first)]
    for k in range(1, len(levels)):
        start = []
        for axis, n in enumerate(size):
            factor, outer = factors[k - 1][axis], factors[k][axis]
            low, high = nested_start_range(starts[-1][axis], factor, outer, n, shapes[k][axis])
            tile_center = (starts[0][axis] + Fraction(n, 2)) * Fraction(factors[0][axis]) / Fraction(outer)
            start.append(place(low, high, float(tile_center - Fraction(n, 2))))
        starts.append(tuple(start))
    return tuple(Window(level, start, tuple(size)) for level, start in zip(levels, starts, strict=True))


class EpochSampler(Sampler[int]):
    """Sample numbers that never repeat: epoch ``e`` of a data set of ``n`` samples is ``e * n ... (e + 1) * n - 1``.

    A data set that derives each sample from its number alone (`NestedCrops`) thus shows new crops in every epoch, the
    same ones whatever the number of workers or processes, and a run resumed in mid-epoch goes on where it stopped.

    Args:
        num_samples: samples per epoch, over all processes.
        epoch: epoch to begin with.
        start: samples of that epoch, over all processes, that have been seen already.
        rank: number of this process.
        num_replicas: number of processes; they take turns, and what does not divide evenly is left out.

    Raises:
        InputError: a number is out of range.
    """

    def __init__(
        self, num_samples: int, *, epoch: int = 0, start: int = 0, rank: int = 0, num_replicas: int = 1
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise InputError("rank", expected=f"0 <= rank < {num_replicas} replicas", got=rank)
        if not 0 <= start <= num_samples or epoch < 0:
            got = f"start {start} of {num_samples} samples in epoch {epoch}"
            raise InputError("start", expected="0 <= start <= samples per epoch, epoch >= 0", got=got)
        self.num_samples = num_samples
        self.epoch = epoch
        self.start = start
        self.rank = rank
        self.num_replicas = num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to go through next; a new epoch begins at its first sample (Lightning calls this itself)."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return (self.num_samples - self.start) // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.num_samples + self.start + self.rank
        return iter(range(first, first + len(self) * self.num_replicas, self.num_replicas))
