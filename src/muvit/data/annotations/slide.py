"""Annotations as a label image whose windows are painted when they are read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from muvit.data.annotations.objects import AnnotationConfig
from muvit.data.pyramids.reduction import majority
from muvit.data.slides.derived import BlockwiseSlide
from muvit.data.slides.formats import file_version
from muvit.data.slides.slide import Slide
from muvit.labels import IGNORED, WIDE_IGNORED
from muvit.levels import Level, level_factors, plain_level

if TYPE_CHECKING:
    from shapely import STRtree

Array = np.ndarray[Any, Any]

_CHUNK_PX = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Outlines:
    """The edges of polygons, in world pixels."""

    x: Array
    """``(n,)`` of the corners of all rings, one ring after another."""
    y: Array
    """``(n,)``, likewise."""
    first: Array
    """``(m,)``: number of the corner at which each edge begins; it ends at the next one."""
    ends: Array
    """``(polygons + 1,)``: 0, and the number of edges of each polygon and all before it."""

    @classmethod
    def of(cls, polygons: Array) -> "Outlines":
        """The edges of shapely polygons or multipolygons."""
        parts, polygon = shapely.get_parts(polygons, return_index=True)
        rings, part = shapely.get_rings(parts, return_index=True)
        points, ring = shapely.get_coordinates(rings, return_index=True)
        first = np.flatnonzero(ring[1:] == ring[:-1])
        counts = np.bincount(polygon[part[ring[first]]], minlength=len(polygons))
        x, y = map(np.ascontiguousarray, points.T)
        return cls(x=x, y=y, first=first.astype(np.int32), ends=np.concatenate([[0], np.cumsum(counts)]))

    def edges(self, polygons: Array) -> tuple[Array, Array]:
        """Edges of some polygons: the place of the polygon among these, and the corner at which the edge begins."""
        counts = self.ends[polygons + 1] - self.ends[polygons]
        owner = np.repeat(np.arange(len(polygons)), counts)
        return owner, self.first[np.arange(len(owner)) + (self.ends[polygons + 1] - np.cumsum(counts))[owner]]


def paint_polygons(
    samples: Array, outlines: Outlines, near: Array, values: Array, *, start: Sequence[int], step: Sequence[float]
) -> None:
    """Give the samples whose centre lies in a polygon its value; where polygons overlap, the last counts.

    Sample *i* along an axis has its centre at ``(i + 0.5) * step`` world pixels. Each edge is intersected with the rows
    of samples in world coordinates, whatever the window: a sample is the same in every window. A centre on an edge
    belongs to the polygon on its right or below it, so polygons that share an edge neither overlap nor leave a gap.

    Args:
        samples: ``(rows, columns)``, changed in place.
        outlines: edges of valid polygons.
        near: ``(n,)`` numbers of the polygons that are painted, in their order.
        values: ``(n,)`` of the dtype of the samples.
        start: the first row and column of the window, in samples.
        step: world pixels from one sample to the next, (y, x).
    """
    owner, row, first, stop = _spans(outlines, near, start, samples.shape, step)
    flat, length = samples.reshape(-1), stop - first
    begin, end = row * samples.shape[1] + first, np.cumsum(length)
    # spans that are painted at once hold about a million samples
    cuts = np.searchsorted(end, np.arange(_CHUNK_PX, end[-1] if len(end) else 0, _CHUNK_PX))
    for part in np.split(np.arange(len(end)), cuts):
        if len(part):
            before = end[part] - length[part] - (end[part[0]] - length[part[0]])
            index = np.repeat(begin[part] - before, length[part])
            index += np.arange(len(index))
            flat[index] = np.repeat(values[owner[part]], length[part])


def _spans(
    outlines: Outlines, near: Array, start: Sequence[int], size: Sequence[int], step: Sequence[float]
) -> tuple[Array, Array, Array, Array]:
    """Runs of samples inside a polygon: its place, row, first and last column (exclusive), ordered by polygon."""
    owner, begin = outlines.edges(near)
    rows = [
        _sample_from(outlines.y[corner], step[0]).clip(start[0], start[0] + size[0]) for corner in (begin, begin + 1)
    ]
    is_met = rows[0] != rows[1]
    owner, begin, begin_row, end_row = (values[is_met] for values in (owner, begin, *rows))
    # an edge and its neighbour's that runs the other way meet a row at the same point
    is_up = begin_row > end_row
    upper, lower = begin + is_up, begin + ~is_up
    count = np.abs(end_row - begin_row)
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count - np.minimum(begin_row, end_row), count)
    x0, y0 = outlines.x[upper], outlines.y[upper]
    slope = (outlines.x[lower] - x0) / (outlines.y[lower] - y0)
    x = x0[edge] + ((row + 0.5) * step[0] - y0[edge]) * slope[edge]
    column = _sample_from(x, step[1]).clip(start[1], start[1] + size[1]) - start[1]
    # a row enters and leaves a polygon in turn: sorted, its crossings are pairs
    places = (size[0], size[1] + 1)
    crossings = np.sort((owner[edge] * places[0] + row - start[0]) * places[1] + column).reshape(-1, 2)
    line, first = np.divmod(crossings[:, 0], places[1])
    stop = crossings[:, 1] - line * places[1]
    is_seen = stop > first
    owner, row = np.divmod(line[is_seen], places[0])
    return owner, row, first[is_seen], stop[is_seen]


def _sample_from(position: Array, step: float) -> Array:
    """The first sample whose centre is not before a position in world pixels."""
    return np.ceil(position / step - 0.5).astype(np.int64)


_EXACT_LEVEL, _SAMPLES = 8, 4
"""Largest factor of an axis along which all finest pixels vote, and the number of samples that vote above it."""


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
    def _drawn(self) -> list[tuple["STRtree", Outlines]]:
        """Index and edges of the polygons, and of the regions where there are any."""
        drawn = (self.polygons,) if self.regions is None else (self.polygons, self.regions)
        return [(shapely.STRtree(polygons), Outlines.of(polygons)) for polygons in drawn]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_drawn"}

    def paint(self, start: Sequence[int], size: Sequence[int], step: Sequence[float]) -> np.ndarray[Any, Any]:
        """Label values ``(*size)`` of a window of samples, see `paint_polygons`."""
        lower = [a * s for a, s in zip(start, step, strict=True)]
        upper = [(a + n) * s for a, n, s in zip(start, size, step, strict=True)]
        window = shapely.box(lower[1], lower[0], upper[1], upper[0])
        near, *near_regions = [(outlines, np.sort(tree.query(window))) for tree, outlines in self._drawn]
        samples = np.full(size, self.unannotated, self.values.dtype)
        paint_polygons(samples, *near, self.values[near[1]], start=start, step=step)
        for outlines, regions in near_regions:
            is_inside = np.zeros(size, bool)
            paint_polygons(is_inside, outlines, regions, np.ones(len(regions), bool), start=start, step=step)
            samples[~is_inside] = self.ignored
        return samples


class AnnotationSlide(BlockwiseSlide):
    """The label image that annotations of an image stand for.

    A pixel of level 1 has the label of its centre. A coarse pixel has the label that most of its samples have, of
    equally frequent ones the lowest: those of all its finest pixels where the level is at most 8, so that it is the
    pixel that a pyramid of level 1 would store; above, those of 4 x 4 samples spread evenly over it, which can differ
    where an outline passes through the pixel: in one of about 25 such pixels.

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

    def version(self) -> str | None:
        """As `Slide.version`."""
        return None if self.config is None else f"{file_version(self.path)} {self.config}"

    def _compute_block(self, level: Level, start: Sequence[int], size: Sequence[int]) -> np.ndarray[Any, Any]:
        factors = level_factors(level, self.ndim)
        samples = [math.ceil(f) if f <= _EXACT_LEVEL else _SAMPLES for f in factors]
        step = [f / s for f, s in zip(factors, samples, strict=True)]
        first = [a * s for a, s in zip(start, samples, strict=True)]
        axes = zip(self.shape, self.level_shape(level), step, samples, start, size, strict=True)
        # at the border those samples vote that lie in the image, at least one of each pixel
        counts = [
            min(n * s, max(math.ceil(extent / d - 0.5), (pixels - 1) * s + 1) - a * s)
            for extent, pixels, d, s, a, n in axes
        ]
        return majority(self.polygons.paint(first, counts, step)[None], samples)
