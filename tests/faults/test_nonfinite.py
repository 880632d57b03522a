import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning import Callback
from memory_slide import MemorySlide
from tifffile import imwrite

from muvit.cli import main
from muvit.data.crops.crops import GridCrops
from muvit.data.crops.normalize import Percentile, Range
from muvit.data.crops.preprocessing import CropConfig, Preprocessing
from muvit.data.pyramids.convert import convert_image
from muvit.data.pyramids.reduction import area_mean
from muvit.data.slides.open import open_slide
from muvit.data.synthetic.images import SyntheticConfig, write_synthetic
from muvit.errors import InputError
from muvit.inference.predict import predict_slide
from muvit.inference.run.plan import PredictOptions
from muvit.labels import IGNORE
from muvit.models.classifier import Classifier, ClassifierConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import TrainedModel
from muvit.training.fit import train_segmenter
from muvit.training.optim import OptimConfig
from muvit.training.recipes import DataConfig, Recipe
from muvit.training.run_config import RunConfig

SIDE = 16


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides") / "set"
    write_synthetic(folder, num_train=2, num_val=1, num_test=1, config=SyntheticConfig.small(), workers=1)
    return Recipe(
        data=DataConfig(
            train=str(folder / "train"),
            crop_size=SIDE,
            samples_per_epoch=8,
            batch_size=4,
            normalization={"kind": "range", "low": 0, "high": 255},
        ),
        model=tiny().config,
        run=RunConfig(epochs=3, accelerator="cpu", progress=False, pictures=0, save_every=1),
    )


def tiny():
    torch.manual_seed(0)
    encoder = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=2, heads=2)
    return Segmenter(SegmenterConfig(encoder=encoder, num_classes=3, decoder_widths=(8, 8, 4), stem_width=4))


def spoil_slide(recipe, folder, value):
    """The recipe on a copy of its slides, one pixel in ten of the first of which has a value."""
    shutil.copytree(recipe.data.train, folder / "train")
    store = sorted((folder / "train" / "images").iterdir())[0]
    slide = open_slide(store)
    pixels = slide.read(1, (0, 0), slide.shape).astype(np.float32)
    pixels[:, np.random.default_rng(0).random(slide.shape) < 0.1] = value
    imwrite(folder / "image.tif", pixels[0])
    convert_image(folder / "image.tif", store, levels=slide.levels, nonfinite="ignore", overwrite=True)
    for other in sorted((folder / "train" / "images").iterdir())[1:]:  # slides of one type
        same = open_slide(other)
        imwrite(folder / "image.tif", same.read(1, (0, 0), same.shape)[0].astype(np.float32))
        convert_image(folder / "image.tif", other, levels=slide.levels, overwrite=True)
    return replace(recipe, data=replace(recipe.data, train=str(folder / "train"))), store


