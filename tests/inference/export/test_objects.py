import numpy as np
import pytest
import shapely
from array_slide import ArraySlide
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rasterio.features import rasterize
from scipy.ndimage import gaussian_filter
from skimage.measure import label as connected_components

from muvit.inference.export.objects import simplify, trace_objects

SHAPES = st.tuples(st.integers(1, 20), st.integers(1, 20))
LABELS = SHAPES.flatmap(lambda shape: arrays(np.int16, shape, elements=st.integers(-1, 2)))


def trace(labels, **options):
    return list(trace_objects(ArraySlide(labels), **options))


def content(objects):
    return {(o.value, o.num_pixels, o.polygon.wkt) for o in objects}


@settings(max_examples=50)
@given(LABELS, st.integers(1, 9))
def test_objects_are_the_components_of_the_labels(labels, block_px):
    objects = trace(labels, block_px=block_px)
    components = connected_components(np.maximum(labels, 0), background=0, connectivity=1)
    assert len(objects) == components.max()
    assert {o.first_pixel for o in objects} == {
        tuple(np.argwhere(components == number)[0].tolist()) for number in range(1, len(objects) + 1)
    }
    for one in objects:
        assert one.polygon.geom_type == "Polygon" and one.polygon.is_valid
        filled = rasterize([one.polygon], out_shape=labels.shape).astype(bool)
        np.testing.assert_array_equal(filled, components == components[one.first_pixel])
        assert one.value == labels[one.first_pixel]
        simple = simplify(one.polygon, 1.0)
        assert simple.is_valid and simple.geom_type == "Polygon"
        exact = simplify(one.polygon, None)
        assert exact.is_valid and shapely.get_num_coordinates(exact) < 2 * shapely.get_num_coordinates(one.polygon)
        np.testing.assert_array_equal(rasterize([exact], out_shape=labels.shape).astype(bool), filled)
    for value in (1, 2):
        areas = [(o.polygon.area, o.num_pixels) for o in objects if o.value == value]
        assert np.array(areas).reshape(-1, 2).sum(0).tolist() == [(labels == value).sum()] * 2


@settings(max_examples=50)
@given(LABELS, st.integers(1, 9), st.integers(1, 6))
def test_objects_do_not_tell_where_they_were_cut(labels, block_px, min_pixels):
    whole = trace(labels, min_pixels=min_pixels)
    assert content(trace(labels, min_pixels=min_pixels, block_px=block_px)) == content(whole)
    assert all(o.num_pixels >= min_pixels for o in whole)


def test_an_object_across_three_blocks_keeps_its_hole():
    labels = np.zeros((12, 30), np.uint8)
    labels[2:10, 3:27] = 5
    labels[4:8, 8:22] = 0
    labels[5:7, 14:16] = 5  # an island in the hole, across no seam
    ring, island = sorted(trace(labels, block_px=10), key=lambda o: -o.num_pixels)
    assert (ring.value, ring.num_pixels, ring.first_pixel) == (5, 8 * 24 - 4 * 14, (2, 3))
    assert ring.polygon.equals(shapely.box(3, 2, 27, 10) - shapely.box(8, 4, 22, 8))
    assert shapely.get_num_coordinates(ring.polygon) == 10  # no corner is left where the seams were
    assert island.polygon.equals(shapely.box(14, 5, 16, 7))


def test_arms_that_meet_in_the_last_row_are_one_object():
    labels = np.zeros((9, 9), np.uint8)
    labels[:, ::2] = 1
    labels[8] = 1
    (comb,) = trace(labels, block_px=2)
    assert comb.num_pixels == comb.polygon.area == 9 * 5 + 4


def test_pixels_that_touch_at_a_corner_are_two_objects():
    assert len(trace(np.eye(6, dtype=np.uint8), block_px=3)) == 6
    # a hole that touches the outside at a corner
    (ring,) = trace([[1, 1, 1], [1, 0, 1], [1, 1, 0]], block_px=2)
    assert ring.polygon.is_valid and ring.polygon.area == 7


def test_neighbours_of_other_values_are_not_joined():
    labels = np.repeat(np.array([[70_000, 2**31, 70_000]], np.uint32), 4, axis=0).repeat(4, axis=1)
    objects = trace(labels, block_px=4)
    assert [(o.value, o.polygon.bounds) for o in sorted(objects, key=lambda o: o.first_pixel)] == [
        (70_000, (0, 0, 4, 4)),
        (2**31, (4, 0, 8, 4)),
        (70_000, (8, 0, 12, 4)),
    ]


def test_a_large_slide_is_read_once_and_objects_leave_memory_early():
    labels = np.zeros((64, 48), np.uint8)
    labels[1::4, 1::4] = 1  # many small objects
    labels[:, 31:33] = 2  # one from top to bottom, across two columns of blocks
    slide, steps = ArraySlide(labels), []
    objects = trace_objects(slide, block_px=16, progress=lambda done, total: steps.append((done, total)))
    seen = [next(objects) for _ in range(16)]
    assert len(slide.windows) == 1 and {o.value for o in seen} == {1}
    rest = list(objects)
    assert slide.windows == [(1, (16, 16))] * 12
    assert steps == [(number, 12) for number in range(1, 13)]
    assert rest[-1].num_pixels == 128
    assert len(seen) + len(rest) == 16 * 12 + 1


def test_a_part_beyond_a_seam_counts_towards_the_size_of_an_object():
    labels = np.zeros((8, 8), np.uint8)
    labels[3, 2:6] = 1
    assert len(trace(labels, block_px=4, min_pixels=4)) == 1
    assert trace(labels, block_px=4, min_pixels=5) == []


@pytest.mark.parametrize("tolerance", [0.8, 2.0])
def test_simplified_outlines_stay_near_and_valid(tolerance):
    noise = gaussian_filter(np.random.default_rng(0).standard_normal((128, 128)), 4)
    objects = trace((noise > 0).astype(np.uint8), block_px=48)
    assert any(len(o.polygon.interiors) for o in objects)
    before, after = 0, 0
    for one in objects:
        simple = simplify(one.polygon, tolerance)
        assert simple.is_valid
        assert len(simple.interiors) == len(one.polygon.interiors)
        assert one.polygon.boundary.hausdorff_distance(simple.boundary) < 1.5 * tolerance
        before += shapely.get_num_coordinates(one.polygon)
        after += shapely.get_num_coordinates(simple)
    assert after < before / 2
