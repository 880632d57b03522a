from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_slide import label_slide, world_slide

from muvit.data.crops.augment import Augmentation
from muvit.data.crops.crops import GridCrops, NestedCrops
from muvit.data.crops.normalize import Range
from muvit.data.crops.placement import FreeViews, place_views
from muvit.data.crops.preprocessing import CropConfig, Preprocessing
from muvit.errors import InputError
from muvit.geometry import box_center, box_size, is_inside, patch_centers
from muvit.inference.tiling.tiles import TilePlan
from muvit.labels import IGNORE
from muvit.levels import level_factors

LEVELS = (1, 4)
NEAR = FreeViews(offset_px=((-150, -90), (20, 60)))
CONFIG = CropConfig(
    levels=LEVELS, size=(16, 24), normalization=Range(0, 1), num_classes=251, placement="free", free_views=NEAR
)


def slides(shape=(300, 400)):
    """An image that holds the coordinates of its pixels, and labels."""
    labels = (np.indices(shape).sum(0) % 251).astype(np.uint8)
    return [(world_slide(shape, LEVELS), label_slide(labels, LEVELS))]


def offset(windows):
    """Way from the centre of the finest view to those of the others, ``(L - 1, ndim)``."""
    centers = box_center(torch.stack([window.box for window in windows]))
    return centers[1:] - centers[0]


