"""A slide that lives in memory, for tests: what a reader must be, in a few lines."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from muvit.data.slides.slide import Slide
from muvit.levels import Level, level_factors, plain_level


class MemorySlide(Slide):
    def __init__(self, pyramid: dict[Level, np.ndarray], name: str = "memory") -> None:
        finest = pyramid[1]
        super().__init__(
            Path(name),
            level_shapes={level: pixels.shape[1:] for level, pixels in pyramid.items()},
            num_channels=len(finest),
            dtype=finest.dtype,
            pixel_size_um=None,
            channel_names=tuple(f"channel {i}" for i in range(len(finest))),
        )
        self.pyramid = {plain_level(level): pixels for level, pixels in pyramid.items()}
        self.windows: list[tuple[Level, tuple[int, ...]]] = []

    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray:
        self.windows.append((level, tuple(b - a for a, b in zip(start, stop, strict=True))))
        inside = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        return self.pyramid[level][(slice(None), *inside)].copy()


def world_slide(shape: Sequence[int], levels: Sequence[Level], name: str = "world") -> MemorySlide:
    """Channel ``a`` of every pixel holds the world coordinate of the pixel's centre along axis ``a``."""
    pyramid = {}
    for level in levels:
        factors = level_factors(level, len(shape))
        axes = [(np.arange(-(-n // f)) + 0.5) * f for n, f in zip(shape, factors, strict=True)]
        pyramid[level] = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    return MemorySlide(pyramid, name)


def label_slide(labels: np.ndarray, levels: Sequence[Level] = (1,), name: str = "label") -> MemorySlide:
    """Nearest-neighbour pyramid of a label image."""

    def coarse(level: Level) -> np.ndarray:
        return labels[tuple(slice(None, None, int(f)) for f in level_factors(level, labels.ndim))][None]

    return MemorySlide({level: coarse(level) for level in levels}, name)
