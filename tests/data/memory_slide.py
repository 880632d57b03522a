"""A slide that lives in memory, for tests: what a reader must be, in a few lines."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from muvit.data.slides import Slide


class MemorySlide(Slide):
    def __init__(self, pyramid: dict[float, np.ndarray], name: str = "memory") -> None:
        finest = pyramid[1]
        super().__init__(
            Path(name),
            level_shapes={float(level): pixels.shape[1:] for level, pixels in pyramid.items()},
            num_channels=len(finest),
            dtype=finest.dtype,
            pixel_size_um=None,
            channel_names=tuple(f"channel {i}" for i in range(len(finest))),
        )
        self.pyramid = {float(level): pixels for level, pixels in pyramid.items()}
        self.windows: list[tuple[float, tuple[int, ...]]] = []

    def _read_window(self, level: float, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray:
        self.windows.append((level, tuple(b - a for a, b in zip(start, stop, strict=True))))
        inside = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        return self.pyramid[level][(slice(None), *inside)].copy()


def world_slide(shape: Sequence[int], levels: Sequence[int], name: str = "world") -> MemorySlide:
    """Channel ``a`` of every pixel holds the world coordinate of the pixel's centre along axis ``a``."""
    pyramid = {}
    for level in levels:
        axes = [(np.arange(-(-n // level)) + 0.5) * level for n in shape]
        pyramid[level] = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    return MemorySlide(pyramid, name)


def label_slide(labels: np.ndarray, levels: Sequence[int] = (1,), name: str = "label") -> MemorySlide:
    """Nearest-neighbour pyramid of a label image."""
    return MemorySlide({level: labels[(slice(None, None, level),) * labels.ndim][None] for level in levels}, name)
