"""One opened image with its pyramid, independent of its file format.

A slide is read window by window and never loaded whole (PNG and JPEG excepted, which cannot be decoded in part). Pixel
*i* of level *l* covers world pixels ``[i * l, (i + 1) * l)`` on every axis; coordinates have axis order (t)(z)yx. A
level that scales its axes differently, as of a stack coarsened in its planes only, is a tuple: ``(1, 4, 4)``.
"""

import copy
import hashlib
import itertools
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from muvit.data.slides.blocks import BLOCK, BlockCache, Pending
from muvit.data.slides.formats import slide_name
from muvit.errors import InputError, ReadError, first_line
from muvit.levels import Level, level_factors, level_name, plain_level

Padding = Literal["zero", "edge", "reflect"]
Palette = Literal["rgb", "index"]

_FINGERPRINT_PX = 1 << 20
_WINDOWS = 4
_WINDOW_PX = 64
_SAMPLED_LEVEL_PX = 1 << 22
_SAMPLED_WINDOWS_PER_AXIS = {1: 64, 2: 8, 3: 4, 4: 3}

_DECODING_ERRORS = (OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, zlib.error)


class Slide(ABC):
    """One opened image: read-only, windowed, picklable, and safe to use in worker processes, forked or spawned.

    Attributes:
        path: the file or folder it was opened from.
        name: file name without its image suffixes.
        axes: one letter per axis of `shape`: ``yx``, ``zyx``, ``tyx`` or ``tzyx``.
        shape: pixels of the finest level, axis order (t)(z)yx.
        num_channels: length of the channel axis of `read`.
        dtype: dtype of `read`, in native byte order (bilevel images are uint8 0 and 1).
        levels: downsampling factors relative to the finest level, the level of most pixels first;
            ``levels[0] == 1``.
        pixel_size_um: micrometers per pixel of the finest level along each spatial axis (a t axis: seconds per frame),
            or None where unknown.
        channel_names: one name per channel.
        label_names: name of each label value, as far as the file states them.
        label_colors: red, green, blue, alpha of each label value, likewise.
        has_background: whether label 0 is background; True where the file does not say otherwise.
        ignored_labels: label values that are ignored in loss and metrics, beside those that a recipe ignores.
    """

    def __init__(
        self,
        path: Path,
        *,
        level_shapes: dict[Level, tuple[int, ...]],
        num_channels: int,
        dtype: np.dtype[Any],
        pixel_size_um: tuple[float, ...] | None,
        channel_names: tuple[str, ...],
        axes: str | None = None,
    ) -> None:
        self.path = path
        self.name = slide_name(path)
        self.shape = level_shapes[1.0]
        shapes = {plain_level(level): shape for level, shape in level_shapes.items()}
        for level, shape in shapes.items():
            _check_level_shape(path, level, shape, self.shape)
        self.levels = tuple(sorted(shapes, key=self._volume))
        self._level_shapes = {level: shapes[level] for level in self.levels}
        self.axes = "tzyx"[-len(self.shape) :] if axes is None else axes
        self.num_channels = num_channels
        self.dtype = dtype.newbyteorder("=")
        self.pixel_size_um = pixel_size_um
        self.channel_names = channel_names
        self.label_names: dict[int, str] = {}
        self.label_colors: dict[int, tuple[int, ...]] = {}
        self.has_background = True
        self.ignored_labels: tuple[int, ...] = ()
        self._kept: frozenset[Level] = frozenset()
        self._cache: BlockCache | None = None

    @property
    def ndim(self) -> int:
        """Number of spatial axes (a time axis counts as one)."""
        return len(self.shape)

    @property
    def pixel_scale(self) -> tuple[float, ...]:
        """Pixels of the file's finest level along each axis of a pixel of level 1: 1, unless it was resampled."""
        return (1.0,) * self.ndim

    def state_pixel_size(self, size_um: float | Sequence[float]) -> None:
        """Set the pixel size, in place of the one that the file states or lacks.

        Args:
            size_um: micrometers per pixel of the finest level: one number for all axes, or one for each.

        Raises:
            InputError: it is not positive, or has another number of axes.
        """
        sizes = (float(size_um),) * self.ndim if isinstance(size_um, int | float) else tuple(map(float, size_um))
        if len(sizes) != self.ndim or not all(0 < size < math.inf for size in sizes):
            raise InputError("pixel_size_um", expected=f"one positive number, or {self.ndim}", got=size_um)
        self.pixel_size_um = sizes

    @property
    def stored_levels(self) -> tuple[Level, ...]:
        """Those of `levels` that the file holds; others are computed as they are read."""
        return self.levels

    def version(self) -> str | None:
        """Text that changes whenever pixels may have changed; None if nothing is known of that."""
        return None

    @property
    def block_bytes(self) -> int:
        """Size in memory of a block of 256 x 256 pixels (64 along each of three axes, 16 of four), all channels."""
        return BLOCK[self.ndim] ** self.ndim * self.num_channels * self.dtype.itemsize

    def num_blocks(self, level: Level) -> int:
        """Number of the blocks of one level."""
        return math.prod(math.ceil(n / BLOCK[self.ndim]) for n in self.level_shape(level))

    def keeping(self, levels: Sequence[Level], cache: BlockCache) -> Self:
        """This slide, with the same pixels, read block by block at some levels through a cache of decoded blocks.

        Args:
            levels: those of `levels` whose blocks are kept.
            cache: the blocks, shared with other slides or not.
        """
        slide = copy.copy(self)
        slide._kept, slide._cache = frozenset(map(plain_level, levels)), cache
        return slide

    def identify(self) -> dict[str, Any]:
        """Path, shape, channels, type, levels, pixel size and fingerprint of the file, as a JSON object.

        The fingerprint is a SHA-256 of the whole coarsest stored level, to which every pixel of a pyramid contributes
        (if it has at most a million pixels), and of windows spread over the finest level.
        """
        digest = hashlib.sha256()
        coarsest = self.stored_levels[-1]
        if math.prod(self.level_shape(coarsest)) <= _FINGERPRINT_PX:
            digest.update(self.read(coarsest, (0,) * self.ndim, self.level_shape(coarsest)).tobytes())
        size = tuple(min(_WINDOW_PX, n) for n in self.shape)
        for index in np.ndindex(*(_WINDOWS,) * self.ndim):
            axes = zip(index, self.shape, size, strict=True)
            digest.update(self.read(1, tuple(i * (n - m) // (_WINDOWS - 1) for i, n, m in axes), size).tobytes())
        return {
            "path": str(self.path.resolve()),
            "shape": list(self.shape),
            "channels": list(self.channel_names),
            "dtype": str(self.dtype),
            "levels": [level_name(level) for level in self.stored_levels],
            "pixel_size_um": None if self.pixel_size_um is None else list(self.pixel_size_um),
            "sha256": digest.hexdigest(),
        }

    def level_shape(self, level: Level) -> tuple[int, ...]:
        """Pixels of one level, axis order (t)(z)yx.

        Raises:
            InputError: the level is not stored.
        """
        level = plain_level(level)
        if level not in self._level_shapes:
            raise InputError(
                f"{self.path}, level {level_name(level)}",
                expected=f"one of its stored levels {_listed(self.levels)}",
                got=level_name(level),
                hint="`muvit convert` writes a pyramid with the levels that you name.",
            )
        return self._level_shapes[level]

    def read(
        self, level: Level, start: Sequence[int], size: Sequence[int], *, padding: Padding = "zero"
    ) -> np.ndarray[Any, Any]:
        """Read a window of one level.

        Args:
            level: one of `levels`.
            start: lower corner in pixels of that level, may lie outside the image.
            size: pixels along each axis.
            padding: pixels outside the image: ``zero``; ``edge``, the nearest pixel inside; ``reflect``, the image
                mirrored about the centres of its border pixels, as often as needed.

        Returns:
            ``(C, *size)`` in the slide's dtype, a new array.

        Raises:
            InputError: the level is not stored, or the window does not fit the slide's axes.
            ReadError: the pixels are corrupt or truncated; names file, level and window.
        """
        return self.request(level, start, size, padding=padding)()

    def request(self, level: Level, start: Sequence[int], size: Sequence[int], *, padding: Padding = "zero") -> Pending:
        """Ask for a window, as `read` reads it, without waiting for it.

        Servers and the threads of tensorstore answer several requests at once; other files are read when the result is
        called.

        Returns:
            A function, to be called once: it waits for the pixels, and raises what `read` raises of them.

        Raises:
            InputError: the level is not stored, or the window does not fit the slide's axes.
        """
        shape, level = self.level_shape(level), plain_level(level)
        start, size = tuple(int(v) for v in start), tuple(int(v) for v in size)
        if not len(start) == len(size) == self.ndim or min(size) < 1:
            raise InputError(
                f"window of {self.path}",
                expected=f"start and size of {self.ndim} whole numbers each, sizes of at least 1",
                got=f"start {start}, size {size}",
            )
        if padding not in get_args(Padding):
            raise InputError("padding", expected=f"one of {', '.join(get_args(Padding))}", got=repr(padding))
        if all(a >= 0 and a + n <= extent for a, n, extent in zip(start, size, shape, strict=True)):
            return self._request_inside(level, start, size)
        if padding == "zero":
            return self._request_zero_padded(level, start, size, shape)
        sources = [_source_index(a, n, e, padding) for a, n, e in zip(start, size, shape, strict=True)]
        inner = tuple(int(index.min()) for index in sources)
        pending = self._request_inside(
            level, inner, tuple(int(index.max()) + 1 - a for index, a in zip(sources, inner, strict=True))
        )

        def read() -> np.ndarray[Any, Any]:
            pixels = pending()
            for axis, (index, a) in enumerate(zip(sources, inner, strict=True)):
                pixels = pixels.take(index - a, axis=axis + 1)
            return pixels

        return read

    def _request_zero_padded(
        self, level: Level, start: tuple[int, ...], size: tuple[int, ...], shape: tuple[int, ...]
    ) -> Pending:
        lower = tuple(max(a, 0) for a in start)
        upper = tuple(min(a + n, extent) for a, n, extent in zip(start, size, shape, strict=True))
        extent = tuple(b - a for a, b in zip(lower, upper, strict=True))
        pending = self._request_inside(level, lower, extent) if min(extent) > 0 else None

        def read() -> np.ndarray[Any, Any]:
            pixels = np.zeros((self.num_channels, *size), self.dtype)
            if pending is not None:
                inside = tuple(slice(a - s, b - s) for a, b, s in zip(lower, upper, start, strict=True))
                pixels[(slice(None), *inside)] = pending()
            return pixels

        return read

    def _request_inside(self, level: Level, start: tuple[int, ...], size: tuple[int, ...]) -> Pending:
        stop = tuple(a + n for a, n in zip(start, size, strict=True))
        with self._reporting(level, start, stop):
            pending = (self._request_blocks if level in self._kept else self._request_window)(level, start, stop)

        def read() -> np.ndarray[Any, Any]:
            with self._reporting(level, start, stop):
                return pending()

        return read

    @contextmanager
    def _reporting(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> Iterator[None]:
        """Errors of decoding as those for users, with the name of the file, level and window."""
        try:
            yield
        except InputError:
            raise
        except _DECODING_ERRORS as error:
            raise ReadError(
                f"{self.path}, level {level_name(level)}, window {start} to {stop}",
                expected="readable pixels",
                got=first_line(error),
                hint="The file is corrupt or truncated; restore it or make it again.",
            ) from error

    def _request_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> Pending:
        """Ask for a window as `_read_window` reads it."""
        return partial(self._read_window, level, start, stop)

    @abstractmethod
    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Pixels ``(C, *(stop - start))`` of a window that lies inside a stored level, as a new array."""

    def _request_blocks(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> Pending:
        """As `_request_window`, put together from blocks on a grid, so that a pixel is the same in every window."""
        assert self._cache is not None
        edge = BLOCK[self.ndim]
        parts = []
        for index in itertools.product(*(range(a // edge, -(-b // edge)) for a, b in zip(start, stop, strict=True))):
            target, source = [slice(None)], [slice(None)]
            for i, a, b in zip(index, start, stop, strict=True):
                low, high = max(a, i * edge), min(b, (i + 1) * edge)
                target.append(slice(low - a, high - a))
                source.append(slice(low - i * edge, high - i * edge))
            parts.append((tuple(target), tuple(source), self._cache.block(self, level, index)))

        def read() -> np.ndarray[Any, Any]:
            pixels = np.empty((self.num_channels, *(b - a for a, b in zip(start, stop, strict=True))), self.dtype)
            for target, source, block in parts:
                pixels[target] = block.pixels[source]
            return pixels

        return read

    def request_block(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> Pending:
        """Ask for a block ``start`` to ``stop`` of a level, to be kept (`Slide.keeping`)."""
        return self._request_window(level, start, stop)

    def _volume(self, level: Level) -> tuple[float, tuple[float, ...]]:
        factors = level_factors(level, len(self.shape))
        return math.prod(factors), factors

    def __repr__(self) -> str:
        """File, shape, dtype and levels, for humans."""
        return (
            f"{type(self).__name__}({str(self.path)!r}, shape={self.shape}, channels={self.num_channels}, "
            f"dtype={self.dtype}, levels={_listed(self.levels)})"
        )


def _check_level_shape(path: Path, level: Level, shape: tuple[int, ...], finest: tuple[int, ...]) -> None:
    """Refuse a level that has not the pixels that its factor gives, to two of them or 1 %."""
    wanted = [n / factor for n, factor in zip(finest, level_factors(level, len(finest)), strict=True)]
    if any(abs(n - want) > max(2.0, 0.01 * want) for n, want in zip(shape, wanted, strict=True)):
        raise ReadError(
            f"{path}, level {level_name(level)}",
            expected=f"shape {tuple(map(math.ceil, wanted))}, as its factor gives",
            got=shape,
            hint="The file is corrupt, or its metadata were changed: restore it or make it again.",
        )


def sample_pixels(slide: Slide) -> np.ndarray[Any, Any]:
    """Pixels ``(C, n)`` of a slide, the same in every call.

    They are those of 8 x 8 windows of 256 x 256 pixels (in volumes, 4 x 4 x 4 of 64 x 64 x 64), evenly spread over the
    finest stored level of at most 4 million pixels, or else the coarsest.
    """
    levels = slide.stored_levels
    small = (level for level in levels if math.prod(slide.level_shape(level)) <= _SAMPLED_LEVEL_PX)
    level, most = next(small, levels[-1]), _SAMPLED_WINDOWS_PER_AXIS[slide.ndim]
    shape = slide.level_shape(level)
    size = tuple(min(BLOCK[slide.ndim], n) for n in shape)
    counts = [min(most, -(-n // m)) for n, m in zip(shape, size, strict=True)]
    starts = [[i * (n - m) // max(k - 1, 1) for i in range(k)] for n, m, k in zip(shape, size, counts, strict=True)]
    windows = [slide.read(level, start, size) for start in itertools.product(*starts)]
    return np.concatenate([pixels.reshape(slide.num_channels, -1) for pixels in windows], axis=1)


def default_channel_names(num_channels: int, dtype: np.dtype[Any]) -> tuple[str, ...]:
    """Names for channels that have none: three of uint8 are assumed to be colours."""
    if num_channels == 3 and dtype == np.uint8:
        return ("red", "green", "blue")
    return tuple(f"channel {i}" for i in range(num_channels)) if num_channels > 1 else ("intensity",)


def _source_index(start: int, size: int, extent: int, padding: Padding) -> np.ndarray[Any, Any]:
    index = np.arange(start, start + size)
    if padding == "edge" or extent == 1:
        return index.clip(0, extent - 1)
    period = 2 * (extent - 1)
    index %= period
    return np.minimum(index, period - index)


def _listed(levels: Sequence[Level]) -> str:
    return ", ".join(map(level_name, levels))
