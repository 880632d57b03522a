"""Which crops to look at: nested windows of one scene as plain integers, and the order of samples. No pixels.

A crop is a `Window`: whole pixels of one level, so that a pyramid can be read exactly there and its world box is true.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from muvit.errors import InputError
from muvit.geometry import Level, level_factors, nested_start_range, window_to_box


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
    first = []
    for axis, n in enumerate(size):
        low, high = start_range(n, shapes[0][axis])
        if contains is not None:
            low, high = max(low, contains[axis] - n + 1), min(high, contains[axis])
        first.append(int(rng.integers(low, high, endpoint=True)))
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
