from dataclasses import replace
from math import isnan

import numpy as np
import pytest
import torch

from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.pyramids.writer import PyramidWriter
from muvit.encoders import MuViTEncoder2d
from muvit.errors import InputError
from muvit.evaluation.studies import probe
from muvit.evaluation.studies.probe import ProbeConfig, draw_probe, study_probe
from muvit.models.hierarchy import RegionConfig, RegionEncoder

PREPROCESSING = Preprocessing(crop_size=(16, 16), normalization=Range(high=255), class_names=(), class_colors=())
CONFIG = ProbeConfig(train_crops=3, test_crops=4, neighbors=3)


def write_images(folder, names, brightness, seed):
    rng = np.random.default_rng(seed)
    for name in names:
        pixels = rng.normal(brightness(name), 20, (1, 48, 48)).clip(0, 255).astype(np.uint8)
        writer = PyramidWriter.create(
            folder / "images" / f"{name}.ome.zarr",
            shape=(48, 48),
            num_channels=1,
            dtype=np.uint8,
            levels=(1, 4),
            kind="image",
        )
        writer.write((0, 0), pixels)
        writer.finish()
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("probe")
    return [
        write_images(root / part, [f"{part}{i}" for i in range(6)], lambda name: 60 + 60 * (int(name[-1]) % 3), seed)
        for seed, part in enumerate(("train", "test"))
    ]


@pytest.fixture
def classes():
    return {f"{part}{i}": "abc"[i % 3] for part in ("train", "test") for i in range(6)}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return MuViTEncoder2d(in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=1, heads=2)


def study(encoder, folders, classes, config=CONFIG, **options):
    return study_probe("tiny", encoder, PREPROCESSING, *folders, classes, config, device="cpu", **options)


def test_classes_that_show_in_the_pixels_are_found_and_random_ones_are_not(encoder, folders, classes):
    scores = study(encoder, folders, classes)
    assert [(s.classifier, s.unit) for s in scores] == [
        ("logistic regression", "crop"),
        ("logistic regression", "slide"),
        ("kNN", "crop"),
        ("kNN", "slide"),
    ]
    assert all(s.mean_auc > 0.95 for s in scores)
    assert scores[1].accuracy == 1
    assert set(scores[0].auc) == {"a", "b", "c"}
    shuffled = classes | {f"test{i}": "abc"[(i // 2) % 3] for i in range(6)}
    assert study(encoder, folders, shuffled)[0].mean_auc < 0.8


def test_a_region_encoder_is_probed_alike(folders, classes):
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "grid": 2, "patch_size": 8, "token_size": 4, "dim": 16, "region_dim": 8}
    blocks = {"num_layers": 1, "heads": 2, "region_layers": 1, "region_heads": 2}
    region = RegionEncoder(RegionConfig(**sizes, **blocks))
    assert study(region, folders, classes)[0].mean_auc > 0.9


@pytest.fixture
def kept(monkeypatch):
    """Features and targets of every study."""
    kept, classify = [], probe._classify

    def keep(name, known, features, targets, config):
        kept.append((features, targets))
        return classify(name, known, features, targets, config)

    monkeypatch.setattr(probe, "_classify", keep)
    return kept


@pytest.mark.parametrize("pooling, width", [("mean", 16), ("levels", 32)])
def test_features_are_means_of_tokens_of_so_many_crops(encoder, folders, classes, kept, pooling, width):
    seen = []
    study(encoder, folders, classes, replace(CONFIG, pooling=pooling), progress=lambda *n: seen.append(n))
    ((features, targets),) = kept
    assert [f.shape for f in features] == [(6 * 3, width), (6 * 4, width)]
    assert targets[0].tolist() == np.repeat([0, 1, 2, 0, 1, 2], 3).tolist()
    assert seen[-1] == (42, 42)
    assert len(np.unique(features[0], axis=0)) == 18


def test_crops_follow_from_the_seed_and_not_from_the_batches(encoder, folders, classes, kept):
    for fields in ({}, {"batch_size": 1}, {"seed": 1}):
        study(encoder, folders, classes, replace(CONFIG, **fields))
    one, same, other = (features[0] for features, _ in kept)
    assert np.allclose(one, same, atol=1e-5)
    assert not np.allclose(one, other, atol=1e-2)


def test_naive_boxes_hide_the_places(encoder, folders, classes, monkeypatch):
    seen = []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda img, bbox: seen.append(bbox) or forward(img, bbox))
    study(encoder, folders, classes, replace(CONFIG, boxes="naive"))
    assert seen and all(bbox is None for bbox in seen)


def test_a_class_that_no_test_image_has_gets_no_score(encoder, folders, classes):
    fewer = classes | {"test2": "a", "test5": "b"}
    (first, *_) = study(encoder, folders, fewer)
    assert isnan(first.auc["c"]) and not isnan(first.mean_auc)
    assert np.asarray(draw_probe([first])).std() > 0


def test_classes_that_do_not_fit_are_refused(encoder, folders, classes):
    with pytest.raises(InputError, match="classes: expected a value for every slide, got none for 'train3'"):
        study(encoder, folders, {k: v for k, v in classes.items() if k != "train3"})
    with pytest.raises(InputError, match=r"and all those of the test images, got .* not new"):
        study(encoder, folders, classes | {"test1": "new"})
    with pytest.raises(InputError, match="expected at least two"):
        study(encoder, folders, dict.fromkeys(classes, "a"))


def test_a_missing_package_is_named(monkeypatch, encoder, folders, classes):
    monkeypatch.setattr("muvit.errors.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"scikit-learn, got none installed\. Install it with: .*muvit\[probe\]"):
        study(encoder, folders, classes)
