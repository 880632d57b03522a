"""How the predictions of overlapping tiles become one image: weights of sum 1, and the block that gathers them."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=256)
def axis_weights(size: int, overlap: int, offsets: tuple[int, ...], blend: str) -> NDArray[np.float64]:
    """Weights of a tile along one axis, which with those of the tiles around it sum to 1 at every pixel.

    A tile's share rises from its edge over ``overlap`` pixels, linearly or as a squared sine, and stays at 1 inside;
    its weight is its share of the sum over all tiles that cover a pixel. So the border of the image, and tiles that
    were moved back into it, need no rule of their own.

    Args:
        size: pixels of a tile.
        overlap: pixels of the ramp, at least 1.
        offsets: where all tiles begin that cover a part of this one, relative to it; 0 is the tile itself.
        blend: ``linear`` or ``cosine``.

    Returns:
        ``(size,)``.
    """
    pixel = np.arange(size)
    total = sum(_share(pixel - offset, size, overlap, blend) for offset in offsets)
    weights: NDArray[np.float64] = _share(pixel, size, overlap, blend) / total
    weights.flags.writeable = False
    return weights


def _share(pixel: NDArray[np.int64], size: int, overlap: int, blend: str) -> NDArray[np.float64]:
    distance = np.minimum(pixel, size - 1 - pixel) + 0.5
    ramp = (distance / overlap).clip(0, 1)
    return ramp if blend == "linear" else np.sin(np.pi / 2 * ramp) ** 2
