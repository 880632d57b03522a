"""Weights of overlapping tiles, which sum to 1 at every pixel."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Neighbor(NamedTuple):
    """A tile along one axis, relative to another one."""

    offset: int
    """Offset of its first pixel from that of the other; 0 is that tile itself."""
    is_first: bool = False
    """Whether it begins with the image."""
    is_last: bool = False
    """Whether it ends with the image, or beyond."""


@lru_cache(maxsize=256)
def axis_weights(size: int, overlap: int, neighbors: tuple[Neighbor, ...], blend: str) -> NDArray[np.float64]:
    """Weights of a tile along one axis, which with those of the tiles around it sum to 1 at every pixel.

    A tile's ramp rises from its edge over ``overlap`` pixels, linearly or as a squared sine, and is 1 inside, or
    everywhere (``uniform``); its weight is its ramp divided by the sum of the ramps of all tiles that cover a pixel.

    A model errs most near the edges of a tile, where the surroundings are not visible at full resolution. The squared
    sine starts with slope 0, so the outermost pixels of a tile have almost no weight; a linear ramp gives them a few
    percent and then stops, which shows as lines along the edges of tiles. At the border of the image ramps stay at 1:
    the edge of a last tile that was moved back is close to that of the tile before it, and if both fell, the latter
    would still have a large weight at its edge.

    Args:
        size: pixels of a tile.
        overlap: pixels of the ramp, at least 1.
        neighbors: all tiles that cover a part of this one, itself included.
        blend: ``linear``, ``cosine`` or ``uniform``.

    Returns:
        ``(size,)``.
    """
    pixel = np.arange(size)
    ramps = {tile.offset: _ramp(pixel - tile.offset, size, overlap, tile, blend) for tile in neighbors}
    weights: NDArray[np.float64] = ramps[0] / sum(ramps.values())
    weights.flags.writeable = False
    return weights


def _ramp(pixel: NDArray[np.int64], size: int, overlap: int, tile: Neighbor, blend: str) -> NDArray[np.float64]:
    inside = (pixel >= 0) & (pixel < size)
    if blend == "uniform":
        return inside.astype(np.float64)
    from_start = np.full(pixel.shape, np.inf) if tile.is_first else pixel + 0.5
    from_end = np.full(pixel.shape, np.inf) if tile.is_last else size - pixel - 0.5
    ramp = (np.minimum(from_start, from_end) / overlap).clip(0, 1) * inside
    return ramp if blend == "linear" else np.sin(np.pi / 2 * ramp) ** 2
