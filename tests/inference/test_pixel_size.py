"""Slides of several pixel sizes under one model: what it sees, what it writes, and where that lies."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch.nn.functional as F
from memory_slide import MemorySlide
from shapely.geometry import shape as geometry_of

from muvit.data.pyramids.convert import convert_image
from muvit.data.slides.derived import on_grid
from muvit.data.slides.open import open_slide
from muvit.data.synthetic.images import SyntheticConfig, generate
from muvit.errors import ExistsError, InputError
from muvit.evaluation.scores.segmentation import evaluate_slides
from muvit.inference.export.geojson import write_geojson
from muvit.inference.export.labelled import LabelledImage
from muvit.inference.predict import plan_prediction, predict_slide
from muvit.inference.run.engine import verify_job
from muvit.inference.run.plan import PredictOptions
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import TrainedModel
from muvit.training.datamodules import SegmentationData
from muvit.training.fit import train_segmenter
from muvit.training.recipes import DataConfig, Recipe

SIZES = {"same": (0.5, 0.5), "fine": (0.25, 0.25), "between": (0.4, 0.3125)}


def store(pixels, path, size_um, kind="image"):
    """Convert pixels (C, y, x) of 0.5 um, seen at another size."""
    slide = MemorySlide({1: pixels})
    slide.channel_names = ("label",) if kind == "label" else ("grey",)
    shape = [round(n * 0.5 / s) for n, s in zip(slide.shape, size_um, strict=True)]
    seen = on_grid(slide, [s / 0.5 for s in size_um], kind, shape)
    return open_slide(convert_image(seen, path, kind=kind, pixel_size_um=size_um, levels=(1, 2, 4)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of the Synthetic data set: one to train on, one to test stored at several sizes."""
    folder = tmp_path_factory.mktemp("sizes")
    config = SyntheticConfig.small()
    for split, number, sizes in (("train", 0, {"fine": (0.25, 0.25)}), ("test", 1, SIZES)):
        image, labels = generate(number, config)
        image, labels = image[:192, :192], labels[:192, :192]
        image = (image * 255).round().clip(0, 255).astype(np.uint8) if image.dtype.kind == "f" else image
        for name, size in sizes.items():
            store(image[None], folder / split / "images" / f"{name}.ome.zarr", size)
            store(labels[None], folder / split / "labels" / f"{name}.ome.zarr", size, "label")
    return folder


class Smoother(Segmenter):
    """A segmenter whose answer depends on the mean brightness about each pixel, at both levels."""

    def label_logits(self, img, bbox=None):
        fine, coarse = (F.avg_pool2d(img[:, view], 17, 1, 8)[:, 0] for view in (0, 1))
        middle = coarse[..., 12:20, 12:20].mean((-2, -1), keepdim=True)
        classes = (fine > 0.1 + 0.1 * middle).long()
        return F.one_hot(classes, 3).movedim(-1, 1).float()


@pytest.fixture(scope="module")
def recipe(folder):
    return Recipe(
        data=DataConfig(
            train=str(folder / "train"),
            pixel_size_um=0.5,
            crop_size=32,
            normalization={"kind": "range", "low": 0, "high": 255},
        ),
        model=SegmenterConfig(
            encoder=EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=2, heads=2),
            num_classes=3,
            decoder_widths=(8, 8, 4),
            stem_width=4,
        ),
    )


@pytest.fixture(scope="module")
def trained(recipe):
    model = Smoother(recipe.model)
    return TrainedModel(model=model, preprocessing=SegmentationData(recipe, model.views).preprocessing)


def predict(trained, folder, name, output, **options):
    slide = open_slide(folder / "test" / "images" / f"{name}.ome.zarr")
    options = PredictOptions(**{"overlap": 0.0, **options})
    return open_slide(predict_slide(trained, slide, output / f"{name}.ome.zarr", options=options))


def test_models_keep_the_size(trained, recipe):
    preprocessing = trained.preprocessing
    assert preprocessing.is_resampled and preprocessing.pixel_size_um == pytest.approx((0.5, 0.5))
    image, label = SegmentationData(recipe, trained.model.views).train_slides[0]
    assert image.shape == label.shape and image.pixel_size_um == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("grid", ["model", "slide"])
