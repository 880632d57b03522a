import math
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muvit.data.crops.placement import Placement, Window, place_views, start_range, tile_placements
from muvit.errors import InputError
from muvit.geometry import box_center, is_inside
from muvit.levels import level_factors

LEVELS = st.sampled_from([(1,), (1, 4), (1, 8, 32), (8, 32), (1, 2, 3), (2, 3, 7.5), (1, 4.25, 16.5)])


@st.composite
def scenes(draw):
    """Pixels of the image at each level (pyramids round either way), levels (per axis too), crop size."""
    ndim = draw(st.integers(1, 4))
    levels = draw(LEVELS)
    if draw(st.booleans()):
        levels = tuple((1, *(level,) * (ndim - 1)) if ndim > 1 else level for level in levels)
    shape = draw(st.lists(st.integers(1, 3000), min_size=ndim, max_size=ndim))
    rounding = draw(st.sampled_from([math.floor, math.ceil]))
    shapes = [
        [max(1, rounding(n / f)) for n, f in zip(shape, level_factors(level, ndim), strict=True)] for level in levels
    ]
    return shapes, levels, draw(st.lists(st.integers(8, 64), min_size=ndim, max_size=ndim))


def assert_nested_and_inside(windows, shapes, size):
    assert all(window.size == tuple(size) for window in windows)
    for start, n, extent in zip(windows[0].start, size, shapes[0], strict=True):
        assert min(0, extent - n) <= start <= max(0, extent - n)
    for finer, coarser, shape in zip(windows, windows[1:], shapes[1:], strict=False):
        assert is_inside(finer.box, coarser.box)
        for axis, (start, n, extent) in enumerate(zip(coarser.start, size, shape, strict=True)):
            factor = level_factors(coarser.level, len(size))[axis]
            lower, upper = (Fraction(edge) / Fraction(factor) for edge in finer.box[:, axis].tolist())
            holding = range(math.ceil(upper - n), math.floor(lower) + 1)
            inside = range(min(0, extent - n), max(0, extent - n) + 1)
            both = range(max(holding[0], inside[0]), min(holding[-1], inside[-1]) + 1)
            assert start in (both or (holding[0], holding[-1]))


@settings(max_examples=300)
@given(scenes(), st.integers(0, 2**32))
def test_sampled_crops_are_nested_inside_and_on_whole_pixels(scene, seed):
    shapes, levels, size = scene
    windows = place_views("nested", shapes, levels, size, rng=np.random.default_rng(seed)).windows
    assert [w.level for w in windows] == list(levels)
    assert_nested_and_inside(windows, shapes, size)
    for window in windows:
        factors = level_factors(window.level, len(size))
        exact = [
            [Fraction(f) * (a + k * n) for f, a, n in zip(factors, window.start, size, strict=True)] for k in (0, 1)
        ]
        assert window.box.tolist() == [[float(v) for v in corner] for corner in exact]


@settings(max_examples=200)
@given(scenes(), st.integers(0, 2**32), st.data())
def test_finest_crop_holds_the_pixel_asked_for(scene, seed, data):
    shapes, levels, size = scene
    pixel = [data.draw(st.integers(0, n - 1)) for n in shapes[0]]
    windows = place_views("nested", shapes, levels, size, rng=np.random.default_rng(seed), contains=pixel).windows
    assert all(a <= p < a + n for a, p, n in zip(windows[0].start, pixel, size, strict=True))
    assert_nested_and_inside(windows, shapes, size)


@settings(max_examples=200)
@given(scenes(), st.data())
def test_centered_context_holds_the_tile_and_stays_in_the_image(scene, data):
    shapes, levels, size = scene
    tile = [data.draw(st.integers(*start_range(n, extent))) for n, extent in zip(size, shapes[0], strict=True)]
    windows = place_views("nested", shapes, levels, size, start=tile).windows
    assert windows[0].start == tuple(tile)
    assert_nested_and_inside(windows, shapes, size)


