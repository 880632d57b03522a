"""Reduction of a pyramid level to a coarser one or any other grid: area mean of images, majority vote of labels."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from muvit.data.pyramids.ngff import Kind

Pixels = np.ndarray[Any, Any]
Read = Callable[[tuple[int, ...], tuple[int, ...]], Pixels]
"""Pixels ``(C, *space)`` of a level from a lower to an upper corner."""


def area_mean(pixels: Pixels, factor: int | Sequence[int]) -> Pixels:
    """Mean of every block of ``factor`` pixels per axis, over the pixels that exist at a ragged border.

    Sums are exact for integers (rounded half up at the end) and float64 for floats. Pixels that are NaN or infinite are
    left out; where a block has no others, its mean is NaN.

    Args:
        pixels: ``(C, *space)``; integers of at most 32 bits, or floats.
        factor: of all axes of space, or of each.

    Returns:
        ``(C, *ceil(space / factor))``, same dtype.
    """
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        return _finite_mean(pixels, _per_axis(factor, pixels))
    factors = _per_axis(factor, pixels)
    exact: np.dtype[Any] = np.dtype(np.int64 if pixels.dtype.kind in "iu" else np.float64)
    if pixels.dtype.itemsize == 1 and exact.kind == "i" and math.prod(factors) < 2**22:
        exact = np.dtype(np.int32)
    total, count = pixels, np.ones((1,) * pixels.ndim, np.int64)
    for axis, along in enumerate(factors, start=1):
        extent = total.shape[axis]
        count = count * _block_lengths(extent, along).reshape(-1, *(1,) * (pixels.ndim - 1 - axis))
        total = _fold(total, axis, along, np.add, exact)
    if exact.kind == "f":
        return (total / count).astype(pixels.dtype)
    count = count.astype(exact)
    return ((2 * total + count) // (2 * count)).astype(pixels.dtype)


def _finite_mean(pixels: Pixels, factors: tuple[int, ...]) -> Pixels:
    finite = np.isfinite(pixels)
    total, count = np.where(finite, pixels, 0), finite
    for axis, along in enumerate(factors, start=1):
        total = _fold(total, axis, along, np.add, np.dtype(np.float64))
        count = _fold(count, axis, along, np.add, np.dtype(np.int64))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(pixels.dtype)


def majority(labels: Pixels, factor: int | Sequence[int]) -> Pixels:
    """Most frequent label of every block of ``factor`` pixels per axis; of equally frequent ones the lowest.

    At a ragged border the pixels that exist vote. Every value is a label like any other, even one that a recipe
    ignores. The vote of a block is not that of the votes of its parts: each level is made from the finest.

    Args:
        labels: ``(C, *space)``, integers.
        factor: of all axes of space, or of each.

    Returns:
        ``(C, *ceil(space / factor))``, same dtype.
    """
    factors = _per_axis(factor, labels)
    voted = np.empty((len(labels), *(-(-n // f) for n, f in zip(labels.shape[1:], factors, strict=True))), labels.dtype)
    for parts in itertools.product(*map(_whole_and_ragged, labels.shape[1:], factors)):
        source, target, block = zip(*parts, strict=True)
        voted[(slice(None), *target)] = _modes(labels[(slice(None), *source)], block)
    return voted


def reduce_blocks(pixels: Pixels, factor: int | Sequence[int], kind: Kind) -> Pixels:
    """`area_mean` of an image, `majority` of labels."""
    return area_mean(pixels, factor) if kind == "image" else majority(pixels, factor)


def reduce_window(
    read: Read,
    start: Sequence[int],
    pixels: Pixels,
    factors: Sequence[int],
    kind: Kind,
    *,
    extent: Sequence[int],
    piece: Sequence[int],
) -> None:
    """Compute a window of a coarser level, piece by piece, so that memory stays bounded.

    Args:
        read: reads the finer level.
        start: lower corner of the window in pixels of the coarser level.
        pixels: ``(C, *space)``, receives the window.
        factors: pixels of the finer level that make one of the coarser, along each axis.
        kind: image or labels.
        extent: pixels of the finer level.
        piece: pixels of the window that are computed at once, along each axis.
    """
    for corner, size in blocks(pixels.shape[1:], piece):
        lower = tuple((a + p) * f for a, p, f in zip(start, corner, factors, strict=True))
        upper = tuple(min(a + e * f, n) for a, e, f, n in zip(lower, size, factors, extent, strict=True))
        inside = tuple(slice(p, p + e) for p, e in zip(corner, size, strict=True))
        pixels[(slice(None), *inside)] = reduce_blocks(read(lower, upper), factors, kind)


def resample_window(
    read: Read,
    start: Sequence[int],
    pixels: Pixels,
    ratios: Sequence[float],
    kind: Kind,
    *,
    extent: Sequence[int],
    piece: Sequence[int],
) -> None:
    """Compute a window of a grid whose pixels are any number of source pixels wide, piece by piece.

    Both grids begin at the same corner. A pixel of an image is the mean over its area, in which source pixels count by
    the area that lies inside it. A pixel of labels is the majority vote of ``ceil(ratio)`` samples along each axis,
    spread evenly over it, each with the label of the source pixel that its centre lies in; of equally frequent labels
    the lowest wins. So a pixel smaller than those of the source has the label at its centre, and one of whole ratios is
    that of `reduce_window`. At the border the part of a pixel counts that lies in the source.

    Args:
        read: reads the source.
        start: lower corner of the window in pixels of the new grid.
        pixels: ``(C, *space)``, receives the window.
        ratios: source pixels along each axis of a new pixel.
        kind: image or labels.
        extent: pixels of the source.
        piece: pixels of the window that are computed at once, along each axis.
    """
    find_taps = _area_taps if kind == "image" else _sample_taps
    for corner, size in blocks(pixels.shape[1:], piece):
        first = [a + p for a, p in zip(start, corner, strict=True)]
        taps = [find_taps(*axis) for axis in zip(first, size, ratios, extent, strict=True)]
        lower, upper = (tuple(values) for values in zip(*(bounds for bounds, _ in taps), strict=True))
        source = read(lower, upper)
        inside = tuple(slice(p, p + e) for p, e in zip(corner, size, strict=True))
        if kind == "image":
            pixels[(slice(None), *inside)] = _weighted(source, [tap for _, tap in taps])
        else:
            for axis, (_, (indices, _)) in enumerate(taps, start=1):
                source = source.take(indices, axis)
            pixels[(slice(None), *inside)] = majority(
                source, [max(math.ceil(ratio - _ROUNDING), 1) for ratio in ratios]
            )


_ROUNDING = 1e-9
_Taps = tuple[tuple[int, int], tuple[Pixels, Pixels]]
"""Range of source pixels along an axis, and their indices in it with weights."""


@lru_cache(maxsize=256)
def _area_taps(start: int, size: int, ratio: float, extent: int) -> _Taps:
    """Source pixels that new pixels overlap, ``(size, taps)``, with the share of each; unused ones weigh nothing."""
    edges = (np.arange(start, start + size + 1) * ratio).clip(max=extent)
    first = np.minimum(np.floor(edges[:-1] + _ROUNDING).astype(np.int64), extent - 1)
    last = np.maximum(np.ceil(edges[1:] - _ROUNDING).astype(np.int64), first + 1)
    indices = first[:, None] + np.arange((last - first).max())
    overlap = np.minimum(edges[1:, None], indices + 1) - np.maximum(edges[:-1, None], indices)
    overlap[indices >= last[:, None]] = 0
    overlap[:, 0] = np.where(overlap.sum(1) > 0, overlap[:, 0], 1)  # beyond the source: its last pixel
    # the first tap is always used: what weighs nothing repeats it, so that no other pixel's NaN comes in
    indices = np.where(overlap > _ROUNDING, indices, first[:, None])
    return (int(first[0]), int(last[-1])), (indices - first[0], overlap.clip(0) / overlap.clip(0).sum(1, keepdims=True))


@lru_cache(maxsize=256)
def _sample_taps(start: int, size: int, ratio: float, extent: int) -> _Taps:
    """Source pixels at the centres of samples, at least one of each new pixel."""
    count = max(math.ceil(ratio - _ROUNDING), 1)
    indices = np.floor((np.arange(start * count, (start + size) * count) + 0.5) * (ratio / count)).astype(np.int64)
    indices = indices[: max(int((indices < extent).sum()), (size - 1) * count + 1)].clip(max=extent - 1)
    return (int(indices[0]), int(indices[-1]) + 1), (indices - indices[0], np.ones(len(indices)))


def _weighted(source: Pixels, taps: Sequence[tuple[Pixels, Pixels]]) -> Pixels:
    """Weighted means along every axis, rounded half up for integers."""
    exact = np.dtype(np.float32 if source.dtype.itemsize <= 2 else np.float64)
    total = source.astype(exact)
    for axis, (indices, weights) in enumerate(taps, start=1):
        along = (-1, *(1,) * (total.ndim - 1 - axis))
        parts = zip(indices.T, weights.T.astype(exact), strict=True)
        total = sum(total.take(index, axis) * weight.reshape(along) for index, weight in parts)
    return np.floor(total + 0.5).astype(source.dtype) if source.dtype.kind in "iu" else total.astype(source.dtype)


def blocks(extent: Sequence[int], block: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Start and size of every block of an extent, clipped to it, in row-major order."""
    for start in itertools.product(*(range(0, n, b) for n, b in zip(extent, block, strict=True))):
        yield start, tuple(min(b, n - a) for a, b, n in zip(start, block, extent, strict=True))


