import json

import numpy as np
import pytest
import shapely
import torch
import yaml
from array_slide import ArraySlide
from PIL import Image

from muvit.cli import main
from muvit.data.slides.open import open_slide
from muvit.inference.export.summaries import draw_slide, label_outlines
from muvit.inference.tiling.region import read_region
from muvit.inference.tiling.tissue import find_tissue
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import SegmenterConfig
from muvit.pictures import OKABE_ITO
from muvit.training.recipes import DataConfig, Recipe
from muvit.training.samples import place_crops, sample_rows
from muvit.view_pictures import framed

SHAPE = (80, 120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dark square on light glass, its label image, and the same as an annotation of another slide."""
    folder = tmp_path_factory.mktemp("slides")
    labels = np.zeros(SHAPE, np.uint8)
    labels[20:60, 40:90] = 1
    image = np.where(labels[..., None] == 1, (200, 120, 160), (240, 240, 240)).astype(np.uint8)
    square = {"type": "Polygon", "coordinates": [[[40, 20], [90, 20], [90, 60], [40, 60], [40, 20]]]}
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for name in ("a", "b"):
        Image.fromarray(image).save(folder / "images" / f"{name}.png")
    Image.fromarray(labels).save(folder / "labels" / "a.png")
    feature = {"type": "Feature", "geometry": square, "properties": {"classification": {"name": "Tumour"}}}
    (folder / "labels" / "b.geojson").write_text(json.dumps(feature))
    settings = {
        "data": {"train": str(folder), "crop_size": 16, "samples_per_epoch": 4, "batch_size": 4},
        "model": {
            "encoder": {"levels": [1, 4], "patch_size": 4, "dim": 16, "num_layers": 2, "heads": 2},
            "num_classes": 2,
            "decoder_widths": [8, 8, 4],
            "stem_width": 4,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder


def run(*argv):
    return main([str(argument) for argument in argv])


def test_frames_show_where_the_finer_views_lie():
    bbox = torch.tensor([[[16.0, 24.0], [32.0, 40.0]], [[0.0, 0.0], [64.0, 64.0]]])
    picture = framed(np.full((256, 256, 3), 255, np.uint8), bbox, 1)
    inner = [(64, 120), (127, 120), (90, 96), (90, 159)]  # four pixels of the picture for each of the world
    assert {tuple(picture[place]) for place in inner} == {OKABE_ITO[0]}
    assert {tuple(picture[place]) for place in [(0, 128), (255, 128), (128, 0), (128, 255)]} == {OKABE_ITO[1]}
    assert (picture[100:120, 110:150] == 255).all()


def test_views_of_a_sample_have_one_contrast_and_say_how_much_they_show():
    dark, bright = np.zeros((1, 1, 8, 8)), np.full((1, 1, 8, 8), 100.0)
    sample = {
        "img": torch.from_numpy(np.concatenate([dark, bright])),
        "bbox": torch.tensor([[[0.0, 0.0], [8.0, 8.0]], [[0.0, 0.0], [3200.0, 3200.0]]]),
        "label": torch.ones(8, 8, dtype=torch.int64),
    }
    slide = ArraySlide(np.zeros((1, 8, 8), np.uint8))
    slide.pixel_size_um = (0.5, 0.5)
    ((fine, coarse, labels),) = sample_rows([sample], (1, 400), slide, [(0, 0, 0), (1, 2, 3)], size=64)
    assert [fine.title, coarse.title] == ["level 1: 4 µm wide", "level 400: 1.6 mm wide"]
    assert (fine.pixels[20:40, 20:40] == 0).all()
    assert (coarse.pixels[20:40, 20:40] == 255).all()
    assert (labels.pixels == (1, 2, 3)).all()


def test_crops_hold_a_point_of_the_tissue(folder):
    recipe = Recipe(
        data=DataConfig(train="", crop_size=16),
        model=SegmenterConfig(encoder=EncoderConfig(levels=(1, 4), patch_size=8)),
    )
    pixels = np.zeros((1, *SHAPE), np.uint8)
    pixels[0, 70:76, 100:110] = 255
    slide = ArraySlide(pixels, levels=(1, 4))
    for views in place_crops(slide, recipe, find_tissue(slide).points(), count=8):
        window = views.windows[0]
        row, column = (slice(a, a + n) for a, n in zip(window.start, window.size, strict=True))
        assert pixels[0, row, column].any()
    assert len(place_crops(slide, recipe, np.empty((0, 2)), count=3)) == 3


@pytest.mark.parametrize("name", ["a.png", "b.geojson"])
def test_labels_and_annotations_are_outlined_alike(folder, name):
    from muvit.data.folders import open_labels

    image = open_slide(folder / "images" / f"{name[0]}.png")
    (found,) = label_outlines(open_labels([folder / "labels" / name], {image.name: image})[image.name])
    assert found.name == {"a": "label 1", "b": "Tumour"}[name[0]]
    assert shapely.union_all(found.polygons).equals(shapely.box(40, 20, 90, 60))
    drawn = np.array(draw_slide(image, [found], size=120))
    color = np.array(found.color)
    for y, x in ((20, 60), (60, 60), (40, 40), (40, 90)):
        assert (drawn[y - 1 : y + 2, x - 1 : x + 2] == color).all(-1).any(), (y, x)
    assert not (drawn[:80, :][25:55, 45:85] == color).all(-1).any()


def test_the_commands_draw(folder, tmp_path, capfd):
    image = folder / "images" / "a.png"
    outputs = ("--picture", tmp_path / "i.png", "--tissue_output", tmp_path / "t.geojson")
    assert run("info", image, *outputs, "--recipe", folder / "recipe.yaml") == 0
    said = capfd.readouterr().out.splitlines()
    assert said[-2:] == [str(tmp_path / "i.png"), str(tmp_path / "t.geojson")]
    area = shapely.from_wkt(read_region(str(tmp_path / "t.geojson"), open_slide(image)))
    assert area.equals(shapely.box(40, 20, 90, 60))
    with Image.open(tmp_path / "i.png") as picture:
        assert picture.width > 2 * 384
        assert picture.height > 2 * 384 + 80
    assert run("info", image, "--picture", tmp_path / "i.png") == 1
    assert "i.png: exists already" in capfd.readouterr().err
    assert run("info", image, image, "--picture", tmp_path / "j.png") == 1
    assert "expected a single one, to draw it or write its tissue, got 2" in capfd.readouterr().err

    assert run("samples", folder / "recipe.yaml", "--output", tmp_path / "s.png", "--count", "2", "--size", "100") == 0
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.width == 12 + 3 * 112  # two views and the labels
        assert picture.height > 4 * 112
    assert run("samples", folder / "recipe.yaml", "--output", tmp_path / "s.jpg") == 1
    assert "expected a file ending in .png" in capfd.readouterr().err
