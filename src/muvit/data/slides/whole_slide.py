"""Whole-slide formats of scanner vendors (SVS, NDPI, MRXS, SCN) as slides, through OpenSlide."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import openslide

from muvit.data.slides.formats import whole_if_near
from muvit.data.slides.slide import Slide
from muvit.errors import ReadError, first_line
from muvit.levels import Level, level_factors


class WholeSlide(Slide):
    """A file that OpenSlide reads: RGB uint8.

    World coordinates are OpenSlide's level-0 pixels of the whole scan area, even if only `bounds` were scanned. Areas
    that were not scanned have the background colour that the file states, or white. Levels get their nominal factor
    if the stored one is within 1 % of a whole number.

    Args:
        path: the file.

    Attributes:
        bounds: start and size of the scanned part in world pixels (y, x), or None where the file states none.

    Raises:
        ReadError: OpenSlide cannot read the file.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self._opened: tuple[int, openslide.OpenSlide] | None = None
        self.path = path
        slide = self._slide()
        properties = slide.properties
        factors = [whole_if_near(float(factor)) for factor in slide.level_downsamples]
        self._numbers: dict[Level, int] = {factor: number for number, factor in reversed(list(enumerate(factors)))}
        mpp = (properties.get(openslide.PROPERTY_NAME_MPP_Y), properties.get(openslide.PROPERTY_NAME_MPP_X))
        bounds = [properties.get(f"openslide.bounds-{key}") for key in ("y", "x", "height", "width")]
        background = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "FFFFFF")
        self._background = tuple(bytes.fromhex(background.lstrip("#")))
        dimensions = slide.level_dimensions
        super().__init__(
            path,
            level_shapes={factor: dimensions[number][::-1] for factor, number in self._numbers.items()},
            num_channels=3,
            dtype=np.dtype(np.uint8),
            pixel_size_um=(float(mpp[0]), float(mpp[1])) if mpp[0] and mpp[1] else None,
            channel_names=("red", "green", "blue"),
        )
        y, x, height, width = (int(value or 0) for value in bounds)
        self.bounds = None if None in bounds else ((y, x), (height, width))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _slide(self) -> openslide.OpenSlide:
        # a handle shared with a forked process would share its file position too
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), openslide.OpenSlide(self.path)
            except (openslide.OpenSlideError, OSError) as error:
                raise ReadError(self.path, expected="a slide that OpenSlide reads", got=first_line(error)) from error
        return self._opened[1]

    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        y, x = (round(a * factor) for a, factor in zip(start, level_factors(level, 2), strict=True))
        height, width = (b - a for a, b in zip(start, stop, strict=True))
        try:
            region = self._slide().read_region((x, y), self._numbers[level], (width, height))
        except openslide.OpenSlideError as error:
            raise OSError(first_line(error)) from error
        pixels = np.asarray(region).astype(np.uint16)
        alpha = pixels[..., 3:]
        # composed over the background, rounded
        mixed = (pixels[..., :3] * alpha + np.array(self._background, np.uint16) * (255 - alpha) + 127) // 255
        return np.ascontiguousarray(mixed.astype(np.uint8).transpose(2, 0, 1))
