"""Whole-slide formats of scanner vendors, and DICOM, as slides, through OpenSlide."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import openslide

from muvit.data.slides.formats import DICOM_SUFFIX, whole_if_near
from muvit.data.slides.slide import Slide
from muvit.errors import InputError, ReadError, first_line
from muvit.levels import Level, level_factors


class WholeSlide(Slide):
    """A file that OpenSlide reads: RGB uint8.

    World coordinates are OpenSlide's level-0 pixels of the whole scan area, even if only `bounds` were scanned. Areas
    that were not scanned have the background colour that the file states, or white. Levels get their nominal factor
    if the stored one is within 1 % of a whole number.

    Args:
        path: the file; of DICOM, any file of the slide (those of one series lie in one folder), or the folder.
        series: of a DICOM folder that holds several slides, the number of the one that is opened, in the order of the
            names of their first files.

    Attributes:
        bounds: start and size of the scanned part in world pixels (y, x), or None where the file states none.

    Raises:
        ReadError: OpenSlide cannot read the file.
        InputError: the series is not there.
    """

    def __init__(self, path: str | Path, *, series: int | None = None) -> None:
        path = Path(path)
        self._opened: tuple[int, openslide.OpenSlide] | None = None
        self.path = path
        self._file = _first_file(path, series) if path.is_dir() else path
        if series not in (None, 0) and not path.is_dir():
            raise InputError(f"series of {path}", expected="0, as there is a single one", got=series)
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
                self._opened = os.getpid(), openslide.OpenSlide(self._file)
            except (openslide.OpenSlideError, OSError) as error:
                raise ReadError(self._file, expected="a slide that OpenSlide reads", got=first_line(error)) from error
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


def is_scanner_tiff(path: Path) -> bool:
    """Whether a TIFF file is of a scanner whose pyramid only OpenSlide puts together (Philips, Ventana, Leica)."""
    try:
        return openslide.OpenSlide.detect_format(path) in _SCANNER_TIFFS
    except (openslide.OpenSlideError, OSError):  # a TIFF file that only others read
        return False


_SCANNER_TIFFS = ("philips", "ventana", "leica")


def _first_file(folder: Path, series: int | None) -> Path:
    """The first file of a slide in a folder of DICOM files.

    Raises:
        ReadError: OpenSlide reads no file in it.
        InputError: there are several slides and none is chosen, or there is no such one.
    """
    found: dict[str, Path] = {}
    problem = "no file"
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() == DICOM_SUFFIX):
        try:
            with openslide.OpenSlide(file) as slide:
                found.setdefault(slide.properties.get("dicom.SeriesInstanceUID", str(file)), file)
        except (openslide.OpenSlideError, OSError) as error:
            problem = first_line(error)
    if not found:
        raise ReadError(folder, expected="DICOM files of a slide that OpenSlide reads", got=problem)
    if series is None and len(found) > 1:
        raise InputError(
            folder,
            expected="the files of one slide",
            got=f"those of {len(found)}: {', '.join(file.name for file in found.values())}",
            hint="Name one of these files, or its number (--series).",
        )
    if not 0 <= (series or 0) < len(found):
        raise InputError(f"series of {folder}", expected=f"a number from 0 to {len(found) - 1}", got=series)
    return list(found.values())[series or 0]
