from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muvit.data.crops.crops import GridCrops
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import CropConfig
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.errors import InputError
from muvit.geometry import is_inside
from muvit.inference.tiling.tiles import TilePlan


def make_plan(shape, crop, block, levels=(1, 4)):
    shapes = tuple(tuple(-(-extent // level) for extent in shape) for level in levels)
    return TilePlan(shapes=shapes, levels=levels, crop_size=crop, block_size=block)


@st.composite
def plans(draw):
    ndim = draw(st.integers(1, 3))
    sides = st.tuples(*[st.integers(1, 40)] * ndim)
    crops = st.tuples(*[st.integers(3, 16)] * ndim)
    return make_plan(draw(sides), draw(crops), draw(st.tuples(*[st.integers(4, 30)] * ndim)))


def cut(world, window):
    padded = np.pad(world, [(0, n) for n in window.size], constant_values=-1)
    return padded[tuple(slice(a, a + n) for a, n in zip(window.start, window.size, strict=True))]


@settings(deadline=None, max_examples=60)
@given(plans())
def test_tiles_make_the_image_and_write_each_pixel_once(plan):
    world = np.arange(np.prod(plan.shape)).reshape(plan.shape)
    times_written = np.zeros(plan.shape, int)
    for tile in plan:
        times_written[tuple(slice(a, a + n) for a, n in zip(tile.start, tile.size, strict=True))] += 1
    assert (times_written == 1).all()
    output = np.full(plan.shape, -2)
    for tile in plan:
        block = plan.block(tile.block)
        box = tuple(slice(a, a + n) for a, n in zip(block.start, block.size, strict=True))
        output[box][tile.target(block)] = cut(world, tile.windows[0])[tile.source]
    assert (output == world).all()


@settings(deadline=None, max_examples=60)
@given(plans())
def test_context_holds_the_tile_and_the_tile_stays_in_the_image(plan):
    for tile in plan:
        fine, coarse = tile.windows
        assert fine.size == coarse.size == plan.crop_size
        assert (fine.level, coarse.level) == plan.levels
        assert is_inside(fine.box, coarse.box)
        for start, size, extent in zip(fine.start, fine.size, plan.shape, strict=True):
            assert start == 0 or start + size <= extent


def test_a_grid_of_half_strides_writes_central_parts_alone():
    shapes, options = ((40, 33), (10, 9)), {"levels": (1, 4), "crop_size": (16, 16), "block_size": (20, 33)}
    plan = TilePlan(shapes=shapes, overlap=(8, 8), blend="center", half_stride=True, **options)
    assert plan.grid == (5, 5)  # the image in cells of 8 px
    written = np.zeros(plan.shape, int)
    for tile in plan:
        fine, coarse = tile.windows
        assert fine.start == tuple(8 * i - 4 for i in tile.place)
        assert is_inside(fine.box, coarse.box)
        assert all(part.start >= 4 and part.stop <= 12 for part in tile.source)
        written[tuple(slice(a, a + n) for a, n in zip(tile.start, tile.size, strict=True))] += 1
    assert (written == 1).all()
    # without overlap, tiles are whole and begin half a crop outside
    bare = TilePlan(shapes=shapes, half_stride=True, **options)
    assert [bare.cell(0, i) for i in range(bare.grid[0])] == [(0, 8), (8, 24), (24, 40)]
    assert [bare.corner(0, i) for i in range(bare.grid[0])] == [-8, 8, 24]


@pytest.mark.parametrize("placement", ["nested", "concentric", "grid", "free"])
def test_tiles_are_the_crops_that_validation_sees(tmp_path, placement):
    config = CropConfig(levels=(1, 4), size=(16, 16), normalization=Range(high=255), placement=placement)
    store = tmp_path / "image.ome.zarr"
    writer = PyramidWriter.create(store, shape=(50, 70), num_channels=1, dtype=np.uint8, levels=(1, 4))
    writer.finish()
    crops = GridCrops([(OmeZarrSlide(store), None)], config)
    plan = replace(make_plan((50, 70), (16, 16), (64, 80)), placement=placement)
    assert len(crops) == len(plan)
    for crop, tile in zip(map(crops.__getitem__, range(len(crops))), plan, strict=True):
        assert torch.equal(crop["bbox"], torch.stack([w.box for w in tile.windows]).float())


@settings(deadline=None, max_examples=30)
@given(plans(), st.integers(4, 50))
def test_what_a_pixel_sees_does_not_depend_on_the_blocks(plan, side):
    other = make_plan(plan.shape, plan.crop_size, (side,) * len(plan.shape))

    def views(some):
        return {tuple(a // n for a, n in zip(tile.start, plan.crop_size, strict=True)): tile.windows for tile in some}

    assert views(plan) == views(other)


def test_a_crop_that_divides_the_block_is_computed_once():
    plan = make_plan((1000, 700), (64, 64), (256, 256))
    assert len(plan) == 16 * 11
    assert plan.num_blocks == 4 * 3
    assert [plan.tile(i).block for i in range(len(plan))] == sorted(plan.tile(i).block for i in range(len(plan)))


def test_context_is_centred_and_stays_in_the_image():
    plan = make_plan((512, 512), (64, 64), (512, 512))
    corner, inner = plan.tile(0), plan.tile(3 * 8 + 3)
    assert corner.windows[1].start == (0, 0)
    assert inner.windows[1].start == (24, 24)  # centre (192 + 32) / 4, half a crop before it
    assert torch.equal(plan.tile(63).windows[1].box[1], torch.tensor([512.0, 512.0], dtype=torch.float64))


def test_the_plan_of_a_gigapixel_slide_is_small_and_quick_to_address():
    plan = make_plan((200_000, 300_000), (256, 256), (4096, 4096), levels=(1, 8, 32))
    assert len(plan) == 782 * 1172
    last = plan.tile(len(plan) - 1)
    assert last.windows[0].start == (200_000 - 256, 300_000 - 256)
    assert last.size == (200_000 - 781 * 256, 300_000 - 1171 * 256)
    with pytest.raises(IndexError):
        plan.tile(len(plan))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"crop_size": (64,)}, "crop_size"),
        ({"block_size": (64, 0)}, "block_size"),
        ({"levels": (4, 1)}, "levels"),
        ({"shapes": ((100, 100),)}, "shapes"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, name):
    good = {"shapes": ((100, 100), (25, 25)), "levels": (1, 4), "crop_size": (64, 64), "block_size": (64, 64)}
    TilePlan(**good)
    with pytest.raises(InputError, match=name):
        TilePlan(**good | change)
