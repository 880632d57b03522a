from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muvit.data.crops.placement import place_views
from muvit.geometry import is_inside


def shapes_of(shape, levels):
    return [tuple(-(-n // level) for n in shape) for level in levels]


@given(
    shape=st.tuples(st.integers(1, 900), st.integers(1, 900)),
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)).map(lambda n: (8 * n[0], 8 * n[1])),
    levels=st.sampled_from([(1, 2), (1, 4, 16), (1, 8, 32), (2, 8), (1, 3, 5), (1, 1.5)]),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_each_crop_lies_in_the_next_and_in_the_image_if_it_can(shape, size, levels, place):
    shapes = [tuple(map(int, extent)) for extent in shapes_of(shape, levels)]
    start = [round(p * max(0, n - m)) for p, n, m in zip(place, shapes[0], size, strict=True)]
    windows = place_views("grid", shapes, levels, size, start=start).windows
    assert windows[0].start == tuple(start)
    for fine, coarse in pairwise(windows):
        assert is_inside(fine.box, coarse.box)
    for window, extent in zip(windows, shapes, strict=True):
        for a, n, m in zip(window.start, window.size, extent, strict=True):
            assert a + n > 0
            assert a < m


@pytest.mark.parametrize("levels", [(1, 8, 32), (1, 4, 16)])
def test_many_tiles_share_few_coarse_crops_near_whose_centres_they_lie(levels):
    shape, size = (4096, 4096), (64, 64)
    shapes = shapes_of(shape, levels)
    tiles = [(y, x) for y in range(0, 4096, 64) for x in range(0, 4096, 64)]
    windows = {tile: place_views("grid", shapes, levels, size, start=tile).windows for tile in tiles}
    for k, level in enumerate(levels[1:], start=1):
        steps = 4096 // (level * 32)  # half-crop steps along an axis
        assert len({w[k].start for w in windows.values()}) <= steps**2
    parents = {}
    for _, middle, coarse in windows.values():
        assert parents.setdefault(middle, coarse) == coarse  # equal crops lie in equal crops
    inner = [w for (y, x), w in windows.items() if min(y, x) >= 1024 and max(y, x) < 3072]
    for fine, middle, *_ in inner:
        for a, b in zip(fine.start, middle.start, strict=True):
            assert abs((a + 32) - (b + 32) * levels[1]) <= 16 * levels[1]  # at most a quarter crop off


def test_a_coarse_level_as_large_as_its_crop_has_one():
    windows = {
        place_views("grid", [(512, 512), (64, 64)], (1, 8), (64, 64), start=(y, x)).windows[1]
        for y in (0, 300)
        for x in (0, 448)
    }
    assert [window.start for window in windows] == [(0, 0)]
