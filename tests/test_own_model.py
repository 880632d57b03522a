"""A user's own network, in the public functions that take a model."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from muvit import (
    NestedCrops,
    Preprocessing,
    SegmentationLoss,
    SegmentationModel,
    TrainedModel,
    Views,
    classify_slide,
    evaluate_slides,
    load_model,
    open_slide,
    predict_slide,
)
from muvit.data import PyramidWriter, Range
from muvit.errors import CheckpointError, ExistsError, InputError

PREPROCESSING = Preprocessing(
    crop_size=(16, 16),
    normalization=Range(high=255),
    class_names=("dark", "bright"),
    class_colors=((0, 0, 0), (255, 255, 255)),
)


@dataclass(frozen=True, kw_only=True)
class PixelsConfig:
    kind: ClassVar[str] = "pixels"

    width: int = 4


class Pixels(SegmentationModel):
    """Labels each pixel by its value alone."""

    config: PixelsConfig
    num_classes = 2
    views = Views(levels=(1, 2), in_channels=1, ndim=2, multiple=(1, 1))

    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, config.width, 1), nn.ReLU(), nn.Conv2d(config.width, 2, 1))

    def forward(self, img, bbox=None):
        return self.layers(img[:, 0])


class Nameless(Pixels):
    def __init__(self):
        super().__init__(PixelsConfig())
        self.config = None


def write(path, values, kind):
    writer = PyramidWriter.create(
        path, shape=values.shape, num_channels=1, dtype=np.uint8, levels=(1, 2), kind=kind, chunk=16, shard=64
    )
    writer.write((0, 0), values[None])
    writer.finish()
    return open_slide(path)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (40, 56), dtype=np.uint8)


@pytest.fixture
def pair(tmp_path, pixels):
    truth = (pixels > 127).astype(np.uint8)
    return write(tmp_path / "image.ome.zarr", pixels, "image"), write(tmp_path / "truth.ome.zarr", truth, "label")


def trained(pair):
    """Train the model until it has learnt the threshold."""
    model = Pixels(PixelsConfig())
    crops = NestedCrops([pair], PREPROCESSING.crops(model.views.levels, num_classes=2), samples_per_epoch=240)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for batch in torch.utils.data.DataLoader(crops, batch_size=8):
        optimizer.zero_grad()
        model.training_loss(batch, SegmentationLoss())[0].backward()
        optimizer.step()
    return TrainedModel(model=model, preprocessing=PREPROCESSING)


def test_it_is_trained_saved_loaded_applied_and_scored_like_any_other(tmp_path, pixels, pair):
    made = trained(pair)
    made.save(tmp_path / "run" / "best")
    loaded = load_model(tmp_path / "run", kind=Pixels)
    assert type(loaded.model) is Pixels
    assert (loaded.fingerprint, loaded.model.config, loaded.preprocessing) == (
        made.fingerprint,
        made.model.config,
        PREPROCESSING,
    )
    labels = open_slide(predict_slide(loaded, pair[0], tmp_path / "labels.ome.zarr"))
    written = labels.read(1, (0, 0), pixels.shape)[0]
    with torch.inference_mode():
        logits = made.model(torch.from_numpy(pixels / np.float32(255))[None, None, None])
    np.testing.assert_array_equal(written, logits[0].argmax(0).numpy())
    assert evaluate_slides([(labels, pair[1])], 2).pooled.accuracy == np.mean(written == (pixels > 127)) > 0.95


def test_a_trained_model_stands_for_model_and_preprocessing(tmp_path, pair):
    model, slide, output = Pixels(PixelsConfig()), pair[0], tmp_path / "labels.ome.zarr"
    predict_slide(TrainedModel(model=model, preprocessing=PREPROCESSING), slide, output)
    predict_slide(model, slide, output, PREPROCESSING)  # complete already; any other plan would be refused
    small = TrainedModel(model=model, preprocessing=replace(PREPROCESSING, crop_size=(8, 8)))
    predict_slide(small, slide, output, PREPROCESSING)
    with pytest.raises(ExistsError):
        predict_slide(small, slide, output)


def test_its_folder_is_loaded_by_its_class_alone(tmp_path, pair):
    TrainedModel(model=Pixels(PixelsConfig()), preprocessing=PREPROCESSING).save(tmp_path / "model")
    with pytest.raises(
        CheckpointError, match=r"got one of kind pixels\. A model of your own class is loaded with kind"
    ):
        load_model(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"expected a model of kind .*, got one of kind pixels"):
        load_model(tmp_path / "model", kind=SegmentationModel)


def test_a_model_without_configuration_is_applied_but_not_saved(tmp_path, pair):
    model = Nameless()
    predict_slide(model, pair[0], tmp_path / "labels.ome.zarr", PREPROCESSING)
    with pytest.raises(InputError, match=r"config of Nameless: expected a dataclass that names its kind, .* got None"):
        TrainedModel(model=model, preprocessing=PREPROCESSING).save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_plain_module_is_refused(tmp_path, pair):
    head = nn.Conv2d(1, 2, 1)
    for model in (head, TrainedModel(model=head, preprocessing=PREPROCESSING)):
        with pytest.raises(
            InputError, match=r"model: expected a SegmentationModel, got a Conv2d\. .*SegmentationModel"
        ):
            predict_slide(model, pair[0], tmp_path / "labels.ome.zarr", PREPROCESSING)
    with pytest.raises(InputError, match="model: expected a Classifier, got a Pixels"):
        classify_slide(Pixels(PixelsConfig()), pair[0], PREPROCESSING)
    with pytest.raises(InputError, match="preprocessing: expected that of the model's training, got none"):
        predict_slide(Pixels(PixelsConfig()), pair[0], tmp_path / "labels.ome.zarr")
    assert not (tmp_path / "labels.ome.zarr").exists()


@pytest.mark.parametrize("name", ["views", "num_classes"])
def test_what_is_missing_is_named(tmp_path, pair, name):
    class Half(Pixels):
        pass

    setattr(Half, name, getattr(SegmentationModel, name))
    with pytest.raises(NotImplementedError, match=f"Half needs a property {name}"):
        predict_slide(Half(PixelsConfig()), pair[0], tmp_path / "labels.ome.zarr", PREPROCESSING)