def _per_axis(factor: int | Sequence[int], pixels: Pixels) -> tuple[int, ...]:
    return (factor,) * (pixels.ndim - 1) if isinstance(factor, int) else tuple(factor)


def _block_lengths(extent: int, factor: int) -> np.ndarray[Any, Any]:
    return np.diff(np.arange(0, extent + factor, factor).clip(max=extent))


def _fold(pixels: Pixels, axis: int, factor: int, combine: np.ufunc, dtype: np.dtype[Any]) -> Pixels:
    """The pixels of every block along one axis, combined into one."""

    def every(first: int) -> Pixels:
        return pixels[(slice(None),) * axis + (slice(first, None, factor),)]

    total = every(0).astype(dtype)
    for first in range(1, min(factor, pixels.shape[axis])):
        part = every(first)
        # a ragged last block has no such pixel
        present = total[(slice(None),) * axis + (slice(part.shape[axis]),)]
        combine(present, part, out=present)
    return total


def _whole_and_ragged(extent: int, factor: int) -> list[tuple[slice, slice, int]]:
    """Whole blocks along an axis and the remainder: their pixels, their place after the reduction, their length."""
    whole, rest = divmod(extent, factor)
    parts = [(slice(whole * factor), slice(whole), factor), (slice(whole * factor, None), slice(whole, None), rest)]
    return [part for part, extent in zip(parts, (whole, rest), strict=True) if extent]


