import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muvit.data.crops.placement import Window, centered_nested, sample_nested, start_range
from muvit.data.crops.sampling import EpochSampler
from muvit.errors import InputError
from muvit.geometry import box_center, is_inside, level_factors

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
    windows = sample_nested(np.random.default_rng(seed), shapes, levels, size)
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
    windows = sample_nested(np.random.default_rng(seed), shapes, levels, size, contains=pixel)
    assert all(a <= p < a + n for a, p, n in zip(windows[0].start, pixel, size, strict=True))
    assert_nested_and_inside(windows, shapes, size)


@settings(max_examples=200)
@given(scenes(), st.data())
def test_centered_context_holds_the_tile_and_stays_in_the_image(scene, data):
    shapes, levels, size = scene
    tile = [data.draw(st.integers(*start_range(n, extent))) for n, extent in zip(size, shapes[0], strict=True)]
    windows = centered_nested(tile, shapes, levels, size)
    assert windows[0].start == tuple(tile)
    assert_nested_and_inside(windows, shapes, size)


@given(st.integers(0, 10_000), st.sampled_from([(1, 4), (1, 8, 32), (2, 6)]))
def test_context_far_from_the_border_is_centred_to_half_a_pixel(offset, levels):
    shapes = [[10**6 // level] for level in levels]
    windows = centered_nested([10**5 + offset], shapes, levels, [64])
    center = box_center(windows[0].box)
    for window in windows:
        assert (box_center(window.box) - center).abs() <= window.level / 2


def test_context_at_the_corner_is_clamped_into_the_image():
    windows = centered_nested([0, 936], [[1000, 1000], [250, 250]], (1, 4), (64, 64))
    assert windows[1] == Window(4, (0, 186), (64, 64))


def test_context_larger_than_the_image_holds_all_of_it():
    windows = centered_nested([0, 50], [[100, 150], [4, 5]], (1, 32), (64, 64))
    assert all(a <= 0 and a + 64 >= extent for a, extent in zip(windows[1].start, (4, 5), strict=True))
    assert windows[1].slices_inside((4, 5)) == tuple(
        slice(-a, n - a) for a, n in zip(windows[1].start, (4, 5), strict=True)
    )


def test_positions_are_uniform_and_coarse_crops_are_not_centred():
    rng = np.random.default_rng(0)
    draws = [sample_nested(rng, [[40], [10]], (1, 4), [8]) for _ in range(6000)]
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
    first, second = (sample_nested(np.random.default_rng(seed), *scene) for _ in range(2))
    assert first == second


@given(st.integers(-50, 50), st.integers(1, 40), st.integers(1, 30))
def test_slices_inside_select_the_pixels_of_the_image(start, size, extent):
    (inside,) = Window(1, (start,), (size,)).slices_inside((extent,))
    positions = np.arange(start, start + size)
    np.testing.assert_array_equal(positions[inside], positions[(positions >= 0) & (positions < extent)])


@given(st.integers(1, 200), st.integers(1, 5), st.integers(0, 10), st.data())
def test_processes_share_an_epoch_without_overlap(num_samples, num_replicas, epoch, data):
    start = data.draw(st.integers(0, num_samples))
    samplers = [
        EpochSampler(num_samples, epoch=epoch, start=start, rank=rank, num_replicas=num_replicas)
        for rank in range(num_replicas)
    ]
    seen = [list(sampler) for sampler in samplers]
    assert {len(numbers) for numbers in seen} == {len(samplers[0])}
    together = [number for turn in zip(*seen, strict=True) for number in turn]
    first = epoch * num_samples + start
    assert together == list(range(first, first + len(together)))
    assert num_samples - start - len(together) < num_replicas


def test_epochs_do_not_repeat_and_resuming_goes_on():
    sampler = EpochSampler(10)
    first = list(sampler)
    sampler.set_epoch(1)
    assert first + list(sampler) == list(range(20))
    resumed = EpochSampler(10, epoch=1, start=7)
    resumed.set_epoch(1)  # a trainer says so at the start of every epoch
    assert list(resumed) == [17, 18, 19]
    resumed.set_epoch(2)
    assert list(resumed) == list(range(20, 30))


@pytest.mark.parametrize(
    "arguments", [{"rank": 2, "num_replicas": 2}, {"rank": -1}, {"start": 11}, {"start": -1}, {"epoch": -1}]
)
def test_sampler_out_of_range_is_refused(arguments):
    with pytest.raises(InputError, match="expected"):
        EpochSampler(10, **arguments)
