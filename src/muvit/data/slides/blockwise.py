"""Base of slides whose pixels are computed as they are read."""

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from muvit.data.slides.slide import Slide
from muvit.levels import Level

_CACHED_BYTES = 64 << 20
_BLOCK = {1: 1 << 16, 2: 256, 3: 64, 4: 16}


class BlockwiseSlide(Slide):
    """A slide that computes its pixels block by block, and keeps the latest ones.

    Each process keeps up to 64 MiB of a slide, since neighbouring windows of a coarse level overlap much. Blocks lie on
    a grid of 256 pixels (2D), so a pixel is the same in whichever window it is read.

    Args:
        path: the file or folder it was opened from.
        facts: as of `Slide`.
    """

    def __init__(self, path: Path, **facts: Any) -> None:
        super().__init__(path, **facts)
        self._remember()

    def _remember(self) -> None:
        self._edge = _BLOCK[self.ndim]
        block_bytes = self._edge**self.ndim * self.num_channels * self.dtype.itemsize
        self._block = lru_cache(maxsize=max(_CACHED_BYTES // block_bytes, 1))(self._computed_block)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_block"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        pixels = np.empty((self.num_channels, *(b - a for a, b in zip(start, stop, strict=True))), self.dtype)
        ranges = (range(a // self._edge, -(-b // self._edge)) for a, b in zip(start, stop, strict=True))
        for index in itertools.product(*ranges):
            block = self._block(level, index)
            origin = [i * self._edge for i in index]
            bounds = [
                (max(a, o), min(b, o + n)) for a, b, o, n in zip(start, stop, origin, block.shape[1:], strict=True)
            ]
            target = tuple(slice(p - a, q - a) for (p, q), a in zip(bounds, start, strict=True))
            source = tuple(slice(p - o, q - o) for (p, q), o in zip(bounds, origin, strict=True))
            pixels[(slice(None), *target)] = block[(slice(None), *source)]
        return pixels

    def _computed_block(self, level: Level, index: tuple[int, ...]) -> np.ndarray[Any, Any]:
        start = [i * self._edge for i in index]
        size = [min(self._edge, n - a) for a, n in zip(start, self.level_shape(level), strict=True)]
        return self._compute_block(level, start, size)

    @abstractmethod
    def _compute_block(self, level: Level, start: Sequence[int], size: Sequence[int]) -> np.ndarray[Any, Any]:
        """Pixels ``(C, *size)`` of a window of a level that lies inside it."""
