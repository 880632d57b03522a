"""An image in memory as a slide, for tests."""

from pathlib import Path

import numpy as np

from muvit.data.slides.slide import Slide


class ArraySlide(Slide):
    """Pixels ``(C, *space)`` or labels ``space`` at level 1, every ``factor``-th of them at the others.

    Attributes:
        windows: level and size of everything that was read.
    """

    def __init__(self, pixels, *, levels=(1,), name="labels", pixel_size_um=None, bounds=None):
        pixels = np.asarray(pixels)
        pixels = pixels[None] if pixels.ndim == 2 else pixels
        steps = {level: (slice(None), *(slice(None, None, level),) * (pixels.ndim - 1)) for level in levels}
        self.pyramid = {float(level): pixels[step] for level, step in steps.items()}
        super().__init__(
            Path(name),
            level_shapes={level: stored.shape[1:] for level, stored in self.pyramid.items()},
            num_channels=len(pixels),
            dtype=pixels.dtype,
            pixel_size_um=pixel_size_um,
            channel_names=tuple(f"channel {i}" for i in range(len(pixels))),
        )
        self.bounds = bounds
        self.windows = []

    def _read_window(self, level, start, stop):
        self.windows.append((level, tuple(b - a for a, b in zip(start, stop, strict=True))))
        return self.pyramid[level][(slice(None), *map(slice, start, stop))].copy()
