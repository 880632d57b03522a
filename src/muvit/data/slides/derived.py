"""Base of slides whose pixels are computed as they are read."""

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from muvit.data.pyramids.ngff import Kind
from muvit.data.pyramids.reduction import reduce_window
from muvit.data.slides.slide import BlockCache, Padding, Slide
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
        return self._read_blocks(level, start, stop)

    def _decode_block(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return self._compute_block(level, start, [b - a for a, b in zip(start, stop, strict=True)])

    @abstractmethod
    def _compute_block(self, level: Level, start: Sequence[int], size: Sequence[int]) -> np.ndarray[Any, Any]:
        """Pixels ``(C, *size)`` of a window of a level that lies inside it."""


_LOG = logging.getLogger(__name__)

_REDUCED_PIXELS = 1 << 22


def complete_slides(slides: Sequence[Slide], levels: Sequence[Level], kind: Kind = "image") -> list[Slide]:
    """Slides with all of these levels, computed as they are read where they are not stored; a warning says so once.

    Training, prediction, features and classification call this when they receive slides, so that all code behind them
    finds every level that it needs.

    Args:
        slides: images, or labels.
        levels: the levels that are wanted.
        kind: which of the two they are.

    Raises:
        InputError: a level is neither stored nor a whole multiple of one that is.
    """
    completed = [with_levels(slide, levels, kind) for slide in slides]
    lacking = [old.path for old, new in zip(slides, completed, strict=True) if old is not new]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        hint = "levels that are not stored are computed as they are read; `muvit convert --levels` would store them"
        _LOG.warning("%s%s: %s", lacking[0], more, hint)
    return completed


def complete_slide(slide: Slide, levels: Sequence[Level]) -> Slide:
    """One image with all of these levels, as `complete_slides` gives it."""
    return complete_slides([slide], levels)[0]


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
        return DerivedLevels(slide.slide, (*slide.levels, *levels), kind)
    return DerivedLevels(slide, levels, kind)


class DerivedLevels(BlockwiseSlide):
    """A slide with further levels: of an image area means of the next finer level, stored or itself derived; of labels
    majority votes of the finest level.

    They equal the levels that a pyramid of all these levels would store. Blocks are read and reduced piece by piece.

    Args:
        slide: the image as it is stored.
        levels: the levels that are wanted; those that are stored are read as they are.
        kind: image or labels.

    Attributes:
        slide: the image as it is stored.

    Raises:
        InputError: a level is neither stored nor a whole multiple of one that is.
    """

    def __init__(self, slide: Slide, levels: Sequence[Level], kind: Kind = "image") -> None:
        shapes: dict[Level, tuple[int, ...]] = {level: slide.level_shape(level) for level in slide.levels}
        self._sources: dict[Level, tuple[Level, tuple[int, ...]]] = {}
        for level in sorted(map(plain_level, levels), key=lambda v: math.prod(level_factors(v, slide.ndim))):
            if level in shapes:
                continue
            finer = [(source, ratio) for source in shapes if (ratio := _ratio(source, level, slide.ndim)) is not None]
            if not finer:
                slide.level_shape(level)  # refuses it, and says which are stored
            source, ratio = (min if kind == "image" else max)(finer, key=lambda found: math.prod(found[1]))
            self._sources[level] = source, ratio
            shapes[level] = tuple(-(-n // r) for n, r in zip(shapes[source], ratio, strict=True))
        super().__init__(
            slide.path,
            level_shapes=shapes,
            num_channels=slide.num_channels,
            dtype=slide.dtype,
            pixel_size_um=slide.pixel_size_um,
            channel_names=slide.channel_names,
            axes=slide.axes,
        )
        self.name = slide.name
        self.label_names, self.label_colors = slide.label_names, slide.label_colors
        self.has_background, self.ignored_labels = slide.has_background, slide.ignored_labels
        self.slide = slide
        self.kind: Kind = kind

    @property
    def stored_levels(self) -> tuple[Level, ...]:
        """As `Slide.stored_levels`."""
        return self.slide.stored_levels

    def identify(self) -> dict[str, Any]:
        """As `Slide.identify`, of the file alone: the levels that are computed do not count."""
        return self.slide.identify()

    def version(self) -> str | None:
        """As `Slide.version`."""
        return self.slide.version()

    def keeping(self, levels: Sequence[Level], cache: BlockCache) -> Self:
        """As `Slide.keeping`; the cache also takes the place of that of computed blocks."""
        slide = super().keeping(levels, cache)
        slide.slide = self.slide.keeping([level for level in slide._kept if level in self.slide.levels], cache)
        return slide

    def read(
        self, level: Level, start: Sequence[int], size: Sequence[int], *, padding: Padding = "zero"
    ) -> np.ndarray[Any, Any]:
        """As `Slide.read`."""
        if plain_level(level) in self.slide.levels:
            return self.slide.read(level, start, size, padding=padding)
        return super().read(level, start, size, padding=padding)

    def _compute_block(self, level: Level, start: Sequence[int], size: Sequence[int]) -> np.ndarray[Any, Any]:
        source, ratio = self._sources[level]
        block = np.empty((self.num_channels, *size), self.dtype)
        edge = max(int((_REDUCED_PIXELS / self.num_channels / math.prod(ratio)) ** (1 / self.ndim)), 1)
        reduce_window(
            lambda lower, upper: self.read(source, lower, [b - a for a, b in zip(lower, upper, strict=True)]),
            start,
            block,
            ratio,
            self.kind,
            extent=self.level_shape(source),
            piece=(edge,) * self.ndim,
        )
        return block


def _ratio(source: Level, level: Level, ndim: int) -> tuple[int, ...] | None:
    """Pixels of one level per pixel of another along each axis, if they are whole numbers."""
    pairs = zip(level_factors(source, ndim), level_factors(level, ndim), strict=True)
    ratios = [outer / factor for factor, outer in pairs]
    whole = all(ratio >= 1 and ratio == int(ratio) for ratio in ratios)
    return tuple(map(int, ratios)) if whole and max(ratios) > 1 else None
