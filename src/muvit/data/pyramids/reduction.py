"""How one level of a pyramid becomes the next coarser one: area mean for images, nearest pixel for labels."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Pixels = np.ndarray[Any, Any]


def area_mean(pixels: Pixels, factor: int | Sequence[int]) -> Pixels:
    """Mean of every block of ``factor`` pixels per axis, over the pixels that exist at a ragged border.

    Sums are exact for integers (rounded half up at the end) and float64 for floats.

    Args:
        pixels: ``(C, *space)``; integers of at most 32 bits, or floats.
        factor: of all axes of space, or of each.

    Returns:
        ``(C, *ceil(space / factor))``, same dtype.
    """
    factors = _per_axis(factor, pixels)
    exact: np.dtype[Any] = np.dtype(np.int64 if pixels.dtype.kind in "iu" else np.float64)
    if pixels.dtype.itemsize == 1 and exact.kind == "i" and math.prod(factors) < 2**22:
        exact = np.dtype(np.int32)
    total, count = pixels, np.ones((1,) * pixels.ndim, np.int64)
    for axis, along in enumerate(factors, start=1):
        extent = total.shape[axis]
        count = count * _block_lengths(extent, along).reshape(-1, *(1,) * (pixels.ndim - 1 - axis))
        total = _block_sums(total, axis, along, exact)
    if exact.kind == "f":
        return (total / count).astype(pixels.dtype)
    count = count.astype(exact)
    return ((2 * total + count) // (2 * count)).astype(pixels.dtype)


def nearest(labels: Pixels, factor: int | Sequence[int]) -> Pixels:
    """One pixel of every block of ``factor`` pixels per axis: number ``(factor - 1) // 2`` along each axis.

    That is the centre of an odd block and the pixel up and left of the centre of an even one. At a ragged border, where
    a block ends before that pixel, its last pixel stands for it.

    Args:
        labels: ``(C, *space)``.
        factor: of all axes of space, or of each.

    Returns:
        ``(C, *ceil(space / factor))``, same dtype.
    """
    for axis, along in enumerate(_per_axis(factor, labels), start=1):
        extent = labels.shape[axis]
        index = np.arange(0, extent, along) + (along - 1) // 2
        labels = labels.take(index.clip(max=extent - 1), axis=axis)
    return labels


def _per_axis(factor: int | Sequence[int], pixels: Pixels) -> tuple[int, ...]:
    return (factor,) * (pixels.ndim - 1) if isinstance(factor, int) else tuple(factor)


def _block_lengths(extent: int, factor: int) -> np.ndarray[Any, Any]:
    return np.diff(np.arange(0, extent + factor, factor).clip(max=extent))


def _block_sums(pixels: Pixels, axis: int, factor: int, dtype: np.dtype[Any]) -> Pixels:
    def every(first: int) -> Pixels:
        return pixels[(slice(None),) * axis + (slice(first, None, factor),)]

    total = every(0).astype(dtype)
    for first in range(1, min(factor, pixels.shape[axis])):
        part = every(first)
        # a ragged last block has no such pixel
        total[(slice(None),) * axis + (slice(part.shape[axis]),)] += part
    return total
