"""Slides whose pixels are computed as they are read: levels that are not stored, and pixels of another size.

Training, prediction, features and classification pass slides through `complete_slides` when they receive them, so that
all code behind them finds the levels, and the pixel size, that it needs.
"""

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from muvit.data.pyramids.ngff import Kind
from muvit.data.pyramids.reduction import reduce_window, resample_window
from muvit.data.slides.blocks import BlockCache, Pending
from muvit.data.slides.pixel_size import PIXEL_SIZE_TOLERANCE, size_name
from muvit.data.slides.slide import Padding, Slide
from muvit.errors import InputError
from muvit.levels import Level, level_factors, plain_level

_CACHED_BYTES = 64 << 20


class BlockwiseSlide(Slide):
    """A slide that computes its pixels block by block, and keeps the latest ones.

    Each process keeps up to 64 MiB of a slide, or what a cache that several share holds (`Slide.keeping`), since
    neighbouring windows of a coarse level overlap much.

    Args:
        path: the file or folder it was opened from.
        facts: as of `Slide`.
    """

    def __init__(self, path: Path, **facts: Any) -> None:
        super().__init__(path, **facts)
        self._cache = BlockCache(_CACHED_BYTES, self.block_bytes)

    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return self._request_blocks(level, start, stop)()

    def request_block(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> Pending:
        """As `Slide.request_block`."""
        return partial(self._compute_block, level, start, [b - a for a, b in zip(start, stop, strict=True)])

    @abstractmethod
    def _compute_block(self, level: Level, start: Sequence[int], size: Sequence[int]) -> np.ndarray[Any, Any]:
        """Pixels ``(C, *size)`` of a window of a level that lies inside it."""


_LOG = logging.getLogger(__name__)

_REDUCED_PIXELS = 1 << 22
_EQUAL_PX = 0.05
"""Grids that are nowhere further apart than this, in pixels, count as one."""
_COVERED = 0.01
"""Least part of a last pixel that lies in the image."""


def complete_slides(
    slides: Sequence[Slide],
    levels: Sequence[Level],
    kind: Kind = "image",
    *,
    pixel_size_um: float | Sequence[float] | None = None,
) -> list[Slide]:
    """Slides with all of these levels, computed as they are read where they are not stored; the log says so once.

    Args:
        slides: images, or labels.
        levels: the levels that are wanted.
        kind: which of the two they are.
        pixel_size_um: micrometers per pixel of level 1, one number or one for each axis; unset, those of each slide.

    Raises:
        InputError: a level is neither stored nor a whole multiple of one that is, or a slide does not state its pixel
            size.
    """
    sized = list(slides) if pixel_size_um is None else [resample(slide, pixel_size_um, kind) for slide in slides]
    completed = [with_levels(slide, levels, kind) for slide in sized]
    pairs = list(zip(slides, completed, strict=True))
    _report_sizes([(old, new) for old, new in pairs if new.pixel_scale != old.pixel_scale])
    lacking = [old.path for old, new in pairs if old is not new and new.pixel_scale == old.pixel_scale]
    if lacking:
        hint = "levels that are not stored are computed as they are read; `muvit convert --levels` would store them"
        _LOG.warning("%s: %s", _first_of(lacking), hint)
    return completed


def _report_sizes(resampled: Sequence[tuple[Slide, Slide]]) -> None:
    if not resampled:
        return
    sizes = sorted({old.pixel_size_um or () for old, _ in resampled})
    stored = " to ".join(size_name(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
    target = size_name(resampled[0][1].pixel_size_um or ())
    name = _first_of([old.path for old, _ in resampled])
    _LOG.warning("%s: read at %s um per pixel, stored at %s um", name, target, stored)
    coarse = [old.path for old, new in resampled if min(new.pixel_scale) < 1 - PIXEL_SIZE_TOLERANCE]
    if coarse:
        _LOG.warning("%s: enlarged, as its own pixels are larger than that", _first_of(coarse))


def _first_of(paths: Sequence[Path]) -> str:
    return f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def complete_slide(
    slide: Slide, levels: Sequence[Level], *, pixel_size_um: float | Sequence[float] | None = None
) -> Slide:
    """One image with all of these levels, as `complete_slides` gives it."""
    return complete_slides([slide], levels, pixel_size_um=pixel_size_um)[0]


def with_levels(slide: Slide, levels: Sequence[Level], kind: Kind = "image") -> Slide:
    """The slide itself if it has all of these levels, else one that computes those that are missing.

    Args:
        slide: an image, or labels.
        levels: the levels that are wanted.
        kind: which of the two it is.

    Raises:
        InputError: a level is neither stored nor a whole multiple of one that is.
    """
    if set(map(plain_level, levels)) <= set(slide.levels):
        return slide
    if isinstance(slide, DerivedLevels):
        return DerivedLevels(slide.slide, (*slide.levels, *levels), kind, scale=slide.scale, shape=slide.shape)
    return DerivedLevels(slide, levels, kind)


def as_stored(slide: Slide) -> Slide:
    """The slide that a file holds, without what is derived from it."""
    while isinstance(slide, DerivedLevels):
        slide = slide.slide
    return slide


def resample(slide: Slide, pixel_size_um: float | Sequence[float], kind: Kind = "image") -> Slide:
    """The slide with pixels of this size, or the slide itself where these are nowhere off its own by .05 pixels.

    Args:
        slide: an image, or labels, as it was opened.
        pixel_size_um: micrometers per pixel: one number for all axes of space, or one for each axis. Time is not
            resampled: its number (seconds) is only compared.
        kind: which of the two it is.

    Raises:
        InputError: the slide does not state its pixel size, or has another number of axes or other times.
    """
    single = isinstance(pixel_size_um, int | float)
    wanted = (float(pixel_size_um),) * slide.ndim if single else tuple(map(float, pixel_size_um))  # type: ignore
    own = slide.pixel_size_um
    if len(wanted) != slide.ndim or not all(0 < size < math.inf for size in wanted):
        expected = f"a positive number, or one for each axis of {slide.path} ({slide.axes})"
        raise InputError("pixel_size_um", expected=expected, got=pixel_size_um)
    if own is None:
        raise InputError(
            f"pixel size of {slide.path}",
            expected=f"micrometers per pixel, to read it at {size_name(wanted)} um",
            got="a file that states none",
            hint="State it (--pixel_size_um of predict, features, classify and convert; data.slide_pixel_size_um of a "
            "recipe).",
        )
    scale = [size / stored for size, stored in zip(wanted, own, strict=True)]
    if slide.axes[0] == "t":
        if not single and abs(scale[0] - 1) > PIXEL_SIZE_TOLERANCE:
            expected = f"{wanted[0]:g} s per frame (within {PIXEL_SIZE_TOLERANCE:.0%}), as time is not resampled"
            raise InputError(f"time points of {slide.path}", expected=expected, got=f"{own[0]:g} s")
        scale[0] = 1.0
    return on_grid(slide, scale, kind)


def on_grid(slide: Slide, scale: Sequence[float], kind: Kind = "image", shape: Sequence[int] | None = None) -> Slide:
    """The slide with pixels of ``scale`` times the size of its own along each axis.

    Args:
        slide: an image, or labels.
        scale: pixels of the slide that make one of the new ones, along each axis.
        kind: which of the two it is.
        shape: number of the new pixels; by default those that cover the slide.
    """
    if _are_equal(scale, slide.shape) and tuple(shape or slide.shape) == slide.shape:
        return slide
    return DerivedLevels(slide, (1,), kind, scale=scale, shape=shape)


def match_grid(labels: Slide, other: Slide) -> Slide:
    """Labels on the grid of another slide, if both state pixel sizes by which they cover one area; else as they are.

    A pixel has the label that lies at its centre, see `muvit.data.pyramids.reduction.resample_window`.
    """
    one, two = labels.pixel_size_um, other.pixel_size_um
    if labels.shape == other.shape or one is None or two is None or labels.axes != other.axes:
        return labels
    sizes = zip(labels.shape, one, other.shape, two, strict=True)
    if any(abs(n * a - m * b) > 1.5 * max(a, b) for n, a, m, b in sizes):
        return labels
    matched = on_grid(labels, [b / a for a, b in zip(one, two, strict=True)], "label", other.shape)
    return with_levels(matched, other.levels, "label")


class _Source(NamedTuple):
    """Level that another level is read or made from."""

    level: Level
    is_stored: bool
    """Whether it is a level of the slide as stored; else one that is itself derived."""
    ratio: tuple[float, ...]
    """Its pixels per pixel of the new level, along each axis."""

    @property
    def is_whole(self) -> bool:
        return all(ratio == int(ratio) for ratio in self.ratio)

    @property
    def volume(self) -> float:
        return math.prod(self.ratio)


class DerivedLevels(BlockwiseSlide):
    """A slide with further levels, or with pixels of another size.

    A level of an image is the area mean of the next finer level, stored or itself derived; one of labels the majority
    vote of the finest stored level. With pixels as stored they equal the levels that a pyramid of all these levels
    would store. With others, levels count from the new pixels, and `resample_window` tells what a pixel is whose width
    is no whole number of stored ones; stored levels that have the wanted pixels are read as they are. Blocks are
    computed piece by piece.

    Args:
        slide: the image as it is stored.
        levels: the levels that are wanted; those that are stored are read as they are.
        kind: image or labels.
        scale: stored pixels along each axis of a pixel of level 1; unset, 1.
        shape: pixels of level 1; unset, those that cover the image (a last one of which less than 1 % does is left
            out).

    Attributes:
        slide: the image as it is stored.

    Raises:
        InputError: a level is neither stored nor a whole multiple of one that is, with pixels as stored.
    """

    def __init__(
        self,
        slide: Slide,
        levels: Sequence[Level],
        kind: Kind = "image",
        *,
        scale: Sequence[float] | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        self.slide = slide
        self.kind: Kind = kind
        self.scale = (1.0,) * slide.ndim if scale is None else tuple(map(float, scale))
        self._is_scaled = any(factor != 1 for factor in self.scale)
        wanted = {1.0, *map(plain_level, levels), *(() if self._is_scaled else slide.levels)}
        shapes: dict[Level, tuple[int, ...]] = {}
        self._sources: dict[Level, _Source] = {}
        for level in sorted(wanted, key=lambda v: math.prod(level_factors(v, slide.ndim))):
            source = self._find_source(level)
            self._sources[level] = source
            extent = slide.level_shape(source.level) if source.is_stored else shapes[source.level]
            shapes[level] = tuple(_covering(n, ratio) for n, ratio in zip(extent, source.ratio, strict=True))
            if level == 1 and shape is not None:
                shapes[level] = tuple(shape)
        own = slide.pixel_size_um
        super().__init__(
            slide.path,
            level_shapes=shapes,
            num_channels=slide.num_channels,
            dtype=slide.dtype,
            pixel_size_um=None if own is None else tuple(_rounded(a * b) for a, b in zip(own, self.scale, strict=True)),
            channel_names=slide.channel_names,
            axes=slide.axes,
        )
        self.name = slide.name
        self.label_names, self.label_colors = slide.label_names, slide.label_colors
        self.has_background, self.ignored_labels = slide.has_background, slide.ignored_labels

    @property
    def pixel_scale(self) -> tuple[float, ...]:
        """As `Slide.pixel_scale`."""
        return tuple(a * b for a, b in zip(self.scale, self.slide.pixel_scale, strict=True))

    @property
    def stored_levels(self) -> tuple[Level, ...]:
        """As `Slide.stored_levels`; with other pixels than stored ones at least the finest, which is made of them."""
        if not self._is_scaled:
            return self.slide.stored_levels
        return tuple(level for level in self.levels if level == 1 or self._is_as_stored(level))

    def identify(self) -> dict[str, Any]:
        """As `Slide.identify`, of the file alone: what is computed does not count."""
        return self.slide.identify()

    def version(self) -> str | None:
        """As `Slide.version`."""
        version = self.slide.version()
        return f"{version} at {self.scale}, {self.shape}" if version and self._is_scaled else version

    def keeping(self, levels: Sequence[Level], cache: BlockCache) -> Self:
        """As `Slide.keeping`; the cache also takes the place of that of computed blocks."""
        slide = super().keeping(levels, cache)
        same = [self._sources[level].level for level in slide._kept if self._is_as_stored(level)]
        slide.slide = self.slide.keeping(same, cache)
        return slide

    def request(self, level: Level, start: Sequence[int], size: Sequence[int], *, padding: Padding = "zero") -> Pending:
        """As `Slide.request`."""
        level = plain_level(level)
        if level in self._sources and self._is_as_stored(level):
            return self.slide.request(self._sources[level].level, start, size, padding=padding)
        return super().request(level, start, size, padding=padding)

    def _is_as_stored(self, level: Level) -> bool:
        source = self._sources[level]
        is_same = source.is_stored and set(source.ratio) == {1}
        return is_same and self.level_shape(level) == self.slide.level_shape(source.level)

    def _find_source(self, level: Level) -> _Source:
        """The level that a level is made from; one that is stored is made from itself.

        Raises:
            InputError: there is none.
        """
        slide, ndim = self.slide, self.slide.ndim
        factors = [f * s for f, s in zip(level_factors(level, ndim), self.scale, strict=True)]
        stored = [
            _Source(g, True, _ratios(factors, level_factors(g, ndim), slide.level_shape(g))) for g in slide.levels
        ]
        derived = [
            _Source(g, False, _ratios(level_factors(level, ndim), level_factors(g, ndim), ())) for g in self._sources
        ]
        same = [source for source in stored if set(source.ratio) == {1}]
        finer = [
            source
            for source in (*stored, *derived)
            if min(source.ratio) >= 1 and (source.is_whole or (source.is_stored and self._is_scaled))
        ]
        if same:
            return same[0]
        if self.kind == "label":
            finer = [source for source in finer if source.is_stored] or finer
        if finer:
            return (min if self.kind == "image" else max)(finer, key=lambda source: source.volume)
        if self._is_scaled:
            return next(source for source in stored if source.level == 1)  # its pixels are larger
        slide.level_shape(level)  # refuses it, and says which are stored
        raise AssertionError

    def _compute_block(self, level: Level, start: Sequence[int], size: Sequence[int]) -> np.ndarray[Any, Any]:
        source = self._sources[level]
        slide = self.slide if source.is_stored else self
        block = np.empty((self.num_channels, *size), self.dtype)
        edge = max(int((_REDUCED_PIXELS / self.num_channels / max(source.volume, 1)) ** (1 / self.ndim)), 1)

        def read(lower: tuple[int, ...], upper: tuple[int, ...]) -> np.ndarray[Any, Any]:
            return slide.read(source.level, lower, [b - a for a, b in zip(lower, upper, strict=True)])

        extent, piece = slide.level_shape(source.level), (edge,) * self.ndim
        covered = all((a + n - 1) * r < e for a, n, r, e in zip(start, size, source.ratio, extent, strict=True))
        if source.is_whole and covered:
            ratio = tuple(map(int, source.ratio))
            reduce_window(read, start, block, ratio, self.kind, extent=extent, piece=piece)
        else:
            resample_window(read, start, block, source.ratio, self.kind, extent=extent, piece=piece)
        return block


def _ratios(factors: Sequence[float], finer: Sequence[float], extent: Sequence[int]) -> tuple[float, ...]:
    """Pixels of a finer level per pixel along each axis; whole numbers where that changes nothing along the extent."""
    extents = extent or (1 << 30,) * len(factors)
    return tuple(whole_in(factor / source, n) for factor, source, n in zip(factors, finer, extents, strict=True))


def whole_in(ratio: float, extent: int) -> float:
    """A ratio of pixel sizes, as a whole number where that moves no pixel of an extent by .05 pixels."""
    whole = round(ratio)
    return float(whole) if whole and _are_equal([ratio / whole], [extent]) else ratio


def _rounded(size: float) -> float:
    """Twelve digits, so that a size comes back from the ratio to it."""
    return float(f"{size:.12g}")


def _are_equal(scale: Sequence[float], extent: Sequence[int]) -> bool:
    return all(abs(factor - 1) * n < _EQUAL_PX for factor, n in zip(scale, extent, strict=True))


def _covering(extent: int, ratio: float) -> int:
    """Pixels of a grid that cover an extent."""
    return -(-extent // int(ratio)) if ratio == int(ratio) else max(math.ceil(extent / ratio - _COVERED), 1)