def _modes(labels: Pixels, block: tuple[int, ...]) -> Pixels:
    """Most frequent label of blocks that are all whole; only those of several labels are counted."""
    modes = highest = labels
    for axis, along in enumerate(block, start=1):
        modes = _fold(modes, axis, along, np.minimum, labels.dtype)
        highest = _fold(highest, axis, along, np.maximum, labels.dtype)
    split = [extent for pair in zip(modes.shape[1:], block, strict=True) for extent in pair]
    ndim = len(block)
    # (C, blocks, block, blocks, block, ...) -> (C, *blocks, *block)
    blocks = labels.reshape(len(labels), *split).transpose(0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2))
    mixed = modes != highest
    modes[mixed] = _most_frequent(blocks[mixed].reshape(-1, math.prod(block)))
    return modes


def _most_frequent(values: Pixels) -> Pixels:
    """Most frequent value of each row of ``(N, M)``; the lowest, if several are."""
    if not values.size:
        return values[:, 0]
    if values.dtype == np.uint8 and values.shape[1] < 256:
        return _most_votes(values)
    values = np.sort(values, axis=1)
    position = np.arange(values.shape[1], dtype=np.int32)
    begins = np.ones(values.shape, bool)
    np.not_equal(values[:, 1:], values[:, :-1], out=begins[:, 1:])
    run = position - np.maximum.accumulate(np.where(begins, position, 0), axis=1)
    # the first of the longest runs ends first
    return values[np.arange(len(values)), run.argmax(axis=1)]


def _most_votes(values: Pixels) -> Pixels:
    """`_most_frequent` of uint8, less than 256 in a row, by counting each value in turn: most labels have few."""
    columns = np.ascontiguousarray(values.T)
    winner, most = np.zeros((2, len(values)), np.uint8)
    for value in np.flatnonzero(np.bincount(values.ravel())):
        votes = np.add.reduce(columns == value, axis=0, dtype=np.uint8)
        is_ahead = votes > most
        winner[is_ahead], most[is_ahead] = value, votes[is_ahead]
    return winner
