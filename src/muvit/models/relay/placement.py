"""Location of one view in another: reading a context map at the place of the local view.

The paper's views share their centre, so that the local one is the central 1/f of the context map. Here boxes say where
it is. The local view is laid out in cells of the context's pixel size; a cell that coincides with a pixel of the
context gets its value exactly, one that lies between pixels is interpolated linearly. Where boxes are aligned to the
context's pixels, as those of the paper, that is a crop.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from muvit.levels import Level, level_factors


def cells_of(size: Sequence[int], level: Level, context_level: Level) -> tuple[int, int]:
    """Cells of a view of ``size`` pixels, yx, that are as large as (or nearest to) the pixels of a context level."""
    pairs = zip(size, level_factors(level, 2), level_factors(context_level, 2), strict=True)
    rows, cols = (max(1, round(n * fine / coarse)) for n, fine, coarse in pairs)
    return rows, cols


def pool(x: Tensor, cells: Sequence[int]) -> Tensor:
    """Means over equal cells of ``(B, K, H, W)``, ``cells`` along each axis; pixels count by their area in a cell."""
    rows, cols = (_area_weights(n, size, x) for n, size in zip(cells, x.shape[2:], strict=True))
    return rows @ x @ cols.mT


def read_cells(context: Tensor, outer: Tensor, inner: Tensor, cells: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Read a map of one view at the cells of another.

    Args:
        context: ``(B, K, H, W)``, a map with the pixels of the context view.
        outer: its boxes ``(B, 2, 2)``, world pixels, yx.
        inner: boxes ``(B, 2, 2)`` of the view whose cells are read.
        cells: number of cells of that view along each axis.

    Returns:
        Values ``(B, K, *cells)`` at the centres of the cells, and whether these lie inside the context view, bool
        ``(B, 1, *cells)``; outside, the nearest value of the border is read.
    """
    weights, inside = [], []
    for axis, (n, size) in enumerate(zip(cells, context.shape[2:], strict=True)):
        outer_extent = (outer[:, 1, axis] - outer[:, 0, axis])[:, None]
        inner_extent = (inner[:, 1, axis] - inner[:, 0, axis])[:, None]
        offset = (inner[:, 0, axis] - outer[:, 0, axis])[:, None]
        index = torch.arange(n, device=context.device)
        # multiplied before divided, so that places on the context's pixels come out exactly
        place = (offset + (2 * index + 1) * inner_extent / (2 * n)) * size / outer_extent
        inside.append((place >= 0) & (place <= size))
        centers = torch.arange(size, device=context.device) + 0.5
        distance = (place.clamp(0.5, size - 0.5)[:, :, None] - centers).abs()
        weights.append((1 - distance).clamp(min=0).to(context.dtype)[:, None])
    values = weights[0] @ context @ weights[1].mT
    return values, (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def spread(values: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear up-sampling of cells ``(B, K, *cells)`` to the ``size`` pixels of their view, edges aligned."""
    return interpolate(values, size=tuple(size), mode="bilinear", align_corners=False)


def _area_weights(cells: int, size: int, like: Tensor) -> Tensor:
    # share of every pixel (columns) in every cell (rows)
    edges = torch.arange(cells + 1, device=like.device, dtype=torch.float32) * size / cells
    pixels = torch.arange(size, device=like.device, dtype=torch.float32)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (overlap.clamp(min=0) * cells / size).to(like.dtype)
