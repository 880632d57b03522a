"""Folders whose labels are annotations: paired, trained on and scored as those whose labels are images."""

import numpy as np
import orjson
import pytest
import torch
from scipy.ndimage import gaussian_filter

from muvit.cli import main
from muvit.data.annotations.objects import AnnotationConfig
from muvit.data.folders import open_labelled_folder
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.open import open_slide
from muvit.errors import InputError
from muvit.inference.export.geojson import GeoJsonConfig, write_geojson
from muvit.inference.export.labelled import LabelledImage
from muvit.labels import IGNORED
from muvit.models.encoder import EncoderConfig
from muvit.models.segmentation_model import Views
from muvit.models.segmenter import SegmenterConfig
from muvit.training.datamodules import SegmentationData
from muvit.training.recipes import DataConfig, Recipe
from muvit.training.run_config import RunConfig

SHAPE = (300, 340)
NAMES = {0: "background", 1: "cortex", 2: "tract", 3: "ventricle"}
EXPORT = ("--geojson", "--overwrite")
COLORS = {1: (200, 0, 0), 2: (0, 200, 0), 3: (0, 0, 200)}


def regions(seed):
    """Smooth regions of four classes."""
    noise = np.random.default_rng(seed).normal(size=(4, *SHAPE))
    return gaussian_filter(noise, (0, 12, 12)).argmax(0).astype(np.uint8)


