from dataclasses import replace

import numpy as np
import pytest
import torch

from muvit.data.crops.crops import NestedCrops
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import CropConfig, Preprocessing
from muvit.data.folders import open_folder
from muvit.data.pyramids.writer import PyramidWriter
from muvit.errors import InputError
from muvit.evaluation.studies.reconstruction import PretrainedModel, draw_reconstruction, study_reconstruction
from muvit.mae import MuViTMAE2d

PREPROCESSING = Preprocessing(crop_size=(16, 16), normalization=Range(high=255), class_names=(), class_colors=())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(2):
        writer = PyramidWriter.create(
            folder / "images" / f"{i}.ome.zarr",
            shape=(96, 96),
            num_channels=1,
            dtype=np.uint8,
            levels=(1, 2, 4),
            kind="image",
        )
        writer.write((0, 0), np.random.default_rng(i).integers(0, 255, (1, 96, 96), dtype=np.uint8))
        writer.finish()
    return folder


def mae(levels, **fields):
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "num_layers": 1, "dim": 16, "heads": 2, "num_layers_decoder": 2, "dim_decoder": 16}
    return MuViTMAE2d(in_channels=1, levels=levels, **sizes | fields)


def entry(levels, boxes="true", **fields):
    return PretrainedModel(model=mae(levels, **fields), preprocessing=PREPROCESSING, trained_boxes=boxes)


def study(models, images, **options):
    return study_reconstruction(models, images, num_crops=10, batch_size=4, device="cpu", **options)


def test_every_model_is_tried_with_its_boxes_and_one_with_true_boxes_also_without(images):
    seen = []
    models = {"ours": entry((1, 4)), "naive": entry((1, 4), "naive"), "single": entry((4,))}
    results = study(models, images, progress=lambda *n: seen.append(n))
    assert [(r.name, r.trained_boxes, r.boxes) for r in results] == [
        ("ours", "true", "true"),
        ("ours", "true", "naive"),
        ("naive", "naive", "naive"),
        ("single", "true", "true"),
        ("single", "true", "naive"),
    ]
    assert seen[-1] == (15, 15)
    assert [list(r.errors) for r in results] == [[1, 4]] * 3 + [[4]] * 2
    # the same weights: only the boxes make a difference
    assert results[1].errors == results[2].errors != results[0].errors
    assert results[3].errors == pytest.approx(results[4].errors)  # one level has no relative places
    assert [r.title for r in results[:3]] == [
        "ours, true boxes",
        "ours, naive boxes at inference",
        "naive, naive boxes",
    ]
    assert results[0].rows()[1]["level"] == "4"
    assert np.asarray(draw_reconstruction(results)).std() > 0


def test_errors_are_means_over_the_masked_patches_of_the_crops(images):
    model = mae((1, 4)).eval()
    (result, _) = study({"ours": entry((1, 4))}, images, seed=3)
    slides = [(slide, None) for slide in open_folder(images / "images").values()]
    config = CropConfig(levels=(1, 4), size=(16, 16), normalization=Range(high=255))
    crops = NestedCrops(slides, config, samples_per_epoch=10, seed=3)
    total = torch.zeros(2)
    for number, first in enumerate((0, 4, 8)):
        batch = torch.utils.data.default_collate([crops[i] for i in range(first, min(first + 4, 10))])
        masks = torch.Generator().manual_seed(3 + number)
        with torch.no_grad():
            found = model(batch["img"], batch["bbox"], consistent_levels=True, rng_generator=masks, return_all=True)
        hidden = found["mask"].float()
        error = ((found["reco"] - batch["img"]).square() * hidden).sum((2, 3, 4)) / hidden.sum((2, 3, 4))
        total += error.sum(0)
    assert list(result.errors.values()) == pytest.approx((total / 10).tolist(), rel=1e-4)


def test_common_levels_are_seen_and_masked_alike_whatever_else_a_model_has(images, monkeypatch):
    seen = {}
    models = {"two": entry((1, 4)), "three": entry((1, 2, 4)), "one": entry((4,))}
    for name, made in models.items():
        forward = made.model.forward

        def watch(img, bbox, *, name=name, forward=forward, **options):
            result = forward(img, bbox, return_all=True, **options)
            seen.setdefault(name, []).append((img[:, -1], result["mask"][:, -1]))
            return result

        monkeypatch.setattr(made.model, "forward", watch)
    study(models, images)
    for (img, mask), (other_img, other_mask), (last_img, last_mask) in zip(*seen.values(), strict=True):
        assert torch.equal(img, other_img) and torch.equal(img, last_img)
        assert torch.equal(mask, other_mask) and torch.equal(mask, last_mask)


@pytest.mark.parametrize("what", ["crop_size", "normalization", "loss"])
def test_models_that_cannot_be_compared_are_refused(images, what):
    other = entry((1, 4), **({"loss": "norm_mse"} if what == "loss" else {}))
    changes = {"crop_size": {"crop_size": (32, 32)}, "normalization": {"normalization": Range(high=9)}}
    other = replace(other, preprocessing=replace(PREPROCESSING, **changes.get(what, {})))
    with pytest.raises(InputError, match=r"other: expected .* as ours has"):
        study({"ours": entry((1, 4)), "other": other}, images)
