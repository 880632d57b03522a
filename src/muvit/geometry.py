"""Boxes and patch centres in world coordinates: the only arithmetic between pixels and the world.

World coordinates are pixel coordinates of the finest level, in axis order (t)(z)yx: pixel *i* covers ``[i, i + 1)`` and
its centre lies at ``i + 0.5``. A box is a tensor ``(..., 2, ndim)``: index 0 the lower corner, index 1 the upper corner
(exclusive edge). A window is a box in the pixels of one level: ``start`` and ``size``, both integers per axis.

All functions are pure and keep the dtype of the boxes they get. Corners are whole pixels, so float32 is exact up to
1.6e7 px; what needs more (or works with halves of pixels far from the origin) passes float64.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from muvit.errors import InputError, ShapeError
from muvit.levels import Level, level_factors

PatchSpacing = Literal["center", "corner"]


def check_boxes(bbox: Tensor, *, num_levels: int | None = None, ndim: int | None = None, subject: str = "bbox") -> None:
    """Refuse invalid boxes.

    Coordinates are checked on the CPU only, outside of ``torch.compile`` and ``torch.export``: elsewhere the check
    would synchronise with the device or break the graph.

    Args:
        bbox: ``(..., 2, ndim)``, or ``(..., num_levels, 2, ndim)`` if ``num_levels`` is given.
        num_levels: required number of levels.
        ndim: required number of spatial axes.
        subject: what to call the boxes in the message.

    Raises:
        ShapeError: the shape does not fit.
        InputError: a coordinate is not finite, or an upper corner does not lie above its lower corner on every axis.
    """
    wanted = (*(() if num_levels is None else (num_levels,)), 2, ndim)
    tail = tuple(bbox.shape[-len(wanted) :])
    if len(tail) != len(wanted) or any(want not in (None, n) for want, n in zip(wanted, tail, strict=True)):
        names = ", ".join("ndim" if want is None else str(want) for want in wanted)
        raise ShapeError(subject, expected=f"shape (..., {names})", got=tuple(bbox.shape))
    if bbox.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not torch.isfinite(bbox).all():
        raise InputError(subject, expected="finite coordinates", got="NaN or infinity")
    empty = (box_size(bbox) <= 0).any(-1)
    if empty.any():
        lower, upper = bbox[empty][0].tolist()
        raise InputError(
            subject, expected="upper corners above lower corners on every axis", got=f"lower {lower}, upper {upper}"
        )


def box_size(bbox: Tensor) -> Tensor:
    """Extent of each box in world pixels, ``(..., 2, ndim) -> (..., ndim)``."""
    return bbox[..., 1, :] - bbox[..., 0, :]


def box_center(bbox: Tensor) -> Tensor:
    """Centre of each box in world coordinates, ``(..., 2, ndim) -> (..., ndim)``."""
    return bbox[..., 0, :] + box_size(bbox) / 2


def window_to_box(start: Sequence[int], size: Sequence[int], level: Level) -> Tensor:
    """World box ``(2, ndim)``, float64, of a pixel window of one level: ``level * size`` world pixels per axis."""
    edges = list(zip(start, size, level_factors(level, len(start)), strict=True))
    corners = [float(a) * factor for a, _, factor in edges], [(float(a) + n) * factor for a, n, factor in edges]
    return torch.tensor(corners, dtype=torch.float64)


def patch_centers(bbox: Tensor, grid: Sequence[int], spacing: PatchSpacing = "center") -> Tensor:
    """World coordinates of the patches of each box, row-major.

    ``p_i = lower + (i + 1/2) / n * (upper - lower)`` on every axis.

    Args:
        bbox: ``(..., 2, ndim)``.
        grid: number of patches along each axis.
        spacing: ``center`` puts a patch at its true centre; ``corner`` spreads the patches from the lower to the upper
            corner of the box (a single patch then lies on the lower corner).

    Returns:
        ``(..., prod(grid), ndim)``.
    """
    batch, ndim, axes = bbox.shape[:-2], len(grid), []
    for axis, n in enumerate(grid):
        lower, extent = bbox[..., 0, axis, None], box_size(bbox)[..., axis, None]
        centers = lower + _patch_offsets(n, extent, spacing)
        axes.append(centers.reshape(*batch, *(n if a == axis else 1 for a in range(ndim))).expand(*batch, *grid))
    return torch.stack(axes, dim=-1).flatten(-1 - ndim, -2)


def _patch_offsets(n: int, extent: Tensor, spacing: PatchSpacing) -> Tensor:
    # multiplied before divided: an offset that the dtype can hold comes out exactly, for any number of patches
    index = torch.arange(n, device=extent.device)
    return index * extent / max(n - 1, 1) if spacing == "corner" else (2 * index + 1) * extent / (2 * n)


def nearest_patches(bbox: Tensor, outer: Tensor, grid: Sequence[int], count: Sequence[int]) -> Tensor:
    """Row-major indices of a block of patches of each box ``outer``, as near to the centre of ``bbox`` as it fits.

    Inside of ``outer``, the block covers ``bbox`` if along each axis it has one patch more than fill the extent of
    ``bbox``, rounded up.

    Args:
        bbox: ``(..., 2, ndim)``.
        outer: ``(..., 2, ndim)``.
        grid: number of patches of ``outer`` along each axis.
        count: those in the block, at most as many.

    Returns:
        ``(..., prod(count))``, int64.
    """
    ndim = len(grid)
    indices = torch.zeros((1,) * ndim, dtype=torch.int64, device=bbox.device)
    for axis, (n, k) in enumerate(zip(grid, count, strict=True)):
        # corners first: the difference of whole pixels is exact at any distance from the origin
        offset = bbox[..., 0, axis] - outer[..., 0, axis] + box_size(bbox)[..., axis] / 2
        first = (offset * n / box_size(outer)[..., axis] - (k - 1) / 2).floor().long().clamp(0, n - k)
        along = first[..., None] + torch.arange(k, device=bbox.device)
        indices = indices * n + along.unflatten(-1, [k if a == axis else 1 for a in range(ndim)])
    return indices.flatten(-ndim)


def naive_boxes(levels: Sequence[Level], size: Sequence[int], spacing: PatchSpacing = "center") -> Tensor:
    """Boxes ``(L, 2, ndim)`` of constant size around the origin, whatever was cropped: the paper's naive control.

    Under ``corner`` spacing the box shrinks to the pixel centres of the crop.
    """
    shrink = 1 if spacing == "corner" else 0
    half = torch.tensor(
        [[f * (n - shrink) / 2 for f, n in zip(level_factors(lv, len(size)), size, strict=True)] for lv in levels]
    )
    return torch.stack([-half, half], dim=-2)


def shift_boxes(bbox: Tensor, offset: Tensor) -> Tensor:
    """Move boxes ``(..., 2, ndim)`` by ``offset`` ``(..., ndim)`` world pixels."""
    return bbox + offset.unsqueeze(-2)


def scale_boxes(bbox: Tensor, factor: Tensor | float, about: Tensor) -> Tensor:
    """Scale boxes ``(..., 2, ndim)`` about the point ``about`` ``(..., ndim)``."""
    about = about.unsqueeze(-2)
    return about + (bbox - about) * factor


def flip_boxes(bbox: Tensor, axes: Iterable[int], about: Tensor) -> Tensor:
    """Reflect boxes ``(..., 2, ndim)`` along some spatial axes about the point ``about`` ``(..., ndim)``.

    Flipping every view's pixels along the same axes, with ``about`` the centre of the finest box, gives the views of
    the mirrored scene: each patch's content keeps its (mirrored) world position.
    """
    flipped = bbox.clone()
    for axis in axes:
        mirror = 2 * about[..., axis]
        flipped[..., 0, axis] = mirror - bbox[..., 1, axis]
        flipped[..., 1, axis] = mirror - bbox[..., 0, axis]
    return flipped


def transpose_boxes(bbox: Tensor, axes: tuple[int, int], about: Tensor) -> Tensor:
    """Reflect boxes ``(..., 2, ndim)`` across the diagonal of two spatial axes through ``about`` ``(..., ndim)``.

    Goes with transposing every view's pixels; together with `flip_boxes` it makes all turns by 90 degrees.
    """
    swapped = bbox.clone()
    for axis, other in (axes, axes[::-1]):
        swapped[..., axis] = about[..., axis, None] + (bbox[..., other] - about[..., other, None])
    return swapped


def is_inside(inner: Tensor, outer: Tensor) -> Tensor:
    """Whether each box ``inner`` lies inside ``outer``, both ``(..., 2, ndim)``; returns a bool tensor ``(...)``."""
    return ((inner[..., 0, :] >= outer[..., 0, :]) & (inner[..., 1, :] <= outer[..., 1, :])).all(-1)


def clip_boxes(bbox: Tensor, bounds: Tensor) -> Tensor:
    """Intersect boxes ``(..., 2, ndim)`` with ``bounds``; one wholly outside collapses to zero extent at the border."""
    return bbox.clamp(min=bounds[..., :1, :], max=bounds[..., 1:, :])


def recenter(bbox: Tensor) -> Tensor:
    """Shift every sample's boxes ``(..., L, 2, ndim)`` so that its finest view starts at the origin.

    Attention by rotary embedding sees coordinate differences only, so this changes nothing but the rounding: both
    corners are whole pixels, hence the subtraction is exact and a sample at world offset 1e6 gives the angles of
    the same sample at 0.
    """
    return bbox - bbox[..., :1, :1, :]


def nested_start_range(start: int, factor: float, outer_factor: float, size: int, outer_extent: int) -> tuple[int, int]:
    """Range of starts of a coarse crop on one axis so that it holds a finer one (the paper's nested crops).

    Starts are whole pixels of the coarse level, so its crop can be read exactly, and holding is checked in exact
    arithmetic. A crop larger than the image must hold the whole image. Where both cannot be had, holding the finer crop
    wins over staying inside the image. Some start always holds it if ``outer_factor`` is a multiple of ``factor`` or
    ``size >= outer_factor / (outer_factor - factor)``; otherwise the start that centres the coarse crop best is given.

    Args:
        start: first pixel of the finer crop, in pixels of its level.
        factor: downsampling factor of the finer level on this axis.
        outer_factor: that of the coarse level, at least ``factor``.
        size: pixels of either crop.
        outer_extent: pixels of the image at the coarse level.

    Returns:
        Lowest and highest start, both inclusive, in pixels of the coarse level.
    """
    ratio = Fraction(factor) / Fraction(outer_factor)
    lowest, highest = math.ceil((start + size) * ratio - size), math.floor(start * ratio)
    if lowest > highest:
        lowest = highest = math.floor((start + Fraction(size, 2)) * ratio - Fraction(size - 1, 2))
    inside = sorted((0, outer_extent - size))
    return min(max(inside[0], lowest), highest), max(min(inside[1], highest), lowest)
