from functools import reduce
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muvit.inference.tiling.blend import Neighbor, axis_weights
from muvit.inference.tiling.tiles import TilePlan


@st.composite
def plans(draw):
    ndim = draw(st.integers(1, 2))
    shape = tuple(draw(st.integers(1, 60)) for _ in range(ndim))
    crop = tuple(draw(st.integers(3, 16)) for _ in range(ndim))
    return TilePlan(
        shapes=(shape,),
        levels=(1,),
        crop_size=crop,
        block_size=tuple(draw(st.integers(4, 40)) for _ in range(ndim)),
        overlap=tuple(draw(st.integers(0, n - 1)) for n in crop),
        blend=draw(st.sampled_from(["linear", "cosine", "uniform", "center"])),
        half_stride=draw(st.booleans()),
    )


@given(plans())
def test_weights_sum_to_one_at_every_pixel_of_every_block(plan):
    for number in range(plan.num_blocks):
        block = plan.block(number)
        total = np.zeros(block.size)
        for tile in map(plan.tile, plan.tiles_of(number)):
            weights = plan.weights(tile) if plan.is_blended else [np.ones(n) for n in tile.size]
            total[tile.target(block)] += reduce(np.multiply, np.ix_(*weights))
        assert np.abs(total - 1).max() < 1e-12


@given(plans())
def test_what_a_tile_contributes_does_not_depend_on_the_blocks(plan):
    whole = TilePlan(**{**vars_of(plan), "block_size": plan.shape})
    parts = {(tile.place, pixel): w for tile in plan for pixel, w in pixel_weights(plan, tile)}
    assert parts == {(tile.place, pixel): w for tile in whole for pixel, w in pixel_weights(whole, tile)}


def vars_of(plan):
    return {name: getattr(plan, name) for name in TilePlan.__dataclass_fields__}


def pixel_weights(plan, tile):
    pixels = product(*(range(a, a + n) for a, n in zip(tile.start, tile.size, strict=True)))
    weights = product(*(w.tolist() for w in plan.weights(tile))) if plan.is_blended else ((1.0,) for _ in iter(int, 1))
    for pixel, weight in zip(pixels, weights, strict=False):
        yield pixel, float(np.prod(weight))


def test_uniform_blending_labels_a_slide_as_sums_of_the_probabilities_of_all_tiles():
    """The stitching of the winner of the KPIs challenge (arXiv 2411.04782): probabilities of tiles that overlap by half
    are added up wherever they lie, and the largest sum is the label."""
    shape, crop = (44, 37), (16, 16)
    plan = TilePlan(shapes=(shape,), levels=(1,), crop_size=crop, block_size=shape, overlap=(8, 8), blend="uniform")
    shares = np.random.default_rng(0).dirichlet(np.ones(3), (len(plan), *crop)).transpose(0, 3, 1, 2)
    sums, blended, count = np.zeros((3, *shape)), np.zeros((3, *shape)), np.zeros(shape)
    corners = [(y, x) for y in (0, 8, 16, 24, 28) for x in (0, 8, 16, 21)]
    for tile, share, (y, x) in zip(plan, shares, corners, strict=True):
        sums[:, y : y + 16, x : x + 16] += share
        count[y : y + 16, x : x + 16] += 1
        assert tile.windows[0].start == (y, x)
        blended[:, *tile.target(plan.block(0))] += share * reduce(np.multiply, np.ix_(*plan.weights(tile)))
    assert np.abs(blended - sums / count).max() < 1e-12
    assert (blended.argmax(0) == sums.argmax(0)).all()
    assert count.max() == 9  # where the last row and column were moved back into the slide


@pytest.mark.parametrize("blend", ["linear", "cosine"])
def test_a_ramp_is_smooth_symmetric_and_as_long_as_the_overlap(blend):
    weights = axis_weights(16, 6, tuple(map(Neighbor, (-10, 0, 10))), blend)
    assert (weights[6:10] == 1).all()
    assert (np.diff(weights[:7]) > 0).all()
    assert np.allclose(weights, weights[::-1])
    assert np.allclose(weights[:6] + weights[10:], 1)
    steps = np.diff(weights[:7])
    assert np.allclose(steps[1:-1], 1 / 6) if blend == "linear" else steps.argmax() in (2, 3)


def test_border_pixels_belong_to_the_only_tile_there():
    tiles = (Neighbor(0, is_first=True), Neighbor(10, is_last=True))
    assert (axis_weights(16, 6, tiles, "cosine")[:10] == 1).all()


def blended_error(shape, crop, overlap, blend="cosine"):
    """What is left along one axis of an error that every tile makes near its edges inside the image."""
    plan = TilePlan(
        shapes=((shape,),), levels=(1,), crop_size=(crop,), block_size=(shape,), overlap=(overlap,), blend=blend
    )
    pixel, total = np.arange(crop), np.zeros(shape)
    for tile in plan:
        begin, (weights,) = tile.start[0], plan.weights(tile)
        from_start, from_end = pixel + (np.inf if begin == 0 else 0), crop - 1 - pixel
        from_end = from_end + (np.inf if begin + crop == shape else 0)
        error = np.exp(-np.minimum(from_start, from_end))  # 1 at the edge, 0.37, 0.14, ... inwards
        total[begin : begin + crop] += weights * error
    return total


@pytest.mark.parametrize(("overlap", "bound"), [(16, 0.02), (32, 0.005), (48, 0.002)])
@pytest.mark.parametrize("shape", [*range(256, 290), 670, 1024])
def test_what_tiles_get_wrong_near_their_edges_leaves_no_trace(shape, overlap, bound):
    """Of an error of 1 at the edges of tiles, wherever the last tile comes to lie."""
    assert blended_error(shape, 64, overlap).max() < bound


def test_a_linear_ramp_leaves_more_of_the_edges():
    assert blended_error(256, 64, 16, "linear").max() > 2 * blended_error(256, 64, 16).max()


def test_an_average_of_equal_tiles_is_the_tile():
    plan = TilePlan(shapes=((50, 41),), levels=(1,), crop_size=(16, 16), block_size=(20, 20), overlap=(9, 9))
    world = torch.rand(50, 41, dtype=torch.float64)
    result = torch.zeros(50, 41, dtype=torch.float64)
    for tile in plan:
        block = plan.block(tile.block)
        y, x = (slice(a, a + n) for a, n in zip(tile.start, tile.size, strict=True))
        assert tile.target(block)[0].start == tile.start[0] - block.start[0]
        wy, wx = map(torch.tensor, plan.weights(tile))
        result[y, x] += wy[:, None] * wx * world[y, x]
    assert torch.allclose(result, world)