@given(st.integers(0, 10_000), st.sampled_from([(1, 4), (1, 8, 32), (2, 6)]))
def test_context_far_from_the_border_is_centred_to_half_a_pixel(offset, levels):
    shapes = [[10**6 // level] for level in levels]
    windows = place_views("nested", shapes, levels, [64], start=[10**5 + offset]).windows
    center = box_center(windows[0].box)
    for window in windows:
        assert (box_center(window.box) - center).abs() <= window.level / 2


def test_context_at_the_corner_is_clamped_into_the_image():
    windows = place_views("nested", [[1000, 1000], [250, 250]], (1, 4), (64, 64), start=[0, 936]).windows
    assert windows[1] == Window(4, (0, 186), (64, 64))


def test_context_larger_than_the_image_holds_all_of_it():
    windows = place_views("nested", [[100, 150], [4, 5]], (1, 32), (64, 64), start=[0, 50]).windows
    assert all(a <= 0 and a + 64 >= extent for a, extent in zip(windows[1].start, (4, 5), strict=True))
    assert windows[1].slices_inside((4, 5)) == tuple(
        slice(-a, n - a) for a, n in zip(windows[1].start, (4, 5), strict=True)
    )


def test_positions_are_uniform_and_coarse_crops_are_not_centred():
    rng = np.random.default_rng(0)
    draws = [place_views("nested", [[40], [10]], (1, 4), [8], rng=rng).windows for _ in range(6000)]
    fine = np.bincount([w[0].start[0] for w in draws], minlength=33)
    assert len(fine) == 33
    assert fine.min() > 6000 / 33 * 0.7
    assert fine.max() < 6000 / 33 * 1.3
    # a fine crop at 16 ... 24 fits in coarse crops at 0, 1 and 2, all inside the image: each a third of the time
    coarse = np.bincount([w[1].start[0] for w in draws if w[0].start[0] == 16], minlength=3)
    assert len(coarse) == 3
    assert coarse.min() > coarse.sum() / 3 * 0.7


@given(st.integers(0, 2**32))
def test_same_generator_same_crops(seed):
    scene = ([[500, 700], [125, 175]], (1, 4), (32, 32))
    first, second = (place_views("nested", *scene, rng=np.random.default_rng(seed)).windows for _ in range(2))
    assert first == second


@given(st.integers(-50, 50), st.integers(1, 40), st.integers(1, 30))
def test_slices_inside_select_the_pixels_of_the_image(start, size, extent):
    (inside,) = Window(1, (start,), (size,)).slices_inside((extent,))
    positions = np.arange(start, start + size)
    np.testing.assert_array_equal(positions[inside], positions[(positions >= 0) & (positions < extent)])


def test_every_placement_keeps_the_tile_and_follows_from_it_alone():
    shapes, levels, size = [(300, 400), (75, 100), (19, 25)], (1, 4, 16), (16, 24)
    for placement in get_args(Placement):
        first, second = (place_views(placement, shapes, levels, size, start=(40, 60)) for _ in range(2))
        assert first == second
        assert first.windows[0] == Window(1, (40, 60), size)
        assert [(w.level, w.size) for w in first.windows] == [(level, size) for level in levels]
        assert torch.equal(first.boxes, torch.stack([w.box for w in first.windows]))
        assert place_views(placement, shapes, levels, size, start=(44, 60)) != first


def test_concentric_views_may_leave_the_image_and_nested_ones_stay():
    shapes = [(100, 100), (25, 25)]
    assert place_views("concentric", shapes, (1, 4), (16, 16), start=(0, 84)).windows[1].start == (-6, 15)
    assert place_views("nested", shapes, (1, 4), (16, 16), start=(0, 84)).windows[1].start == (0, 9)


def test_coarse_views_are_drawn_around_a_given_start():
    shapes, rng = [(400,), (100,)], np.random.default_rng(0)
    starts = {place_views("nested", shapes, (1, 4), (16,), start=(200,), rng=rng).windows[1].start for _ in range(200)}
    assert starts == {(a,) for a in range(38, 51)}  # all that hold pixels 50 to 53 of the coarse level


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "start: expected a first pixel, or a generator to draw it"),
        ({"placement": "centered", "start": (0,)}, "placement: expected one of nested, concentric, grid, free"),
    ],
)
def test_views_that_cannot_be_placed_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        place_views(**{"placement": "nested", "shapes": [(8,)], "levels": (1,), "size": (4,)} | arguments)


@pytest.mark.parametrize("trained", get_args(Placement))
def test_tiles_are_placed_as_in_training_first(trained):
    found = tile_placements(trained)
    assert found[0] == trained
    assert set(found) == ({"nested", "grid"} if trained in ("nested", "grid") else {trained})
