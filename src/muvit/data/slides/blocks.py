"""Decoded blocks of slides, kept in memory."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from muvit.levels import Level

if TYPE_CHECKING:
    from muvit.data.slides.slide import Slide

BLOCK = {1: 1 << 16, 2: 256, 3: 64, 4: 16}
"""Side of a block in pixels, by the number of axes."""

Pending = Callable[[], np.ndarray[Any, Any]]
"""A window that is being read, or will be when this is called: gives its pixels, once."""


class Block:
    """A block of a level: requested when it is made, read when its pixels are first asked for, and then kept.

    Args:
        slide: the image.
        level: one of its levels.
        index: place of the block on the grid of blocks, ``(ndim)``.
    """

    def __init__(self, slide: "Slide", level: Level, index: tuple[int, ...]) -> None:
        start = tuple(i * BLOCK[slide.ndim] for i in index)
        stop = tuple(min(a + BLOCK[slide.ndim], n) for a, n in zip(start, slide.level_shape(level), strict=True))
        self._request = partial(slide.request_block, level, start, stop)
        self._pending: Pending | None = self._request()
        self._pixels: np.ndarray[Any, Any] | None = None

    @property
    def pixels(self) -> np.ndarray[Any, Any]:
        """Pixels ``(C, *space)``."""
        if self._pixels is None:
            # what fails is requested again when it is next asked for
            pending, self._pending = self._pending or self._request(), None
            self._pixels = pending()
        return self._pixels


class BlockCache:
    """Decoded blocks of slides, the most recently used ones, in bounded memory.

    Each process has its own: a cache that is sent to another process arrives empty. Several slides may share one.

    Args:
        num_bytes: most memory that the blocks take.
        block_bytes: size of a block, of `muvit.data.slides.slide.Slide.block_bytes`.
    """

    def __init__(self, num_bytes: int, block_bytes: int) -> None:
        self._sizes = num_bytes, block_bytes
        # needs no lock of ours, which a forked process might inherit closed
        self.block = lru_cache(maxsize=max(num_bytes // block_bytes, 1))(Block)

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockCache, self._sizes
