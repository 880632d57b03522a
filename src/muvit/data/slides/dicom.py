"""DICOM slides that OpenSlide does not read (concatenations, sparse tiles), through wsidicom (``muvit[dicom]``)."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from muvit.data.slides.formats import DICOM_SUFFIX, file_version, whole_if_near
from muvit.data.slides.slide import Slide, default_channel_names
from muvit.errors import InputError, ReadError, first_line, require_package
from muvit.levels import Level


class DicomSlide(Slide):
    """A slide in DICOM files: RGB or grey, 8 bits.

    Args:
        path: a file of the slide, or the folder of its files.
        series: number of the pyramid, where the files hold several.

    Raises:
        ReadError: wsidicom cannot read the files.
        InputError: wsidicom is not installed, or there is no such pyramid.
    """

    def __init__(self, path: str | Path, *, series: int | None = None) -> None:
        path = Path(path)
        self.path = path
        self._opened: tuple[int, Any] | None = None
        self._pyramid = series or 0
        pyramids = self._slide().pyramids
        if not 0 <= self._pyramid < len(pyramids):
            raise InputError(f"series of {path}", expected=f"a number from 0 to {len(pyramids) - 1}", got=series)
        levels = list(pyramids[self._pyramid])
        finest = levels[0]
        factors = [whole_if_near(finest.size.width / level.size.width) for level in levels]
        self._numbers: dict[Level, int] = dict(zip(factors, (level.level for level in levels), strict=True))
        num_channels = finest.default_instance.image_data.samples_per_pixel
        size = finest.mpp
        super().__init__(
            path,
            level_shapes={f: (level.size.height, level.size.width) for f, level in zip(factors, levels, strict=True)},
            num_channels=num_channels,
            dtype=np.dtype(np.uint8),
            pixel_size_um=None if size is None else (float(size.height), float(size.width)),
            channel_names=default_channel_names(num_channels, np.dtype(np.uint8)),
        )

    def version(self) -> str:
        """As `Slide.version`."""
        return file_version(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _slide(self) -> Any:
        # a handle shared with a forked process would share its file position too
        if self._opened is None or self._opened[0] != os.getpid():
            require_package("wsidicom", str(self.path), package="wsidicom", install="'muvit[dicom]'")
            from wsidicom import WsiDicom

            folder = self.path if self.path.is_dir() else self.path.parent
            files = sorted(file for file in folder.iterdir() if file.suffix.lower() == DICOM_SUFFIX)
            try:
                self._opened = os.getpid(), WsiDicom.open(files)
            except _errors() as error:
                raise ReadError(self.path, expected="DICOM files of a slide", got=first_line(error)) from error
        return self._opened[1]

    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        size = (stop[1] - start[1], stop[0] - start[0])
        try:
            region = self._slide().read_region((start[1], start[0]), self._numbers[level], size, pyramid=self._pyramid)
        except _errors() as error:
            raise OSError(first_line(error)) from error
        pixels = np.asarray(region, np.uint8)
        return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))


def _errors() -> tuple[type[Exception], ...]:
    """Errors of wsidicom, whose own have no common base."""
    from wsidicom import errors

    own = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, ValueError, OSError, RuntimeError)
