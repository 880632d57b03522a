"""Painted polygons against those of GDAL, whose rule is the same, and against the geometry itself."""

import numpy as np
import pytest
import shapely
from rasterio.features import rasterize

from muvit.data.annotations.slide import Outlines, paint_polygons

SIZE = (90, 110)


def blobs(rng, offset=0.0, count=30):
    """Valid polygons with a hole, of many shapes, in and around a window of `SIZE`."""
    polygons = []
    while len(polygons) < count:
        angle = np.sort(rng.random(20)) * 2 * np.pi
        radius = 25 * (0.4 + rng.random(20))
        center = rng.random(2) * 120 - 5
        points = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None] + center + offset
        polygon = shapely.Polygon(points)
        if polygon.is_valid:
            polygons.append(polygon - polygon.centroid.buffer(4))
    return np.array(polygons, object)


def painted(polygons, values, start=(0, 0), size=SIZE, step=(1.0, 1.0)):
    samples = np.zeros(size, np.uint8)
    paint_polygons(samples, Outlines.of(polygons), np.arange(len(polygons)), values, start=start, step=step)
    return samples


@pytest.mark.parametrize("offset", [0, 1_000_000, 50_000_000])
def test_pixels_are_labelled_by_their_centre_and_the_last_polygon_counts(offset):
    rng = np.random.default_rng(0)
    polygons = blobs(rng, offset)
    values = np.arange(1, len(polygons) + 1, dtype=np.uint8)
    moved = shapely.transform(polygons, lambda points: points - offset)
    expected = rasterize(list(zip(moved, values.tolist(), strict=True)), out_shape=SIZE, dtype="uint8")
    np.testing.assert_array_equal(painted(polygons, values, (offset, offset)), expected)


def test_a_window_shows_what_the_whole_shows():
    polygons, values = blobs(np.random.default_rng(1)), np.arange(1, 31, dtype=np.uint8)
    whole = painted(polygons, values)
    for start, size in (((0, 0), (7, 9)), ((13, 40), (50, 1)), ((80, 100), (10, 10))):
        inside = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        np.testing.assert_array_equal(painted(polygons, values, start, size), whole[inside])


def test_samples_may_be_coarser_or_finer_than_pixels():
    polygons, values = blobs(np.random.default_rng(2)), np.arange(1, 31, dtype=np.uint8)
    step = (2.5, 0.5)
    samples = painted(polygons, values, (2, 20), (20, 60), step)
    rows, columns = np.meshgrid((np.arange(20) + 2.5) * step[0], (np.arange(60) + 20.5) * step[1], indexing="ij")
    expected = np.zeros_like(samples)
    for polygon, value in zip(polygons, values, strict=True):
        expected[shapely.contains_xy(polygon, columns, rows)] = value
    np.testing.assert_array_equal(samples, expected)


def test_polygons_that_share_edges_through_centres_neither_overlap_nor_leave_gaps():
    corner = np.array([(0, 0), (9, 0), (9, 9), (0, 9)]) + 0.5
    triangles = np.array([shapely.Polygon(corner[[0, 1, 2]]), shapely.Polygon(corner[[2, 3, 0]])], object)
    one, other = (painted(triangles[[i]], np.ones(1, np.uint8), size=(10, 10)) for i in range(2))
    whole = painted(np.array([shapely.Polygon(corner)], object), np.ones(1, np.uint8), size=(10, 10))
    np.testing.assert_array_equal(one + other, whole)
    assert whole.sum() == 81


def test_many_spans_are_painted_in_pieces(monkeypatch):
    polygons, values = blobs(np.random.default_rng(3)), np.arange(1, 31, dtype=np.uint8)
    whole = painted(polygons, values)
    monkeypatch.setattr("muvit.data.annotations.slide._CHUNK_PX", 64)
    np.testing.assert_array_equal(painted(polygons, values), whole)


def test_no_polygon_paints_nothing():
    assert not painted(np.empty(0, object), np.empty(0, np.uint8)).any()
