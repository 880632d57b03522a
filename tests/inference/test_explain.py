import json

import numpy as np
import pytest
import torch
from array_slide import ArraySlide
from PIL import Image
from tiny_prediction import PREPROCESSING, make_model_and_image

from muvit.cli import main
from muvit.data.crops.placement import place_at
from muvit.data.crops.slide_crops import read_views
from muvit.data.slides.open import open_slide
from muvit.errors import InputError
from muvit.evaluation.report.explanation import draw_explanation
from muvit.inference.explain import MAPS, explain_point
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import load_model

POINT = (40.5, 30.0)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_model_and_image(folder)
    return folder


@pytest.fixture(scope="module")
def trained(work):
    loaded = load_model(work / "model", kind=Segmenter)
    with torch.no_grad():  # as a trained model has it: attention that is not uniform
        for block in loaded.model.encoder.layers:
            block.attn.qkv.weight[:32] *= 6
    return loaded


@pytest.fixture(scope="module")
def slide(work):
    return open_slide(work / "image.ome.zarr")


def views_at(trained, slide, point):
    """Views whose finest one is centred on a point, and the pixel of the point in it."""
    shapes = [slide.level_shape(level) for level in (1, 4)]
    placed = place_at("nested", shapes, (1, 4), (16, 16), point)
    sample = read_views(slide, placed.windows, trained.preprocessing.crops((1, 4)))
    pixel = tuple(int(a) - start for a, start in zip(point, placed.windows[0].start, strict=True))
    return sample["img"][None], sample["bbox"][None], pixel


@pytest.mark.parametrize("point", [POINT, (0.0, 69.9)])
def test_an_explanation_is_about_the_label_that_the_model_gives(trained, slide, point):
    found = explain_point(trained, slide, point, draws=2, device="cpu")
    img, bbox, pixel = views_at(trained, slide, point)
    with torch.no_grad():
        cases = [trained.model.label_logits(img, boxes).softmax(1)[(0, ..., *pixel)] for boxes in (bbox, None)]
    np.testing.assert_allclose(list(found.probabilities.values()), cases[0].numpy(), rtol=1e-5)
    best = int(cases[0].argmax())
    assert found.explained == PREPROCESSING.class_names[best]
    whole, naive, *rest = found.ablations
    assert whole.change == 0 and whole.label == found.explained
    assert naive.probability == pytest.approx(float(cases[1][best]), rel=1e-5)
    assert [one.case.split(":")[0] for one in rest[:4]] == ["level 1", "level 1", "level 4", "level 4"]
    assert all(one.change == pytest.approx(one.probability - whole.probability, abs=1e-6) for one in found.ablations)
    assert found.token == tuple(a // 8 for a in pixel)
    assert list(found.maps) == list(MAPS)
    for shares in found.maps.values():
        assert shares.shape == (2, 2, 2) and shares.min() >= 0 and shares.sum() == pytest.approx(1)


def test_points_are_pixels_of_the_slide_as_stored(trained):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 120, 140), dtype=np.uint8)
    fine = ArraySlide(pixels, levels=(1, 4), pixel_size_um=(0.5, 0.5))
    fixed = trained.preprocessing.__class__(
        **{**trained.preprocessing.__dict__, "pixel_size_um": (1.0, 1.0), "is_resampled": True}
    )
    found = explain_point(trained.model, fine, (90, 70), fixed, draws=1, device="cpu")
    assert found.point == (45, 35) and found.pixel_size_um == (1, 1)


def test_what_cannot_be_explained_is_refused(trained, slide):
    for point in ((-1, 3), (90, 3), (3, 3, 3)):
        with pytest.raises(InputError, match="inside of the image, 90 x 70 pixels"):
            explain_point(trained, slide, point)
    with pytest.raises(InputError, match="background, one, two"):
        explain_point(trained, slide, POINT, label="three")


def test_of_a_volume_the_planes_of_the_point_are_drawn():
    torch.manual_seed(0)
    attention = {"attention_mode": "coarse_to_fine", "coarse_copies": "under"}
    sizes = {"levels": (1, 2), "patch_size": 4, "num_layers": 2, "dim": 16, "heads": 1, "ndim": 3}
    encoder = EncoderConfig(in_channels=1, **sizes, **attention)
    model = Segmenter(SegmenterConfig(encoder=encoder, num_classes=3, decoder_widths=(4, 4, 4), stem_width=4))
    volume = ArraySlide(np.random.default_rng(0).integers(0, 256, (1, 20, 24, 28), dtype=np.uint8), levels=(1, 2))
    preprocessing = PREPROCESSING.__class__(**{**PREPROCESSING.__dict__, "crop_size": (8, 8, 8)})
    found = explain_point(model, volume, (9, 12, 14), preprocessing, draws=1, device="cpu")
    assert found.maps["rollout"].shape == (2, 2, 2, 2)
    sheet = draw_explanation(found, size=64)
    assert sheet.width > 2 * 64 and np.asarray(sheet).std() > 0


def test_the_command_leaves_a_page_a_picture_and_numbers(work, tmp_path, capfd):
    command = ["explain", str(work / "model"), str(work / "image.ome.zarr"), "--output", str(tmp_path / "why")]
    more = ["--label", "two", "--draws", "2", "--device", "cpu"]
    assert main([*command, "--at", "40.5,30", *more]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[-1] == str(tmp_path / "why" / "index.html") and out[0].startswith("all views at their true places")
    numbers = json.loads((tmp_path / "why" / "explanation.json").read_text())
    assert numbers["explained"] == "two" and numbers["levels"] == ["1", "4"] and len(numbers["ablations"]) == 10
    assert np.array(numbers["maps"]["rollout"]).shape == (2, 2, 2)
    page = (tmp_path / "why" / "index.html").read_text()
    assert "Why two?" in page and "data:image/png" in page and "http" not in page.replace("http-equiv", "")
    with Image.open(tmp_path / "why" / "explanation.png") as picture:
        assert picture.width > 600
    assert main([*command, "--at", "40.5,30", *more]) == 1 and "exists" in capfd.readouterr().err
    assert main([*command, "--at", "here", *more]) == 1 and "numbers y,x" in capfd.readouterr().err
