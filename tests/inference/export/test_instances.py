import numpy as np
import pytest
import shapely
from array_slide import ArraySlide
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import gaussian_filter
from skimage.measure import label as connected_components

from muvit.errors import InputError
from muvit.inference.export.instances import CleanedLabels, CleaningConfig, fill_holes, smooth_labels, split_mask
from muvit.inference.export.labelled import LabelledImage
from muvit.inference.export.objects import split_object, trace_objects

SHAPES = st.tuples(st.integers(3, 24), st.integers(3, 24))
LABELS = SHAPES.flatmap(lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 2)))


def discs(shape, *centres, radius=10):
    y, x = np.indices(shape)
    return np.any([np.hypot(y - a, x - b) < radius for a, b in centres], axis=0)


@settings(max_examples=40)
@given(LABELS, st.integers(0, 3), st.integers(0, 4), st.data())
def test_cleaned_pixels_do_not_tell_the_window_they_were_read_in(labels, radius, width, data):
    cleaned = CleanedLabels(ArraySlide(labels), smooth_px=radius, fill_px=width)
    whole = cleaned.read(1, (0, 0), labels.shape)[0]
    start = [data.draw(st.integers(0, n - 1)) for n in labels.shape]
    size = [data.draw(st.integers(1, n - a)) for n, a in zip(labels.shape, start, strict=True)]
    window = cleaned.read(1, start, size)[0]
    np.testing.assert_array_equal(window, whole[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))])


@settings(max_examples=40)
@given(LABELS, st.integers(1, 3))
def test_smoothing_takes_the_value_with_the_largest_share(labels, radius):
    shares = [
        gaussian_filter((labels == v).astype(float), radius / 2, radius=radius, mode="constant") for v in range(3)
    ]
    np.testing.assert_array_equal(smooth_labels(labels, radius), np.argmax(shares, axis=0))


def test_smoothing_removes_specks_and_keeps_edges():
    labels = np.zeros((20, 20), np.uint8)
    labels[:, 10:] = 2
    expected = labels.copy()
    labels[5, 5], labels[14, 15] = 1, 0
    np.testing.assert_array_equal(smooth_labels(labels, 3), expected)


def test_holes_of_background_inside_one_value_are_filled_up_to_a_width():
    labels = np.zeros((12, 40), np.uint8)
    labels[1:11, 1:20] = 3
    labels[4:7, 4:7] = 0  # 3 x 3, with an island of the same value
    labels[5, 5] = 3
    labels[3:5, 10:15] = 0  # 2 x 5
    labels[8, 8], labels[9, 9] = 0, 0  # joined at a corner: 2 x 2
    labels[2, 19] = 0  # open to the outside
    labels[1:11, 25:38] = 4
    labels[5:7, 28:30], labels[5, 30] = 0, 1  # between two values
    filled = labels.copy()
    filled[4:7, 4:7] = filled[8:10, 8:10] = 3
    np.testing.assert_array_equal(fill_holes(labels, 3, lowest=1), filled)
    filled[3:5, 10:15] = 3
    np.testing.assert_array_equal(fill_holes(labels, 5, lowest=1), filled)
    np.testing.assert_array_equal(fill_holes(labels, 5, lowest=0), labels)  # nothing is background


def test_touching_discs_are_split_at_their_neck_and_long_objects_stay_whole():
    mask = discs((40, 60), (20, 15), (20, 33), (20, 51))
    assert connected_components(mask).max() == 1
    parts = split_mask(mask, 12)
    assert parts.max() == 3 and (parts > 0).sum() == mask.sum()
    assert len({parts[20, x] for x in (15, 33, 51)}) == 3
    necks = np.flatnonzero(np.diff(parts[20])[1:-1]) + 1
    assert len(necks) >= 2 and all(min(abs(x - 24), abs(x - 42)) <= 1 for x in necks if 10 < x < 55)
    assert split_mask(mask, 25).max() == 2  # the middle one is too near
    assert split_mask(np.ones((12, 90), bool), 12).max() == 1


@settings(max_examples=30)
@given(LABELS, st.integers(1, 6))
def test_the_parts_of_an_object_are_connected_and_add_up_to_it(labels, distance):
    shares = np.stack([labels * 7 % 11, labels + 1]).astype(np.uint8)
    for whole in trace_objects(ArraySlide(labels), measured=ArraySlide(shares)):
        parts = split_object(whole, distance, ArraySlide(shares))
        assert shapely.union_all([part.polygon for part in parts]).equals(whole.polygon)
        assert sum(part.num_pixels for part in parts) == whole.num_pixels
        assert all(part.polygon.is_valid and part.polygon.area == part.num_pixels for part in parts)
        assert tuple(map(sum, zip(*(part.sums for part in parts), strict=True))) == whole.sums
        assert {part.value for part in parts} == {whole.value}


@settings(max_examples=30)
@given(LABELS, st.integers(2, 9))
def test_sums_are_those_of_the_pixels_wherever_blocks_are_cut(labels, block_px):
    shares = np.random.default_rng(0).random((2, *labels.shape)).astype(np.float16)
    components = connected_components(labels, background=0, connectivity=1)
    for one in trace_objects(ArraySlide(labels), measured=ArraySlide(shares), block_px=block_px):
        inside = components == components[one.first_pixel]
        assert one.sums == tuple(shares[:, inside].astype(np.float64).sum(axis=1))


def test_distances_in_micrometers_need_a_pixel_size_and_have_a_limit():
    labels = ArraySlide(np.zeros((8, 8), np.uint8), pixel_size_um=(0.5, 2.0))
    source = LabelledImage(labels=labels)
    assert CleaningConfig().clean(source) is labels
    cleaned = CleaningConfig(smooth_um=2.5, fill_holes_um=4).clean(source)
    cleaned.read(1, (0, 0), (1, 1))
    assert labels.windows[-1][1] == (8, 8)  # 3 and 4 pixels around it
    with pytest.raises(InputError, match="smooth_um: expected labels with a pixel size"):
        CleaningConfig(smooth_um=1).clean(LabelledImage(labels=ArraySlide(np.zeros((8, 8), np.uint8))))
    with pytest.raises(InputError, match="at most 1024 label pixels together, got 1100"):
        CleaningConfig(fill_holes_um=1100).clean(source)
    with pytest.raises(InputError, match="smooth_um"):
        CleaningConfig(smooth_um=-1)
