import numpy as np
import pytest
from array_slide import ArraySlide

from muvit.inference.tiling.tiles import TilePlan
from muvit.inference.tiling.tissue import find_tissue, tiles_with_tissue


def stained(shape=(200, 240)):
    """A pink disc on glass, both a little noisy, and where it is."""
    y, x = np.indices(shape)
    disc = (y - 80) ** 2 + (x - 100) ** 2 < 40**2
    rgb = np.where(disc, np.array([230, 140, 190])[:, None, None], np.array([242, 240, 243])[:, None, None])
    return (rgb + np.random.default_rng(0).integers(-4, 5, rgb.shape)).astype(np.uint8), disc


def plan_of(shape, overlap=(0, 0), blend="linear"):
    return TilePlan(shapes=(shape,), levels=(1,), crop_size=(16, 16), block_size=(64, 64), overlap=overlap, blend=blend)


def test_stained_tissue_is_told_from_glass():
    pixels, disc = stained()
    tissue = find_tissue(ArraySlide(pixels))
    assert (tissue.level, tissue.side) == (1, "dark")
    assert (tissue.mask == disc).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_bright_tissue_is_told_from_the_dark(dtype):
    _, disc = stained()
    noise = np.random.default_rng(0).random((2, *disc.shape))
    pixels = ((3000 * disc + 100 + 50 * noise) * [[[1]], [[0.01]]]).astype(dtype)
    tissue = find_tissue(ArraySlide(pixels))
    assert tissue.side == "bright"
    assert (tissue.mask == disc).all()
    inverted = find_tissue(ArraySlide(pixels.max() - pixels), "dark")
    assert (inverted.mask == disc).mean() > 0.99


def test_a_slide_without_contrast_is_all_tissue():
    assert find_tissue(ArraySlide(np.full((3, 20, 30), 255, np.uint8))).mask.all()


def test_a_coarse_level_is_looked_at_also_where_none_is_stored(monkeypatch):
    monkeypatch.setattr("muvit.inference.tiling.tissue._OVERVIEW_PX", 60 * 60)
    pixels, disc = stained()
    for slide in (ArraySlide(pixels), ArraySlide(pixels, levels=(1, 2, 4))):
        tissue = find_tissue(slide)
        assert tissue.level == 4
        assert (tissue.mask[disc[::4, ::4]]).mean() > 0.9
        assert tissue.mask.mean() == pytest.approx(disc.mean(), rel=0.2)


@pytest.mark.parametrize("overlap", [(0, 0), (6, 6)])
@pytest.mark.parametrize("level", [1, 4])
def test_no_tile_with_tissue_is_left_out_and_none_far_from_it_is_computed(overlap, level, monkeypatch):
    pixels, disc = stained()
    monkeypatch.setattr("muvit.inference.tiling.tissue._OVERVIEW_PX", 200 * 240 // level**2)
    plan = plan_of(disc.shape, overlap)
    chosen = tiles_with_tissue(plan, find_tissue(ArraySlide(pixels)))
    for tile in plan:
        (top, bottom), (left, right) = (plan.written(axis, i) for axis, i in enumerate(tile.place))
        if disc[top:bottom, left:right].any():
            assert chosen[tile.place]
        near = disc[max(top - 2 * level, 0) : bottom + 2 * level, max(left - 2 * level, 0) : right + 2 * level]
        if not near.any():
            assert not chosen[tile.place]
    assert 0 < chosen.sum() < chosen.size / 2
