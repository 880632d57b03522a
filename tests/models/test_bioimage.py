"""Packages of bioimage.io: one image gives what prediction gives, and the reference implementation accepts them."""

import io
import json
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from tiny_prediction import PREPROCESSING, make_model_and_image

from muvit.cli import main
from muvit.data.crops.normalize import Percentile, Standardize
from muvit.data.slides.open import open_slide
from muvit.errors import ExistsError, InputError
from muvit.inference.predict import predict_slide
from muvit.inference.run.plan import PredictOptions
from muvit.models.bioimage import OneImage, export_package
from muvit.models.card import ModelCard
from muvit.models.encoder import EncoderConfig
from muvit.models.hub import CARD
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import TrainedModel, load_model


@pytest.fixture
def folder(tmp_path):
    make_model_and_image(tmp_path)
    card = ModelCard(title="cells, two", kind="muvit", levels=(1, 4), channels=1, parameters=1, license="mit")
    (tmp_path / "model" / CARD).write_text(card.to_markdown())
    return tmp_path


def test_the_middle_of_one_image_is_labelled_as_prediction_labels_it(folder):
    trained = load_model(folder / "model", kind=SegmentationModel)
    whole = OneImage(trained.model.eval(), trained.preprocessing.crop_size)
    assert whole.extent == (64, 64) and whole.halo == (24, 24)
    slide = open_slide(folder / "image.ome.zarr")  # 90 x 70: the tile at 32, 32 has all its context inside
    options = PredictOptions(overlap=0.0, blend="center", probabilities="float16", placement="nested")
    predict_slide(trained, slide, folder / "out.ome.zarr", options=options)
    labels = open_slide(folder / "out.ome.zarr").read(1, (32, 32), (16, 16))[0]
    expected = open_slide(folder / "out.probabilities.ome.zarr").read(1, (32, 32), (16, 16))
    pixels = torch.from_numpy(slide.read(1, (8, 8), (64, 64)).astype(np.float32) / 255)[None]
    with torch.no_grad():
        output = whole(pixels)[0].numpy()
    middle = output[:, 24:40, 24:40]
    assert (middle.argmax(0) == labels).mean() > 0.99
    np.testing.assert_allclose(middle, expected.astype(np.float32), rtol=0, atol=2e-3)
    output[:, 24:40, 24:40] = 0
    assert (output == 0).all()


def test_views_are_area_means_about_one_centre_with_their_true_boxes(folder):
    trained = load_model(folder / "model", kind=SegmentationModel)
    whole = OneImage(trained.model, (16, 16))
    assert whole.boxes.tolist() == [[[24, 24], [40, 40]], [[0, 0], [64, 64]]]
    image = torch.rand(2, 1, 64, 64)
    fine, coarse = whole.views(image).unbind(1)
    assert torch.equal(fine, image[..., 24:40, 24:40])
    torch.testing.assert_close(coarse, image.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)))
    with pytest.raises(InputError, match="crops of an even size"):
        OneImage(trained.model, (15, 15))
    encoder = EncoderConfig(in_channels=1, levels=(2, 3), num_layers=4, dim=16, heads=1)
    odd = Segmenter(SegmenterConfig(encoder=encoder, num_classes=2, decoder_widths=(4, 4, 4, 4), stem_width=4))
    with pytest.raises(InputError, match="whole multiples of the finest"):
        OneImage(odd, (16, 16))


def test_what_a_package_needs_is_asked_for_before_any_work(folder):
    model = folder / "model"
    (folder / "a.zip").touch()
    with pytest.raises(ExistsError):
        export_package(model, folder / "a.zip", authors=["Ada"])
    with pytest.raises(InputError, match=r"a file ending in \.zip"):
        export_package(model, folder / "a.onnx", authors=["Ada"])
    with pytest.raises(InputError, match="at least one name"):
        export_package(model, folder / "b.zip")
    trained = load_model(model, kind=SegmentationModel)
    for normalization in (Percentile(), Standardize(mean=(0.0,), std=(1.0,), local_mean=(0,))):
        own = TrainedModel(model=trained.model, preprocessing=replace(PREPROCESSING, normalization=normalization))
        own.save(folder / normalization.kind)
        (folder / normalization.kind / CARD).write_text((model / CARD).read_text())
        with pytest.raises(InputError, match="range, or standardize with fixed means"):
            export_package(folder / normalization.kind, folder / "b.zip", authors=["Ada"])
    assert main(["export-model", str(model), "--output", str(folder / "b.onnx"), "--authors", "[Ada]"]) != 0
    assert main(["export-model", str(model), "--output", str(folder / "b.onnx"), "--format", "bioimageio"]) != 0
    assert not (folder / "b.zip").exists() and not (folder / "b.onnx").exists()


_CHECK = """
import json, sys
import numpy as np
from bioimageio.core import load_description, test_model
from bioimageio.core.prediction import predict

if __name__ == "__main__":
    file, image, output = sys.argv[1:]
    summary = test_model(file)
    assert summary.status == "passed", summary.format()
    problems = [(error.loc, error.msg) for detail in summary.details for error in detail.errors]
    description = load_description(file)
    found = predict(model=description, inputs={"image": np.load(image)}, blocksize_parameter=0)
    np.save(output, np.asarray(found.members["probabilities"].data.data))
    print(json.dumps([summary.status, problems]))
"""


@pytest.mark.long
def test_the_reference_implementation_accepts_a_package_and_labels_a_larger_image_with_it(folder):
    file, slide = folder / "model.zip", folder / "image.ome.zarr"
    call = ["export-model", str(folder / "model"), "--output", str(file), "--authors", "[Ada]", "--slide", str(slide)]
    assert main([*call, "--format", "bioimageio"]) == 0
    with zipfile.ZipFile(file) as package:
        description = yaml.safe_load(package.read("rdf.yaml"))
        tensor = np.load(io.BytesIO(package.read("test_input.npy")))
    assert description["license"] == "MIT" and description["name"] == "cells two"
    assert tensor.shape == (1, 1, 64, 64)
    image = open_slide(slide)
    np.testing.assert_array_equal(tensor[0], image.read(1, (13, 3), (64, 64)))
    pixels = np.pad(image.read(1, (0, 0), image.shape), ((0, 0), (0, 6), (0, 10)))[:, :80, :80].astype(np.float32)
    np.save(folder / "pixels.npy", pixels[None])
    (folder / "check.py").write_text(_CHECK)
    names = ("model.zip", "pixels.npy", "found.npy")
    run = subprocess.run(
        [sys.executable, "check.py", *names], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    remedy = "this test needs bioimageio.core and pydantic before 2.14: pip install 'muvit[bioimageio]'"
    assert run.returncode == 0, f"{remedy}\n{run.stderr}"
    assert json.loads(run.stdout.splitlines()[-1]) == ["passed", []], remedy
    found = np.load(folder / "found.npy")
    assert found.shape == (1, 3, 80, 80)
    trained = load_model(folder / "model", kind=SegmentationModel)
    whole = OneImage(trained.model.eval(), trained.preprocessing.crop_size)
    with torch.no_grad():  # the tile at 32, 32, whose halo is inside the image
        expected = whole(torch.from_numpy(pixels[None, :, 8:72, 8:72] / 255))[0].numpy()
    np.testing.assert_allclose(found[0, :, 32:48, 32:48], expected[:, 24:40, 24:40], rtol=0, atol=1e-4)