def store(folder, kind, name, pixels):
    names = {"label_names": NAMES, "label_colors": COLORS} if kind == "label" else {}
    writer = PyramidWriter.create(
        folder / f"{kind}s" / f"{name}.ome.zarr",
        shape=SHAPE, num_channels=1, dtype=np.uint8, levels=(1, 4), kind=kind, pixel_size_um=0.5, **names,
    )  # fmt: skip
    writer.write((0, 0), pixels[None])
    writer.finish()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The same slides in ``raster`` and, with polygons as `muvit export` writes them, in ``drawn``."""
    folder = tmp_path_factory.mktemp("sets")
    for split, seeds in (("train", (0, 1)), ("val", (2,))):
        for seed in seeds:
            labels = regions(seed)
            store(folder / "raster" / split, "image", f"{seed}", 40 * labels + 20)
            store(folder / "raster" / split, "label", f"{seed}", labels)
            store(folder / "drawn" / split, "image", f"{seed}", 40 * labels + 20)
        outlines = folder / "drawn" / split / "labels"
        assert main(["export", f"{folder}/raster/{split}/labels", "--output", str(outlines), *EXPORT]) == 0
    return folder


def recipe(folder, **data):
    return Recipe(
        data=DataConfig(
            train=str(folder / "train"),
            val=str(folder / "val"),
            crop_size=64,
            samples_per_epoch=12,
            val_samples=4,
            batch_size=4,
            label_levels="all",
            **data,
        ),
        model=SegmenterConfig(
            encoder=EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=1, heads=2),
            num_classes=4,
        ),
        run=RunConfig(accelerator="cpu"),
    )


VIEWS = Views(levels=(1, 4), in_channels=1, ndim=2, multiple=(4, 4))


def test_training_from_polygons_sees_the_crops_that_training_from_the_raster_sees(sets):
    data = [SegmentationData(recipe(sets / kind), VIEWS) for kind in ("raster", "drawn")]
    assert data[0].preprocessing == data[1].preprocessing
    for kind in ("train_crops", "val_crops"):
        raster, polygons = (getattr(each, kind) for each in data)
        assert raster.seen_classes == polygons.seen_classes == set(NAMES)
        pairs = [(raster[i], polygons[i]) for i in range(len(raster))]
        assert all(torch.equal(one[key], other[key]) for one, other in pairs for key in one)


def test_rare_classes_of_annotations_are_found(sets):
    crops = SegmentationData(recipe(sets / "drawn", balance="classes", foreground_fraction=1.0), VIEWS).train_crops
    assert all((crops[i]["label"] > 0).any() for i in range(8))


def test_polygons_with_every_corner_are_the_raster_itself(sets, tmp_path):
    stored = open_slide(sets / "raster/train/labels/0.ome.zarr")
    (tmp_path / "labels").mkdir()
    (tmp_path / "images").symlink_to(sets / "raster/val/images")
    config = GeoJsonConfig(simplify_px=0)
    write_geojson(LabelledImage(labels=stored), tmp_path / "labels" / "2.geojson", config)
    ((_, drawn),) = open_labelled_folder(tmp_path, (1, 4), (1, 4))
    for level in (1, 4):
        window = (level, (0, 0), stored.level_shape(level))
        np.testing.assert_array_equal(drawn.read(*window), stored.read(*window))
    assert (drawn.label_names, drawn.label_colors) == (NAMES, COLORS)


def write(file, *classes, box=(0, 0, 50, 60)):
    top, left, bottom, right = box
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    file.parent.mkdir(exist_ok=True)
    features = [
        {"geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {"classification": {"name": name}}}
        for name in classes
    ]
    file.write_bytes(orjson.dumps(features))


def test_classes_found_in_training_have_the_same_values_in_validation(tmp_path):
    for split, classes in (("train", ("a", "b", "c")), ("val", ("c", "Region*"))):
        store(tmp_path / split, "image", "x", np.zeros(SHAPE, np.uint8))
        write(tmp_path / split / "labels" / "x.geojson", *classes)
    data = SegmentationData(recipe(tmp_path), VIEWS)
    assert data.val_crops.seen_classes == {3}
    assert (data.val_crops[0]["label"] == -100).any()  # outside of the region
    assert data.preprocessing.class_names == ("background", "a", "b", "c")
    stated = AnnotationConfig(classes={"c": 1, "a": 2, "b": 2}, overlap="classes")
    assert SegmentationData(recipe(tmp_path, annotations=stated), VIEWS).val_crops.seen_classes == {1}


def test_annotations_and_images_are_paired(tmp_path):
    store(tmp_path, "image", "x", np.zeros(SHAPE, np.uint8))
    write(tmp_path / "labels" / "y.geojson", "a")
    with pytest.raises(InputError, match="expected an image and labels of each name, got no image for 'y'"):
        open_labelled_folder(tmp_path)
    write(tmp_path / "labels" / "x.geojson", "a")
    (tmp_path / "labels" / "y.geojson").rename(tmp_path / "labels" / "x.json")
    with pytest.raises(InputError, match=r"x\.json: expected one image of each name, got also .*x\.geojson"):
        open_labelled_folder(tmp_path)


def test_annotations_are_converted_with_what_is_ignored(tmp_path, capsys):
    store(tmp_path, "image", "x", np.zeros(SHAPE, np.uint8))
    file = tmp_path / "labels" / "x.geojson"
    write(file, "a", "b", "Ignore*", box=(10, 20, 40, 60))
    (file.parent / "classes.yaml").write_text("{classes: {a: 1, b: 2, Ignore*: ignore}, overlap: classes}")
    convert = ["convert", str(file), "--output", str(tmp_path / "stored")]
    assert main([*convert, "--kind", "label", "--levels", "[1,4]"]) == 0
    stored = open_slide(tmp_path / "stored" / "x.ome.zarr")
    expected = np.zeros(SHAPE, np.uint8)
    expected[10:40, 20:60] = IGNORED
    np.testing.assert_array_equal(stored.read(1, (0, 0), SHAPE)[0], expected)
    assert (stored.levels, stored.pixel_size_um) == ((1, 4), (0.5, 0.5))
    assert stored.label_names == {0: "background", 1: "a", 2: "b"}
    assert main(convert) == 1
    assert "x.geojson: expected --kind label, for annotations, got --kind image" in capsys.readouterr().err


def test_annotations_are_scored_by_the_names_of_the_predicted_classes(tmp_path, capsys):
    store(tmp_path, "image", "x", np.zeros(SHAPE, np.uint8))
    labels = np.zeros(SHAPE, np.uint8)
    labels[10:40, 20:60], labels[50:60] = 2, 1
    store(tmp_path / "predicted", "label", "x", labels)
    (tmp_path / "elsewhere").mkdir()
    truth = tmp_path / "elsewhere" / "labels" / "truth.geojson"
    write(truth, "tract", box=(10, 20, 40, 60))
    scores = tmp_path / "scores.json"
    score = ["evaluate", str(tmp_path / "predicted/labels/x.ome.zarr"), str(truth), "--output", str(scores)]
    assert main(score) == 1
    assert "truth.geojson: expected its image, in " in capsys.readouterr().err
    assert main([*score, "--image", str(tmp_path / "images")]) == 0
    assert "tract               1.0000" in capsys.readouterr().out
    write(truth, "other")
    assert main([*score, "--image", str(tmp_path / "images"), "--overwrite"]) == 1
    assert "expected classes with a value (Ignore*, background, cortex, tract, ventricle), got 'other'" in (
        capsys.readouterr().err
    )
