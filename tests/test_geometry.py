import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muvit.errors import InputError, ShapeError
from muvit.geometry import (
    box_center,
    box_size,
    check_boxes,
    clip_boxes,
    flip_boxes,
    is_inside,
    naive_boxes,
    nearest_patches,
    nested_start_range,
    patch_centers,
    recenter,
    scale_boxes,
    shift_boxes,
    transpose_boxes,
    window_to_box,
)
from muvit.levels import check_levels, level_factors

OFFSETS = st.integers(-(10**7), 10**7)


@st.composite
def crops(draw, min_ndim=1):
    """Boxes of one crop per level, far from the origin too: boxes (L, 2, ndim) float64, grid, patch size."""
    ndim = draw(st.integers(min_ndim, 4))
    grid = draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim))
    patch = draw(st.sampled_from([2, 4, 8]))
    levels = sorted(draw(st.sets(st.integers(1, 32), min_size=1, max_size=3)))
    size = [patch * n for n in grid]
    boxes = [
        window_to_box([o // level for o in draw(st.lists(OFFSETS, min_size=ndim, max_size=ndim))], size, level)
        for level in levels
    ]
    return torch.stack(boxes), grid, patch


def test_level_factors_of_one_number_and_of_one_per_axis():
    assert level_factors(4, 3) == (4.0, 4.0, 4.0)
    assert level_factors((1, 2, 2.5), 3) == (1.0, 2.0, 2.5)


@pytest.mark.parametrize("level", [0, -1, math.nan, math.inf, (1, 2), (1, 2, 0)])
def test_level_factors_refuses_what_is_no_factor(level):
    with pytest.raises(InputError, match="level"):
        level_factors(level, 3)


@pytest.mark.parametrize("levels", [(1,), (1, 8, 32), [1, 1.5], [(1, 2, 2), (1, 4, 4)]])
def test_check_levels_accepts_ascending_levels(levels):
    check_levels(levels, 3)


@pytest.mark.parametrize("levels", [(), (4, 1), (1, 4, 4), [(1, 2, 2), (2, 1, 2)]])
def test_check_levels_refuses_disorder_and_repetition(levels):
    with pytest.raises(InputError, match="ascending"):
        check_levels(levels, 3)


def test_check_boxes_accepts_boxes():
    boxes = torch.tensor([[0.0, -5.0], [1.0, 3.0]]).expand(7, 3, 2, 2)
    check_boxes(boxes)
    check_boxes(boxes, num_levels=3, ndim=2)


@pytest.mark.parametrize(
    ("shape", "require"),
    [((2,), {}), ((3, 3), {}), ((3, 2, 2), {"num_levels": 2}), ((2, 2), {"num_levels": 2}), ((3, 2, 2), {"ndim": 3})],
)
def test_check_boxes_refuses_shapes(shape, require):
    with pytest.raises(ShapeError, match=r"expected shape \(\.\.\., "):
        check_boxes(torch.ones(shape), **require)


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        ((0, 0), (4, 0), "lower .0.0, 0.0., upper .4.0, 0.0."),
        ((0, 5), (4, 4), "above"),
        ((0, math.nan), (4, 4), "finite"),
        ((0, 0), (4, math.inf), "finite"),
    ],
)
def test_check_boxes_refuses_empty_inverted_and_non_finite(lower, upper, message):
    good = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    boxes = torch.stack([good, torch.tensor([lower, upper], dtype=torch.float32)])
    with pytest.raises(InputError, match=message):
        check_boxes(boxes)


@given(
    start=st.lists(OFFSETS, min_size=3, max_size=3),
    size=st.lists(st.integers(1, 512), min_size=3, max_size=3),
    level=st.one_of(st.integers(1, 64), st.tuples(st.integers(1, 4), st.just(2.5), st.just(32))),
)
def test_window_covers_level_times_size_world_pixels(start, size, level):
    box = window_to_box(start, size, level)
    factors = torch.tensor(level_factors(level, 3), dtype=torch.float64)
    assert torch.equal(box_size(box), factors * torch.tensor(size))
    assert torch.equal(box[0], factors * torch.tensor(start))


def test_patch_centers_of_a_small_crop_by_hand():
    box = torch.tensor([[10.0, 100.0], [26.0, 148.0]])
    expected = torch.tensor([[14.0, 108.0], [14, 124], [14, 140], [22, 108], [22, 124], [22, 140]])
    assert torch.equal(patch_centers(box, (2, 3)), expected)


@given(crops(), st.data())
def test_coarse_patch_center_is_the_mean_of_the_fine_ones_it_covers(crop, data):
    boxes, grid, _ = crop
    box, ndim = boxes[0], len(grid)
    ratio = data.draw(st.integers(2, 4 if ndim < 4 else 2))
    coarse = patch_centers(box, grid).reshape(*grid, ndim)
    # the same box seen `ratio` times finer: ratio^ndim fine patches to each coarse one
    fine = patch_centers(box, [ratio * n for n in grid]).reshape(*(m for n in grid for m in (n, ratio)), ndim)
    assert torch.allclose(fine.mean(dim=tuple(range(1, 2 * ndim, 2))), coarse, rtol=0, atol=1e-6)