def pixel_centers(sample):
    space = sample["img"].shape[2:]
    return patch_centers(sample["bbox"], space).reshape(-1, *space, len(space)).movedim(-1, 1)


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    level=st.sampled_from([2, 4, 7.5, (1.0, 4.0, 4.0), (2.0, 3.0, 8.0)]),
    shape=st.tuples(*[st.integers(1, 500)] * 3),
    low=st.tuples(*[st.floats(-600, 600)] * 3),
    width=st.floats(0, 100),
)
def test_free_views_lie_in_the_image_as_far_away_as_was_asked_for(seed, level, shape, low, width):
    levels, size = (1, level, 8), (8, 16, 16)
    shapes = [[-(-n // int(f)) for n, f in zip(shape, level_factors(lv, 3), strict=True)] for lv in levels]
    free = FreeViews(offset_px=tuple((a, a + width) for a in low))
    start = [n // 2 for n in shape]
    windows = place_views(
        "free", shapes, levels, size, start=start, rng=np.random.default_rng(seed), free_views=free
    ).windows
    assert windows[0].start == tuple(start)
    for window, extents, away in zip(windows[1:], shapes[1:], offset(windows), strict=True):
        for axis, (extent, n, factor) in enumerate(zip(extents, size, level_factors(window.level, 3), strict=True)):
            lowest, highest = min(0, extent - n), max(0, extent - n)
            assert lowest <= window.start[axis] <= highest
            if lowest < window.start[axis] < highest:
                assert low[axis] - factor / 2 <= away[axis] <= low[axis] + width + factor / 2


def test_free_views_without_a_rule_lie_anywhere():
    windows = [
        place_views(
            "free",
            [(100, 200), (25, 50)],
            LEVELS,
            (16, 16),
            start=(0, 0),
            rng=np.random.default_rng(seed),
            free_views=FreeViews(),
        ).windows
        for seed in range(400)
    ]
    starts = np.array([second.start for _, second in windows])
    assert starts.min(0).tolist() == [0, 0]
    assert starts.max(0).tolist() == [25 - 16, 50 - 16]
    np.testing.assert_allclose(starts.mean(0), (4.5, 17), rtol=0.1)


@pytest.mark.parametrize("kind", [NestedCrops, GridCrops])
def test_boxes_tell_the_pixels_of_free_views(kind):
    dataset = kind(slides(), CONFIG)
    nested = 0
    for index in range(0, 200, 7):
        sample = dataset[index]
        seen = sample["img"][1] != 0
        assert torch.equal(sample["img"][0], pixel_centers(sample)[0])
        assert torch.equal(sample["img"][1][seen], pixel_centers(sample)[1][seen])
        nested += is_inside(sample["bbox"][0], sample["bbox"][1]).item()
    assert nested < 10  # where the image ends too close


def test_random_samples_depend_on_seed_and_number_and_tiles_on_their_place():
    first, second = (NestedCrops(slides(), CONFIG, seed=3) for _ in range(2))
    assert all(torch.equal(first[11][key], second[11][key]) for key in ("img", "bbox", "label"))
    assert len({tuple(offset_of(first[i])) for i in range(20)}) > 10
    grid = GridCrops([*slides(), *slides()], CONFIG)
    half = len(grid) // 2
    assert all(torch.equal(grid[i][key], grid[i + half][key]) for i in range(half) for key in ("img", "bbox"))
    assert len({tuple(offset_of(grid[i])) for i in range(half // 2, half)}) > 10


def offset_of(sample):
    return (box_center(sample["bbox"][1]) - box_center(sample["bbox"][0])).tolist()


def test_every_labelled_pixel_of_the_grid_counts_once():
    dataset = GridCrops(slides((50, 70)), replace(CONFIG, label_levels="all"))
    assert sum((dataset[i]["label"] != IGNORE).sum() for i in range(len(dataset))) == 50 * 70
    assert all(torch.equal(dataset[i]["labels"][0], dataset[i]["label"]) for i in range(len(dataset)))


@pytest.mark.parametrize("kind", [NestedCrops, GridCrops])
def test_shuffled_boxes_hide_the_place_of_free_views_and_nothing_else(kind):
    shuffled = replace(CONFIG, free_views=replace(NEAR, boxes="shuffled"))
    true, other = kind(slides(), CONFIG), kind(slides(), shuffled)
    moved = 0
    for index in range(200, 230):
        a, b = true[index], other[index]
        assert torch.equal(a["img"], b["img"])
        assert torch.equal(a["label"], b["label"])
        assert torch.equal(a["bbox"][0], b["bbox"][0])
        assert torch.equal(box_size(a["bbox"]), box_size(b["bbox"]))
        moved += not torch.equal(a["bbox"], b["bbox"])
    assert moved > 25


def test_flips_mirror_free_views_too():
    plain = NestedCrops(slides(), replace(CONFIG, label_levels="all"))
    flipped = NestedCrops(slides(), replace(CONFIG, label_levels="all"), augmentation=Augmentation.geometric())
    seen = set()
    for index in range(30):
        a, b = plain[index], flipped[index]
        away, mirrored = np.array(offset_of(a)), np.array(offset_of(b))
        np.testing.assert_array_equal(np.abs(away), np.abs(mirrored))
        axes = [axis for axis in (0, 1) if away[axis] == -mirrored[axis] != 0]
        seen.add(tuple(axes))
        assert torch.equal(b["labels"], a["labels"].flip([axis + 1 for axis in axes]))
    assert seen == {(), (0,), (1,), (0, 1)}


def test_whole_slides_have_the_free_views_of_the_grid():
    grid = GridCrops(slides((64, 96)), CONFIG)
    shapes = tuple(tuple(shape) for shape in grid.shapes[0])
    plan = TilePlan(
        shapes=shapes, levels=LEVELS, crop_size=(16, 24), block_size=(64, 96), placement="free", free_views=NEAR
    )
    assert len(plan) == len(grid)
    for number, tile in enumerate(plan):
        assert torch.equal(torch.stack([window.box for window in tile.windows]).float(), grid[number]["bbox"])
        assert (
            tile.windows
            == place_views("free", shapes, LEVELS, (16, 24), start=tile.windows[0].start, free_views=NEAR).windows
        )


def test_preprocessing_keeps_the_rule(tmp_path):
    kept = Preprocessing(
        crop_size=(16, 24),
        normalization=Range(0, 1),
        class_names=("a",),
        class_colors=((0, 0, 0),),
        placement="free",
        free_views=NEAR,
    )
    (tmp_path / "preprocessing.yaml").write_text(kept.to_yaml())
    assert Preprocessing.load(tmp_path) == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offset_px": ((5, 1), (0, 0))}, r"offset_px: expected a finite \(lowest, highest\)"),
        ({"offset_px": ((0, float("inf")), (0, 0))}, "offset_px: expected a finite"),
        ({"offset_px": ((0, 1, 2),)}, "offset_px: expected a finite"),
        ({"boxes": "naive"}, "free_views.boxes: expected true or shuffled"),
    ],
)
def test_wrong_rules_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        FreeViews(**settings)


def test_a_rule_for_other_axes_is_refused():
    with pytest.raises(InputError, match="offset_px: expected a range for each of 2 axes"):
        replace(CONFIG, free_views=FreeViews(offset_px=((0, 0),) * 3))
    shapes = ((64, 96), (16, 24))
    with pytest.raises(InputError, match="boxes of free views: expected true, as tiles are read, got shuffled"):
        TilePlan(
            shapes=shapes,
            levels=LEVELS,
            crop_size=(16, 24),
            block_size=(64, 96),
            placement="free",
            free_views=replace(NEAR, boxes="shuffled"),
        )