class WeightsAt(Callback):
    """A weight becomes infinite at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, task, *_):
        if trainer.global_step == self.step:
            next(task.model.parameters()).data.view(-1)[0] = torch.inf


def test_a_loss_that_is_not_finite_ends_the_run_with_step_slide_and_window(recipe, tmp_path):
    spoilt, store = spoil_slide(recipe, tmp_path, 3e38)
    with pytest.raises(InputError, match=r"step 1 \(batch 0 of epoch 0\): expected a finite loss") as error:
        train_segmenter(spoilt, tmp_path / "run")
    assert f"is in {store}, in the window [" in str(error.value)
    assert not (tmp_path / "run" / "last").exists()


def test_the_last_good_model_and_state_are_kept(recipe, tmp_path):
    with pytest.raises(InputError, match=r"step 4 \(batch 1 of epoch 1\): expected a finite loss"):
        train_segmenter(recipe, tmp_path / "run", callbacks=[WeightsAt(3)])
    with pytest.raises(InputError, match="step 4: expected weights that are finite"):
        train_segmenter(recipe, tmp_path / "other", callbacks=[WeightsAt(4)])
    for run in ("run", "other"):
        weights = Segmenter.from_folder(tmp_path / run / "last").state_dict()
        state = torch.load(tmp_path / run / "resume" / "last.ckpt", weights_only=True)
        assert all(weight.isfinite().all() for weight in (*weights.values(), *state["state_dict"].values()))
        assert state["global_step"] == 2


def test_where_gradients_are_replaced_only_the_weights_count(recipe, tmp_path):
    """Here the running statistics of the decoder become infinite."""
    spoilt, _ = spoil_slide(recipe, tmp_path, 3e38)
    spoilt = replace(spoilt, optim=OptimConfig(zero_nonfinite_gradients=True), run=replace(recipe.run, epochs=1))
    with pytest.raises(InputError, match="step 2: expected weights that are finite"):
        train_segmenter(spoilt, tmp_path / "run")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_refused_or_ignored(recipe, tmp_path, caplog, value):
    spoilt, store = spoil_slide(recipe, tmp_path, value)
    spoilt = replace(spoilt, run=replace(recipe.run, epochs=1))
    with pytest.raises(InputError, match=r"expected finite pixels, got NaN or infinity: \d+ at level 1 in") as error:
        train_segmenter(spoilt, tmp_path / "run")
    assert str(store) in str(error.value)
    ignored = replace(spoilt, data=replace(spoilt.data, nonfinite="ignore"))
    model = train_segmenter(ignored, tmp_path / "ignored")
    assert Preprocessing.load(model).nonfinite == "ignore"
    assert any(str(store) in message and "ignored are pixels" in message for message in caplog.messages)


@pytest.mark.parametrize("normalization", [Range(high=255), Percentile()])
def test_ignored_pixels_are_hidden_in_every_channel_and_have_no_label(normalization):
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, 255, (2, 32, 32)).astype(np.float32)
    pixels[1, 3, 5] = np.nan
    pixels[0, 20, 20] = np.inf
    slide = MemorySlide({1: pixels})
    label = MemorySlide({1: rng.integers(0, 3, (1, 32, 32)).astype(np.uint8)})
    config = CropConfig(
        levels=(1,), size=(32, 32), normalization=normalization, num_classes=3, padding="edge", nonfinite="ignore"
    )
    sample = GridCrops([(slide, label)], config)[0]
    missing = np.zeros((32, 32), bool)
    missing[3, 5] = missing[20, 20] = True
    assert (sample["img"][0, :, missing] == 0).all()
    assert torch.equal(sample["label"] == IGNORE, torch.from_numpy(missing))
    with pytest.raises(InputError, match="expected finite pixels"):
        GridCrops([(slide, label)], replace(config, nonfinite="error"))


def test_a_block_of_nan_changes_what_sees_it_and_nothing_else(tmp_path):
    pixels = np.random.default_rng(1).uniform(0, 255, (1, 256, 256)).astype(np.float32)
    settings = Preprocessing(
        crop_size=(SIDE, SIDE),
        normalization=Percentile(),
        class_names=("a", "b", "c"),
        class_colors=((0, 0, 0), (1, 1, 1), (2, 2, 2)),
        nonfinite="ignore",
    )
    spoilt, options = pixels.copy(), PredictOptions(overlap=0.5, block_px=64, probabilities="float16")
    spoilt[:, 100:104, 120:124] = np.nan
    found = []
    for name, image in (("whole", pixels), ("spoilt", spoilt)):
        imwrite(tmp_path / f"{name}.tif", image[0])
        slide = open_slide(tmp_path / f"{name}.tif")
        predict_slide(tiny().eval(), slide, tmp_path / f"{name}.ome.zarr", settings, options=options, device="cpu")
        stored = open_slide(tmp_path / f"{name}.probabilities.ome.zarr")
        found.append(stored.read(1, (0, 0), stored.shape))
    ys, xs = np.nonzero((found[0] != found[1]).any(axis=0))
    seen = 4 * SIDE  # side of the coarse view: a tile further away sees none of the pixels
    assert ys.size and ys.min() > 100 - seen and ys.max() < 104 + seen
    assert xs.min() > 120 - seen and xs.max() < 124 + seen
    with pytest.raises(InputError, match="expected finite pixels"):
        predict_slide(tiny().eval(), slide, tmp_path / "no.ome.zarr", replace(settings, nonfinite="error"))


@pytest.mark.parametrize("verb", ["predict", "features", "classify"])
def test_verbs_that_use_a_model_take_the_policy_as_an_option(tmp_path, capsys, verb):
    """The model's own policy refuses; under the option it answers with finite numbers."""
    pixels = np.random.default_rng(1).uniform(0, 255, (64, 64)).astype(np.float32)
    pixels[30:34, 30:34] = np.nan
    imwrite(tmp_path / "a.tif", pixels)
    model, names = tiny(), ("a", "b", "c")
    if verb == "classify":
        model = Classifier(ClassifierConfig(encoder=model.config.encoder, num_classes=3))
    settings = Preprocessing(
        crop_size=(SIDE, SIDE),
        normalization=Range(high=255),
        class_names=names,
        class_colors=((0, 0, 0), (1, 1, 1), (2, 2, 2)),
    )
    TrainedModel(model=model, preprocessing=settings).save(tmp_path / "model")
    more = ["--num_crops", "null"] if verb == "classify" else []
    output = tmp_path / "out"
    command = [
        verb,
        str(tmp_path / "model"),
        str(tmp_path / "a.tif"),
        "--output",
        str(output),
        "--device",
        "cpu",
        *more,
    ]
    assert main(command) == 1
    assert "a.tif: expected finite pixels, got NaN or infinity: 4 at level" in capsys.readouterr().err
    assert main([*command, "--nonfinite", "ignore", *([] if verb == "classify" else ["--overwrite"])]) == 0
    if verb == "features":
        for level in (1, 4):
            found = open_slide(output / "a.zarr" / f"level_{level}")
            assert np.isfinite(found.read(1, (0, 0), found.shape)).all()
    if verb == "classify":
        (row,) = json.loads((output / "classes.json").read_text())["slides"]
        assert sum(row[f"probability/{name}"] for name in names) == pytest.approx(1)


