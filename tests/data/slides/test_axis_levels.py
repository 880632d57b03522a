"""Levels with a factor for each axis, from the store to the boxes of a sample."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_slide import label_slide, world_slide

from muvit.data.crops.balance import ForegroundIndex, locate_classes
from muvit.data.crops.crops import GridCrops, NestedCrops
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import CropConfig
from muvit.data.pyramids.convert import convert_image
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.open import open_slide
from muvit.encoders import MuViTEncoder3d
from muvit.errors import InputError
from muvit.geometry import box_size, is_inside, naive_boxes, patch_centers
from muvit.inference.tiling.tiles import TilePlan
from muvit.labels import IGNORE
from muvit.levels import check_levels, level_name, plain_level
from muvit.mae import MuViTMAE3d

LEVELS = (1, (1.0, 4.0, 4.0), (2.0, 8.0, 8.0))
SIZE = (6, 16, 24)
CONFIG = CropConfig(
    levels=[1, [1, 4, 4], [2, 8, 8]], size=SIZE, normalization=Range(0, 1), num_classes=251, label_levels="all"
)


def places(shape):
    z, y, x = np.indices(shape)
    return ((7 * z + 31 * y + 17 * x) % 251).astype(np.uint8)


def volumes(shape):
    return [(world_slide(shape, LEVELS), label_slide(places(shape), LEVELS))]


def pixel_centers(sample):
    return patch_centers(sample["bbox"], SIZE).reshape(-1, *SIZE, 3).movedim(-1, 1)


def assert_boxes_tell_the_sample(sample, shape):
    factors = torch.tensor([[1, 1, 1], [1, 4, 4], [2, 8, 8]])
    assert torch.equal(box_size(sample["bbox"]), factors * torch.tensor(SIZE))
    assert is_inside(sample["bbox"][:-1], sample["bbox"][1:]).all()
    truth = torch.from_numpy(places(shape)).long()
    for view, labels, place, factor in zip(
        sample["img"], sample["labels"], pixel_centers(sample), factors, strict=True
    ):
        corner = (place - factor.view(3, 1, 1, 1) / 2).long()  # the pyramid of labels keeps each block's first pixel
        inside = ((corner >= 0) & (corner < torch.tensor(shape).view(3, 1, 1, 1))).all(0)
        assert torch.equal(view, place * inside)
        assert torch.equal(labels[inside], truth[tuple(corner[:, inside])])
        assert (labels[~inside] == IGNORE).all()


@settings(max_examples=30)
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 200), st.integers(1, 200)), index=st.integers(0, 10**9))
def test_boxes_tell_every_pixel_and_label_of_nested_crops(shape, index):
    assert_boxes_tell_the_sample(NestedCrops(volumes(shape), CONFIG)[index], shape)


def test_tiles_of_a_plan_are_those_of_the_grid_and_cover_the_volume_once():
    shape = (15, 50, 70)
    grid = GridCrops(volumes(shape), CONFIG)
    plan = TilePlan(
        shapes=tuple(map(tuple, grid.shapes[0])), levels=CONFIG.levels, crop_size=SIZE, block_size=shape, blend="center"
    )
    seen = np.zeros(shape, int)
    for tile, number in zip(plan, range(len(grid)), strict=True):
        boxes = torch.stack([window.box for window in tile.windows]).float()
        assert torch.equal(boxes, grid[number]["bbox"])
        assert is_inside(boxes[:-1], boxes[1:]).all()
        seen[tuple(slice(a, a + n) for a, n in zip(tile.start, tile.size, strict=True))] += 1
    assert (seen == 1).all()


def test_levels_are_lists_or_tuples_and_are_plain_where_axes_agree():
    assert CONFIG.levels == LEVELS
    assert plain_level([4, 4, 4]) == plain_level(4) == 4
    assert plain_level((1, 4, 4)) == (1.0, 4.0, 4.0)
    assert [level_name(level) for level in ([1, 1], (1, 2.5, 4), 8)] == ["1", "1x2.5x4", "8"]
    encoder = MuViTEncoder3d(in_channels=1, levels=[1, [1, 4, 4]], patch_size=4, dim=24, heads=2, num_layers=1)
    assert encoder.levels == (1, (1.0, 4.0, 4.0))
    assert encoder.extract_levels([[1, 4, 4]]).levels == ((1.0, 4.0, 4.0),)


@pytest.mark.parametrize("levels", [[1, [1, 4]], [1, [0, 4, 4]], [1, [1, 4, 4], (1, 4, 4)], [[4, 4, 4], 4]])
def test_levels_that_do_not_fit_are_refused(levels):
    for make in (
        lambda: MuViTEncoder3d(in_channels=1, levels=levels, patch_size=4, dim=24, heads=2, num_layers=1),
        lambda: MuViTMAE3d(in_channels=1, levels=levels, patch_size=4, dim=24, heads=2, num_layers=1),
        lambda: CropConfig(levels=levels, size=SIZE),
    ):
        with pytest.raises(InputError, match="level"):
            make()
    with pytest.raises(InputError, match="ascending"):
        check_levels([(2, 2, 2), (1, 4, 4)], 3)  # neither is the coarser one


def test_models_see_the_true_extent_of_every_axis(tmp_path):
    encoder = MuViTEncoder3d(in_channels=1, levels=[1, [1, 4, 4]], patch_size=(2, 4, 4), dim=24, heads=2, num_layers=1)
    x = torch.randn(1, 2, 1, 4, 8, 8)
    boxes = torch.tensor([[[0, 0, 0], [4, 8, 8]], [[0, -8, 0], [4, 24, 32]]], dtype=torch.float32)[None]
    coarse = encoder.place(x, boxes)[0][0, 8:].reshape(2, 2, 2, 3)
    assert coarse[:, 0, 0, 0].tolist() == [1, 3]
    assert coarse[0, :, 0, 1].tolist() == [0, 16]
    naive = encoder.place(x)[0][0]
    centered = naive_boxes(encoder.levels, (4, 8, 8))
    assert box_size(centered).tolist() == [[4, 8, 8], [4, 32, 32]]
    assert torch.equal(naive, patch_centers(centered, (2, 2, 2)).flatten(0, 1))
    encoder.save(tmp_path / "model")
    restored = MuViTEncoder3d.from_folder(tmp_path / "model")
    assert restored.config == encoder.config
    assert torch.equal(restored(x, boxes)[0], encoder(x, boxes)[0])


def test_an_autoencoder_masks_and_restores_such_views():
    model = MuViTMAE3d(
        in_channels=1, levels=[1, [1, 4, 4]], patch_size=(2, 4, 4), dim=24, heads=2, num_layers=1, dim_decoder=24
    )
    x = torch.randn(2, 2, 1, 4, 8, 8)
    boxes = naive_boxes(model.levels, (4, 8, 8)).expand(2, 2, 2, 3)
    for consistent in (False, True):
        result = model(x, boxes, consistent_levels=consistent)
        result["loss"].backward()
        assert torch.isfinite(result["loss"])


@pytest.mark.parametrize("level", [1, (1, 2, 2)])
def test_foreground_is_found_where_it_is(level, monkeypatch):
    for limit in ("_MAX_READ_PX", "_MAX_SCANNED_PX"):
        monkeypatch.setattr(f"muvit.data.crops.balance.{limit}", 400)
    labels = np.zeros((9, 40, 60), np.uint8)
    labels[4:6, 8:16, 32:48] = 2
    slide = label_slide(labels, (1, (1, 2, 2), (1, 4, 4)))
    found = locate_classes(0, slide, level)
    assert {entry.value for entry in found} == {0, 2}
    assert next(entry for entry in found if entry.value == 2).area == pytest.approx(2 * 8 * 16, rel=0.6)
    index = ForegroundIndex([slide], found, level=level, balance="foreground")
    rng = np.random.default_rng(0)
    step = 1 if level == 1 else 2
    drawn = np.array([index.draw(rng)[1] for _ in range(200)])
    assert (labels[:, ::step, ::step][tuple(drawn.T)] == 2).all()
    assert len(np.unique(drawn, axis=0)) > 20


def test_a_conversion_writes_such_levels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (1, 6, 40, 48), dtype=np.uint8)
    writer = PyramidWriter.create(
        tmp_path / "flat.ome.zarr", shape=(6, 40, 48), num_channels=1, dtype=np.uint8, levels=[1]
    )
    writer.write((0, 0, 0), pixels)
    writer.finish()
    slide = open_slide(convert_image(tmp_path / "flat.ome.zarr", tmp_path / "deep.ome.zarr", levels=[1, (1, 4, 4)]))
    assert slide.levels == (1, (1, 4, 4))
    expected = np.floor(pixels.reshape(6, 10, 4, 12, 4).mean((2, 4)) + 0.5)
    np.testing.assert_array_equal(slide.read((1, 4, 4), (0, 0, 0), (6, 10, 12))[0], expected)
    for levels in ([1, (1, 4)], [1, (1, 4, 4), (2, 6, 8)], [1, (1, 4, 4), (1, 4, 4)], [(1, 2, 2)]):
        with pytest.raises(InputError, match="level"):
            convert_image(tmp_path / "flat.ome.zarr", tmp_path / "wrong.ome.zarr", levels=levels)
