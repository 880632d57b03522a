"""Annotations of an image as its label image, painted window by window."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from muvit.data.annotations.config import AnnotationConfig
from muvit.data.annotations.painting import paint_polygons
from muvit.data.pyramids.reduction import majority
from muvit.data.slides.blockwise import BlockwiseSlide
from muvit.data.slides.slide import Slide
from muvit.labels import IGNORED, WIDE_IGNORED
from muvit.levels import Level, level_factors, plain_level

if TYPE_CHECKING:
    from shapely import STRtree

_SAMPLES = 8
"""Most samples along each axis of a coarse pixel: 64 of them vote."""


@dataclass(frozen=True, kw_only=True)
class LabelPolygons:
    """Polygons with their label values, in world pixels (x, y)."""

    polygons: np.ndarray[Any, Any]
    """``(n,)`` valid shapely polygons or multipolygons; where they overlap, the later one counts."""
    values: np.ndarray[Any, Any]
    """``(n,)`` label value of each, uint8 or uint16."""
    regions: np.ndarray[Any, Any] | None = None
    """Polygons outside of which everything is ignored; unset, everything counts."""
    unannotated: int = 0
    """Label value outside all polygons."""

    @property
    def ignored(self) -> int:
        """Label value that is ignored."""
        return IGNORED if self.values.dtype == np.uint8 else WIDE_IGNORED

    @cached_property
    def _trees(self) -> tuple["STRtree", "STRtree | None"]:
        return shapely.STRtree(self.polygons), None if self.regions is None else shapely.STRtree(self.regions)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_trees"}

    def paint(self, start: Sequence[int], size: Sequence[int], step: Sequence[float]) -> np.ndarray[Any, Any]:
        """Label values ``(*size)`` of a window of samples, see `paint_polygons`."""
        lower = [a * s for a, s in zip(start, step, strict=True)]
        upper = [(a + n) * s for a, n, s in zip(start, size, step, strict=True)]
        window = shapely.box(lower[1], lower[0], upper[1], upper[0])
        tree, region_tree = self._trees
        samples = np.full(size, self.unannotated, self.values.dtype)
        near = np.sort(tree.query(window))
        paint_polygons(samples, self.polygons[near], self.values[near], start=start, step=step)
        if region_tree is not None and self.regions is not None:
            regions = self.regions[region_tree.query(window)]
            is_inside = np.zeros(size, bool)
            paint_polygons(is_inside, regions, np.ones(len(regions), bool), start=start, step=step)
            samples[~is_inside] = self.ignored
        return samples


class AnnotationSlide(BlockwiseSlide):
    """The label image that annotations of an image stand for.

    A pixel of level 1 has the label of its centre. A coarse pixel has the label that most of its samples have, of
    equally frequent ones the lowest: those of all its finest pixels where the level is at most 8, so that it is the
    pixel that a pyramid of level 1 would store; above, those of 8 x 8 samples spread evenly over it, which can differ
    where an outline passes through the pixel.

    Args:
        path: the file of the annotations.
        image: the image that they belong to; shape, levels and pixel size are its own.
        polygons: polygons and label values.
        levels: further levels.
        config: the classes.
        colors: red, green and blue of label values.

    Attributes:
        polygons: polygons and label values.
        config: the classes; None if the polygons were made otherwise.
    """

    def __init__(
        self,
        path: Path,
        image: Slide,
        polygons: LabelPolygons,
        *,
        levels: Sequence[Level] = (),
        config: AnnotationConfig | None = None,
        colors: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        shapes: dict[Level, tuple[int, ...]] = {level: image.level_shape(level) for level in image.levels}
        for level in map(plain_level, levels):
            factors = level_factors(level, image.ndim)
            shapes.setdefault(level, tuple(math.ceil(n / f) for n, f in zip(image.shape, factors, strict=True)))
        super().__init__(
            path,
            level_shapes=shapes,
            num_channels=1,
            dtype=polygons.values.dtype,
            pixel_size_um=image.pixel_size_um,
            channel_names=("label",),
            axes=image.axes,
        )
        self.name = image.name
        self.polygons = polygons
        self.config = config
        self.label_names = {} if config is None else config.label_names
        self.label_colors = dict(colors or {})
        self.ignored_labels = (polygons.ignored,)

    def _compute_block(self, level: Level, start: Sequence[int], size: Sequence[int]) -> np.ndarray[Any, Any]:
        factors = level_factors(level, self.ndim)
        samples = [min(math.ceil(f), _SAMPLES) for f in factors]
        step = [f / s for f, s in zip(factors, samples, strict=True)]
        first = [a * s for a, s in zip(start, samples, strict=True)]
        axes = zip(self.shape, self.level_shape(level), step, samples, start, size, strict=True)
        # at the border those samples vote that lie in the image, at least one of each pixel
        counts = [
            min(n * s, max(math.ceil(extent / d - 0.5), (pixels - 1) * s + 1) - a * s)
            for extent, pixels, d, s, a, n in axes
        ]
        return majority(self.polygons.paint(first, counts, step)[None], samples)