def test_coarse_pixels_are_means_of_the_finite_ones():
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 9, 14)).astype(np.float32)
    pixels[rng.random(pixels.shape) < 0.3] = np.nan
    pixels[0, :4, :4] = np.inf
    means = area_mean(pixels, (4, 3))
    for c, y, x in np.ndindex(means.shape):
        block = pixels[c, 4 * y : 4 * y + 4, 3 * x : 3 * x + 3]
        finite = block[np.isfinite(block)]
        expected = finite.mean(dtype=np.float64) if finite.size else np.nan
        np.testing.assert_allclose(means[c, y, x], expected, rtol=1e-6)


def test_a_conversion_refuses_them_or_keeps_and_counts_them(tmp_path, capsys, caplog):
    pixels = np.ones((40, 40), np.float32)
    pixels[2:6, 30:34] = np.nan
    imwrite(tmp_path / "a.tif", pixels)
    command = ["convert", str(tmp_path / "a.tif"), "--output", str(tmp_path / "out"), "--levels", "[1,4]"]
    assert main(command) == 1
    assert "a.tif: expected finite pixels, got NaN or infinity at [2, 30]." in capsys.readouterr().err
    assert list((tmp_path / "out").glob("*")) == []
    assert main([*command, "--nonfinite", "ignore"]) == 0
    stored = open_slide(tmp_path / "out" / "a.ome.zarr")
    np.testing.assert_array_equal(stored.read(1, (0, 0), (40, 40))[0], pixels)
    assert (stored.read(4, (0, 0), (10, 10)) == 1).all()
    assert any("16 values that are NaN or infinite" in message for message in caplog.messages)