@given(crops())
def test_patch_centers_in_float32_are_exact_far_away(crop):
    boxes, grid, _ = crop  # even patches: their centres are whole numbers
    assert torch.equal(patch_centers(boxes.float(), grid).double(), patch_centers(boxes, grid))


@given(crops())
def test_patch_centers_lie_half_a_patch_inside_the_box_and_one_patch_apart(crop):
    boxes, grid, _ = crop
    centers = patch_centers(boxes, grid).reshape(len(boxes), *grid, len(grid))
    step = box_size(boxes) / torch.tensor(grid)
    origin = (slice(None), *(0,) * len(grid))
    assert torch.equal(centers[origin], boxes[:, 0] + step / 2)
    assert torch.equal(centers[:, *(-1,) * len(grid)], boxes[:, 1] - step / 2)
    for axis, n in enumerate(grid):
        gaps = centers[..., axis].diff(dim=1 + axis)
        assert torch.equal(gaps, step[:, axis].reshape(-1, *(1,) * len(grid)).expand_as(gaps)) or n == 1


def test_corner_spacing_reaches_from_edge_to_edge():
    box = torch.tensor([[0.0, 8.0], [64.0, 16.0]])
    centers = patch_centers(box, (3, 1), spacing="corner")
    assert torch.equal(centers, torch.tensor([[0.0, 8.0], [32.0, 8.0], [64.0, 8.0]]))


@given(crops(), st.data())
def test_flips_commute_with_patch_centers(crop, data):
    boxes, grid, _ = crop
    axes = data.draw(st.lists(st.integers(0, len(grid) - 1), unique=True))
    about = box_center(boxes[0])
    centers = patch_centers(boxes, grid).reshape(len(boxes), *grid, len(grid))
    mirrored = centers.clone()
    mirrored[..., axes] = 2 * about[axes] - centers[..., axes]
    mirrored = mirrored.flip([1 + axis for axis in axes]).flatten(1, -2)
    flipped = flip_boxes(boxes, axes, about)
    assert torch.equal(patch_centers(flipped, grid), mirrored)
    assert torch.equal(flipped[0], boxes[0])
    assert torch.equal(flip_boxes(flipped, axes, about), boxes)


@given(crops(min_ndim=2))
def test_transposition_commutes_with_patch_centers(crop):
    boxes, grid, patch = crop
    grid = [*grid[:-2], grid[-1], grid[-1]]
    boxes[:, 1] = boxes[:, 0] + patch * torch.tensor(grid)
    about = box_center(boxes[0])
    centers = patch_centers(boxes, grid).reshape(len(boxes), *grid, len(grid))
    relative = (centers - about).transpose(-3, -2)
    expected = about + torch.cat([relative[..., :-2], relative[..., -1:], relative[..., -2:-1]], dim=-1)
    turned = transpose_boxes(boxes, (-2, -1), about)
    assert torch.equal(patch_centers(turned, grid), expected.flatten(1, -2))
    assert torch.equal(turned[0], boxes[0])
    assert torch.equal(transpose_boxes(turned, (-2, -1), about), boxes)


@given(crops(), st.data())
def test_shifts_commute_with_patch_centers(crop, data):
    boxes, grid, _ = crop
    offset = torch.tensor(data.draw(st.lists(OFFSETS, min_size=len(grid), max_size=len(grid))), dtype=torch.float64)
    assert torch.equal(patch_centers(shift_boxes(boxes, offset), grid), patch_centers(boxes, grid) + offset)


@given(crops(), st.sampled_from([0.5, 1.0, 2.0]))
def test_scaling_keeps_the_center_and_multiplies_extents(crop, factor):
    boxes, _, _ = crop
    about = box_center(boxes[0])
    scaled = scale_boxes(boxes, factor, about)
    assert torch.equal(box_size(scaled), factor * box_size(boxes))
    assert torch.equal(box_center(scaled) - about, factor * (box_center(boxes) - about))


def test_naive_boxes_are_centred_on_the_origin():
    boxes = naive_boxes([1, 8, (2, 4)], (64, 32))
    assert torch.equal(box_size(boxes), torch.tensor([[64.0, 32.0], [512.0, 256.0], [128.0, 128.0]]))
    assert torch.equal(box_center(boxes), torch.zeros(3, 2))


def test_naive_boxes_of_the_release_run_from_first_to_last_pixel_center():
    assert torch.equal(
        naive_boxes([1, 8], (64,), spacing="corner"), torch.tensor([[[-31.5], [31.5]], [[-252.0], [252.0]]])
    )


