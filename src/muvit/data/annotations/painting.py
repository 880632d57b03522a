"""Polygons painted onto the samples of a window, each sample labelled by where its centre lies."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import shapely

Array = np.ndarray[Any, Any]

_CHUNK_PX = 1 << 20


def paint_polygons(
    samples: Array, polygons: Array, values: Array, *, start: Sequence[int], step: Sequence[float]
) -> None:
    """Give the samples whose centre lies in a polygon its value; where polygons overlap, the last counts.

    Sample *i* along an axis has its centre at ``(i + 0.5) * step`` world pixels. Each edge is intersected with the rows
    of samples in world coordinates, whatever the window: a sample is the same in every window. A centre on an edge
    belongs to the polygon on its right or below it, so polygons that share an edge neither overlap nor leave a gap.

    Args:
        samples: ``(rows, columns)``, changed in place.
        polygons: ``(n,)`` shapely polygons or multipolygons, valid, points (x, y) in world pixels.
        values: ``(n,)`` of the dtype of the samples.
        start: the first row and column of the window, in samples.
        step: world pixels from one sample to the next, (y, x).
    """
    owner, row, first, stop = _spans(polygons, start, samples.shape, step)
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
    polygons: Array, start: Sequence[int], size: Sequence[int], step: Sequence[float]
) -> tuple[Array, Array, Array, Array]:
    """Runs of samples inside a polygon: its number, row, first and last column (exclusive), ordered by polygon."""
    owner, (x0, y0), (x1, y1) = _edges(polygons)
    top, bottom = (_sample_from(y, step[0]).clip(start[0], start[0] + size[0]) for y in (y0, y1))
    is_met = bottom > top
    owner, x0, y0, x1, y1, top, bottom = (values[is_met] for values in (owner, x0, y0, x1, y1, top, bottom))
    count = bottom - top
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count - top, count)
    slope = (x1 - x0) / (y1 - y0)
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


def _edges(polygons: Array) -> tuple[Array, tuple[Array, Array], tuple[Array, Array]]:
    """The edges of polygons: the polygon's number, and the (x, y) of the end above and of that below."""
    parts, polygon = shapely.get_parts(polygons, return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    first = np.flatnonzero(ring[1:] == ring[:-1])
    a, b = points[first], points[first + 1]
    is_down = (a[:, 1] <= b[:, 1])[:, None]
    upper, lower = np.where(is_down, a, b), np.where(is_down, b, a)
    return polygon[part[ring[first]]], (upper[:, 0], upper[:, 1]), (lower[:, 0], lower[:, 1])


def _sample_from(position: Array, step: float) -> Array:
    """The first sample whose centre is not before a position in world pixels."""
    return np.ceil(position / step - 0.5).astype(np.int64)
