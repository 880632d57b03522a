"""PNG and JPEG files as slides of one level."""

import logging
import os
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from muvit.data.slides.formats import file_version
from muvit.data.slides.slide import Palette, Slide, default_channel_names
from muvit.errors import ReadError, first_line
from muvit.levels import Level

_LOG = logging.getLogger(__name__)

_DECODED_BYTES = 1 << 30
_STREAM_CACHE_BYTES = 256 << 20
_ROWS = 512
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "I;16", "I;16L", "I;16B", "I", "F")


class RasterSlide(Slide):
    """A PNG or JPEG file.

    Such a file cannot be decoded from the middle. Up to 1 GiB of pixels the first read decodes it whole and keeps it:
    of all raster slides in a process, the latest ones of together 1 GiB stay decoded. A larger one is streamed row by
    row, so that memory stays bounded; each read that goes back begins at the first row, which a warning says once. Read
    in order, as conversion does, it is decoded once. The colours of a streamed JPEG can differ a little at edges, as
    another decoder enlarges them.

    Transparency is dropped: the colours are those stored, also where a pixel is fully transparent. A colour table gives
    RGB, or with ``palette="index"`` the stored indices. Bilevel images are 0 and 1. Physical sizes are unknown (the
    dots per inch in such files refer to printing). Pillow's limit on the number of pixels is lifted on purpose:
    this package is made for large images.

    Args:
        path: the file.
        palette: pixels of an image with a colour table.

    Raises:
        ReadError: the file is no such image.
    """

    def __init__(self, path: str | Path, *, palette: Palette = "rgb") -> None:
        path = Path(path)
        with _opened(path) as image:
            mode, (width, height) = image.mode, image.size
            deep = image.format == "PNG" and mode in ("LA", "RGB", "RGBA") and _png_bit_depth(path) == 16
        if mode not in _MODES:
            raise ReadError(path, expected="a grey, RGB or palette image", got=f"colour mode {mode}")
        # Pillow reduces colour PNGs of 16 bits to 8
        self._is_deep = deep
        self._expands = mode in ("P", "PA") and palette == "rgb"
        num_channels = 3 if mode.startswith("RGB") or self._expands else 1
        dtype = np.dtype(np.uint16 if deep else {"I": np.int32, "F": np.float32}.get(mode[:4], np.uint8))
        dtype = np.dtype(np.uint16) if mode.startswith("I;16") else dtype
        super().__init__(
            path,
            level_shapes={1.0: (height, width)},
            num_channels=num_channels,
            dtype=dtype,
            pixel_size_um=None,
            channel_names=("red", "green", "blue") if num_channels == 3 else default_channel_names(1, dtype),
        )
        self._decoded: Image.Image | np.ndarray[Any, Any] | None = None
        self._opened: tuple[int, Any] | None = None
        self._colors = _color_table(path) if self._expands else None
        self._is_streamed = self._decoded_bytes() > _DECODED_BYTES
        if self._is_streamed:
            hint = "`muvit convert` makes a pyramid of it, which is read at any place"
            _LOG.warning("%s: streamed from its first row on, as it is larger than 1 GiB; %s", path, hint)

    def version(self) -> str:
        """As `Slide.version`."""
        return file_version(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_decoded": None, "_opened": None}

    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        if self._is_streamed:
            return self._read_streamed(start, stop)
        if self._decoded is None:
            self._decoded = self._decode()
            _keep(self, self._decoded_bytes())
        pixels = np.empty((self.num_channels, *(b - a for a, b in zip(start, stop, strict=True))), self.dtype)
        # some rows at a time: Pillow copies the pixels that it returns, more than once
        for row in range(start[0], stop[0], _ROWS):
            part = self._rows((row, start[1]), (min(row + _ROWS, stop[0]), stop[1]))
            part = part.reshape(*part.shape[:2], -1)[..., : self.num_channels]
            pixels[:, row - start[0] : row - start[0] + len(part)] = part.transpose(2, 0, 1)
        return pixels

    def _read_streamed(self, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        import rasterio

        bands = 1 if self._colors is not None else list(range(1, self.num_channels + 1))
        with rasterio.Env(GDAL_CACHEMAX=_STREAM_CACHE_BYTES):  # else 5 % of all memory, once and for all
            pixels: np.ndarray[Any, Any] = self._stream().read(bands, window=tuple(zip(start, stop, strict=True)))
        return pixels if self._colors is None else np.ascontiguousarray(self._colors[pixels].transpose(2, 0, 1))

    def _stream(self) -> Any:
        # a handle shared with a forked process would share its file position too
        if self._opened is None or self._opened[0] != os.getpid():
            import rasterio

            # nothing but the file itself is read
            alone = rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED="NO")
            with alone, warnings.catch_warnings():
                warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
                opened = rasterio.open(self.path, driver="PNG" if self.path.suffix.lower() == ".png" else "JPEG")
            self._opened = os.getpid(), opened
        return self._opened[1]

    def _rows(self, start: tuple[int, int], stop: tuple[int, int]) -> np.ndarray[Any, Any]:
        if isinstance(self._decoded, np.ndarray):
            return self._decoded[start[0] : stop[0], start[1] : stop[1]]
        assert self._decoded is not None
        with _without_pixel_limit():
            image = self._decoded.crop((start[1], start[0], stop[1], stop[0]))
        return np.asarray(image.convert("RGB") if self._expands else image)

    def _decode(self) -> Image.Image | np.ndarray[Any, Any]:
        if self._is_deep:
            import imagecodecs

            return np.asarray(imagecodecs.png_decode(self.path.read_bytes()))
        with _opened(self.path) as image:
            _check_chunks(image)
        with _opened(self.path) as image:
            image.load()
            return image

    def _decoded_bytes(self) -> int:
        pixel = self.dtype.itemsize
        if self.num_channels == 3 and not self._expands:
            pixel = 6 if self._is_deep else 4  # Pillow stores colours of 8 bits in 4 bytes
        return self.shape[0] * self.shape[1] * pixel


_kept: "OrderedDict[int, tuple[weakref.ref[RasterSlide], int]]" = OrderedDict()


def _keep(slide: RasterSlide, size: int) -> None:
    """Register the decoded image of a slide; drop the oldest ones while all together exceed the limit."""
    for key in [key for key, (other, _) in _kept.items() if other() is None]:
        del _kept[key]
    _kept[id(slide)] = (weakref.ref(slide), size)
    while len(_kept) > 1 and sum(held for _, held in _kept.values()) > _DECODED_BYTES:
        _, (other, _) = _kept.popitem(last=False)
        oldest = other()
        if oldest is not None:
            oldest._decoded = None


@contextmanager
def _without_pixel_limit() -> Iterator[None]:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _opened(path: Path) -> Image.Image:
    try:
        with _without_pixel_limit():
            return Image.open(path, formats=("PNG", "JPEG"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ReadError(path, expected="a PNG or JPEG image", got=first_line(error)) from error


def _color_table(path: Path) -> np.ndarray[Any, Any]:
    """Red, green and blue of each index ``(256, 3)`` of an image with a colour table."""
    with _opened(path) as image:
        table = np.frombuffer(bytes(image.getpalette() or ()), np.uint8).reshape(-1, 3)
    return np.concatenate([table, np.zeros((256 - len(table), 3), np.uint8)])


def _check_chunks(image: Image.Image) -> None:
    """Compare the chunks of a PNG with their checksums, which Pillow does not do when it decodes pixels."""
    try:
        image.verify()
    except SyntaxError as error:
        raise ValueError(first_line(error)) from error


def _png_bit_depth(path: Path) -> int:
    # byte 24 of every PNG: 8 of signature, 8 of chunk header, 4 of width, 4 of height
    with path.open("rb") as stream:
        return stream.read(25)[24]