@given(crops())
def test_clipped_boxes_lie_in_the_bounds_and_boxes_inside_stay(crop):
    boxes, grid, _ = crop
    bounds = torch.stack([torch.full((len(grid),), -1000.0), torch.full((len(grid),), 5e6)]).double()
    clipped = clip_boxes(boxes, bounds)
    assert is_inside(clipped, bounds).all()
    inside = is_inside(boxes, bounds)
    assert torch.equal(clipped[inside], boxes[inside])
    outside = ((boxes[:, 1] <= bounds[0]) | (boxes[:, 0] >= bounds[1])).any(-1)
    assert (box_size(clipped[outside]) == 0).any(-1).all()


def test_is_inside_allows_touching_edges_only():
    outer = torch.tensor([[0.0, 0.0], [8.0, 8.0]])
    assert is_inside(outer, outer)
    assert not is_inside(torch.tensor([[0.0, 0.0], [8.0, 9.0]]), outer)
    assert not is_inside(torch.tensor([[-1.0, 0.0], [8.0, 8.0]]), outer)


@given(crops(), st.data())
def test_recentred_boxes_do_not_depend_on_where_the_sample_lies(crop, data):
    boxes, grid, _ = crop
    boxes = recenter(boxes).clamp(-(10**5), 10**5)
    offset = torch.tensor(data.draw(st.lists(OFFSETS, min_size=len(grid), max_size=len(grid)))).float()
    assert torch.equal(
        recenter((boxes.float() + offset).expand(2, *boxes.shape)), boxes.float().expand(2, *boxes.shape)
    )


@settings(max_examples=300)
@given(
    factor=st.integers(1, 8),
    ratio=st.integers(1, 8),
    size=st.integers(1, 24),
    extent=st.integers(1, 200),
    rounding=st.sampled_from([math.floor, math.ceil]),
    data=st.data(),
)
def test_nested_starts_are_all_that_hold_the_finer_crop_inside_the_image(factor, ratio, size, extent, rounding, data):
    outer_factor = factor * ratio
    fine, coarse = (max(1, rounding(extent / f)) for f in (factor, outer_factor))
    start = data.draw(st.integers(min(0, fine - size), max(0, fine - size)))
    low, high = nested_start_range(start, factor, outer_factor, size, coarse)
    lower, upper = start * factor, (start + size) * factor
    span = range(-200, 300)
    holding = [j for j in span if j * outer_factor <= lower and upper <= (j + size) * outer_factor]
    inside = [j for j in holding if min(0, coarse - size) <= j <= max(0, coarse - size)]
    assert holding  # whole-numbered ratios always nest
    if inside:
        assert (low, high) == (inside[0], inside[-1])
    else:
        assert low == high
        assert low in holding


def test_nested_start_of_a_crop_too_small_to_nest_centres_it():
    # 2 px of level 3 = [3, 9); 2 px of level 4 span 8 px and start at 0, 4, 8: none holds it
    assert nested_start_range(1, 3, 4, 2, 100) == (1, 1)
    assert nested_start_range(1, 3, 4, 2, 100) != nested_start_range(5, 3, 4, 2, 100)


def test_equal_factors_nest_only_in_place():
    assert nested_start_range(5, 2.5, 2.5, 16, 100) == (5, 5)


@given(st.data())
@settings(max_examples=30)
def test_nearest_patches_cover_a_box_inside_or_lie_at_the_border(data):
    ndim = data.draw(st.integers(1, 4))
    grid = data.draw(st.lists(st.integers(1, 6), min_size=ndim, max_size=ndim))
    pitch, size = data.draw(st.sampled_from([4, 24])), data.draw(st.integers(1, 60))
    start = torch.tensor(data.draw(st.lists(OFFSETS, min_size=ndim, max_size=ndim)), dtype=torch.float64)
    shift = torch.tensor(data.draw(st.lists(st.integers(-40, 120), min_size=ndim, max_size=ndim)), dtype=torch.float64)
    outer = torch.stack([start, start + pitch * torch.tensor(grid)])
    box = torch.stack([start + shift, start + shift + size])
    count = [min(n, math.ceil(size / pitch) + 1) for n in grid]
    chosen = nearest_patches(box[None], outer[None], grid, count)[0]
    assert torch.equal(nearest_patches(box - start, outer - start, grid, count), chosen)
    assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == math.prod(count)
    places = patch_centers(outer, grid)[chosen]
    lower, upper = places.amin(0) - pitch / 2, places.amax(0) + pitch / 2
    assert torch.equal((upper - lower) / pitch, torch.tensor(count, dtype=torch.float64))
    assert (lower <= torch.maximum(box[0], outer[0]).minimum(outer[1] - pitch)).all()
    assert (upper >= torch.minimum(box[1], outer[1]).maximum(outer[0] + pitch)).all()
