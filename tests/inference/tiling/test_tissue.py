import json

import numpy as np
import pytest
import shapely
from array_slide import ArraySlide
from scipy.ndimage import gaussian_filter
from skimage.data import immunohistochemistry

from muvit.errors import ExistsError, InputError
from muvit.inference.tiling.region import read_region, write_region
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


TISSUE = (slice(150, 662), slice(100, 612))
"""Where the section lies on the glass."""


def section():
    """A real section, brown and blue (DAB, haematoxylin), on grey glass with a white margin."""
    pixels = np.full((800, 900, 3), 255.0)
    pixels[40:, 30:] = (240, 238, 239)
    pixels[TISSUE] = immunohistochemistry() * (np.array([240, 238, 239]) / 255)
    return pixels


def painted(pixels, rows, columns, color, soft=3.0):
    """The picture with a mark of this colour, and where it covers what is below."""
    cover = np.zeros(pixels.shape[:2])
    cover[rows, columns] = 1
    cover = gaussian_filter(cover, soft)
    return pixels * (1 - cover[..., None]) + cover[..., None] * np.array(color), cover > 0.7


def tissue_of(pixels):
    return find_tissue(ArraySlide(np.moveaxis(pixels.round().astype(np.uint8), -1, 0)), "stained").mask


PENS = {"blue": (34, 50, 115), "faded blue": (39, 72, 139), "green": (20, 110, 60), "black": (22, 20, 23)}
"""Ink as scanned: the blue ones and the black are from a marked section."""


@pytest.mark.parametrize("pen", PENS)
def test_ink_is_no_tissue_and_leaves_the_rest_as_it_was(pen):
    clean = tissue_of(section())
    strokes = [(slice(60, 90), slice(100, 700)), (slice(60, 720), slice(700, 740)), (slice(120, 300), slice(80, 120))]
    pixels, is_ink = section(), np.zeros(clean.shape, bool)
    for rows, columns in strokes:
        pixels, covered = painted(pixels, rows, columns, PENS[pen])
        is_ink |= covered
    found = tissue_of(pixels)
    assert found[is_ink].mean() < 0.005
    far = gaussian_filter(is_ink.astype(float), 6) < 1e-3
    assert (found == clean)[far].mean() > 0.995
    assert clean[TISSUE].mean() > 0.4  # there was something to lose


def test_grey_background_dust_and_shadows_are_no_tissue():
    pixels, _ = painted(section(), slice(300, 420), slice(680, 800), (150, 149, 150), soft=10)
    outside = np.ones(pixels.shape[:2], bool)
    outside[TISSUE] = False
    outside = gaussian_filter(outside.astype(float), 3) > 0.999
    assert not tissue_of(pixels)[outside].any()
    dark = find_tissue(ArraySlide(np.moveaxis(pixels.round().astype(np.uint8), -1, 0)), "dark").mask
    assert dark[330:390, 710:770].all()  # brightness alone takes the shadow for tissue


def test_folds_are_tissue_and_do_not_hide_pale_tissue():
    pale = np.full((400, 600, 3), 244.0)
    pale[50:350, 50:550] = (232, 208, 222)
    is_tissue = tissue_of(pale)
    folded = pale.copy()
    folded[50:350, 200:260] = 255 * (folded[50:350, 200:260] / 255) ** 6  # light passes many layers
    assert (tissue_of(folded) == is_tissue).mean() > 0.99
    assert is_tissue[55:345, 55:545].all()
    assert is_tissue.mean() == pytest.approx(300 * 500 / (400 * 600), rel=0.02)


@pytest.mark.parametrize("channels, dtype", [(1, np.uint8), (3, np.uint16)])
def test_only_rgb_of_8_bits_is_stained(channels, dtype):
    with pytest.raises(InputError, match="expected RGB of 8 bits and 2 axes, for tissue stained, got"):
        find_tissue(ArraySlide(np.zeros((channels, 20, 30), dtype)), "stained")


@pytest.mark.parametrize("level", [1, 3, 4])
def test_polygons_are_the_pixels_of_the_mask_and_return_from_geojson(level, monkeypatch, tmp_path):
    pixels, _ = stained((197, 239))
    slide = ArraySlide(pixels, levels=(1, level) if level > 1 else (1,))
    monkeypatch.setattr("muvit.inference.tiling.tissue._OVERVIEW_PX", 200 * 240 // level**2)
    tissue = find_tissue(slide)
    assert tissue.level == level
    outlines = tissue.polygons(slide.shape)
    area = shapely.union_all(outlines)
    y, x = ((np.arange(n) + 0.5) for n in slide.shape)
    inside = shapely.contains_xy(area, *np.meshgrid(x, y))
    rows, columns = (
        np.minimum(np.arange(n) // level, m - 1) for n, m in zip(slide.shape, tissue.mask.shape, strict=True)
    )
    np.testing.assert_array_equal(inside, tissue.mask[np.ix_(rows, columns)])
    write_region(outlines, slide, tmp_path / "tissue.geojson")
    assert shapely.from_wkt(read_region(str(tmp_path / "tissue.geojson"), slide)).symmetric_difference(area).area < 1e-6
    properties = json.loads((tmp_path / "tissue.geojson").read_text())["features"][0]["properties"]
    assert properties["classification"] == {"name": "Tissue", "color": [0, 158, 115]}
    with pytest.raises(ExistsError):
        write_region(outlines, slide, tmp_path / "tissue.geojson")


def test_polygons_count_from_the_scanned_part_of_a_slide(tmp_path):
    pixels, _ = stained()
    slide = ArraySlide(pixels)
    slide.bounds = ((30, 50), (100, 120))
    write_region([shapely.box(60, 40, 80, 50)], slide, tmp_path / "a.geojson")
    (feature,) = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert np.min(feature["geometry"]["coordinates"][0], axis=0).tolist() == [10, 10]
    area = shapely.from_wkt(read_region(str(tmp_path / "a.geojson"), slide))
    assert area.bounds == (60, 40, 80, 50)