def test_a_slide_and_copies_of_other_sizes_get_the_same_labels(trained, folder, tmp_path, grid):
    found = {name: predict(trained, folder, name, tmp_path, grid=grid, probabilities="uint8") for name in SIZES}
    own = open_slide(folder / "test" / "images" / "same.ome.zarr")
    for name, labels in found.items():
        expected = SIZES[name] if grid == "slide" else SIZES["same"]
        assert labels.pixel_size_um == pytest.approx(expected, rel=1e-3)
        for n, size, m, other in zip(labels.shape, labels.pixel_size_um, own.shape, own.pixel_size_um, strict=True):
            assert n * size == pytest.approx(m * other, rel=1e-3)
        assert labels.label_names and open_slide(tmp_path / f"{name}.probabilities.ome.zarr").shape == labels.shape
        agreement = evaluate_slides([(labels, found["same"])], 3)
        assert np.nanmin(agreement.pooled.dice) > 0.98
    whole = [found[name].read(1, (0, 0), found[name].shape)[0] for name in ("same", "fine")]
    expected = whole[0] if grid == "model" else np.kron(whole[0], np.ones((2, 2), np.uint8))
    assert (whole[1] == expected).all() and len(np.unique(whole[0])) > 1


def test_labels_of_the_model_are_scored_and_exported_in_the_pixels_of_the_slide(trained, folder, tmp_path):
    labels = predict(trained, folder, "between", tmp_path)
    image, truth = (open_slide(folder / "test" / kind / "between.ome.zarr") for kind in ("images", "labels"))
    assert evaluate_slides([(labels, truth)], 3).slides[0].confusion.sum() == np.prod(truth.shape)
    source = LabelledImage(labels=labels, image=image)
    assert source.scale == pytest.approx((1.25, 1.6))
    write_geojson(source, tmp_path / "a.geojson")
    area = sum(
        geometry_of(one["geometry"]).area for one in json.loads((tmp_path / "a.geojson").read_text())["features"]
    )
    assert area == pytest.approx((labels.read(1, (0, 0), labels.shape) > 0).sum() * 1.25 * 1.6, rel=0.02)


def test_an_output_on_the_grid_of_the_slide_is_complete_only_then(trained, folder, tmp_path, monkeypatch):
    from muvit.inference.run import label_blocks

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(label_blocks, "convert_image", killed)
        with pytest.raises(KeyboardInterrupt):
            predict(trained, folder, "fine", tmp_path, grid="slide")
    image = open_slide(folder / "test" / "images" / "fine.ome.zarr")
    for _ in range(2):  # the run goes on; and another finds it complete
        assert predict(trained, folder, "fine", tmp_path, grid="slide").shape == image.shape
    options = PredictOptions(overlap=0.0, grid="slide")
    output = tmp_path / "fine.ome.zarr"
    verify_job(plan_prediction(trained.model, image, output, trained.preprocessing, options=options))
    with pytest.raises(ExistsError, match="exists already"):
        predict(trained, folder, "fine", tmp_path)


def test_other_models_read_slides_of_their_size_as_they_are_and_others_at_it(trained, folder, tmp_path, caplog):
    plain = replace(trained.preprocessing, is_resampled=False, pixel_size_um=(0.26, 0.25))
    with caplog.at_level(logging.WARNING):
        assert predict(replace(trained, preprocessing=plain), folder, "fine", tmp_path / "near").pixel_size_um == (
            0.25,
            0.25,
        )
        assert not caplog.messages
        far = predict(replace(trained, preprocessing=plain), folder, "same", tmp_path / "far")
    assert far.pixel_size_um == pytest.approx((0.26, 0.25))
    assert "read at 0.26 x 0.25 um per pixel, stored at 0.5 um" in caplog.text


def test_a_region_is_in_pixels_of_the_slide(trained, folder, tmp_path):
    box = "POLYGON ((8 8, 200 8, 200 100, 8 100, 8 8))"  # x to 100, y to 50 at the model's size: 4 x 2 tiles of 32
    labels, everything = (
        predict(trained, folder, "fine", tmp_path / name, region=region).read(1, (0, 0), (192, 192))[0]
        for name, region in (("part", box), ("whole", None))
    )
    everything[64:], everything[:, 128:] = 0, 0
    assert everything.any() and (labels == everything).all()


def test_mixed_and_unknown_sizes_are_refused_in_training(recipe, folder, tmp_path):
    mixed = replace(recipe, data=replace(recipe.data, train=str(folder / "test"), pixel_size_um=None))
    with pytest.raises(InputError, match=r"pixel size of .*Set data.pixel_size_um to read all slides at one size"):
        train_segmenter(mixed, tmp_path / "run")
