import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from lightning import Callback
from PIL import Image

from muvit.data.crops.augment import Augmentation
from muvit.data.crops.normalize import Range
from muvit.data.crops.placement import FreeViews
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.open import open_slide
from muvit.data.splits import SplitConfig
from muvit.data.tables import read_column, write_slides
from muvit.encoders import MuViTEncoder2d
from muvit.errors import ExistsError, InputError
from muvit.inference.classify import classify_slide
from muvit.metrics import class_scores
from muvit.models.classifier import Classifier, ClassifierConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.folder import model_folder
from muvit.models.trained import load_encoder
from muvit.training.datamodules import ClassificationData
from muvit.training.fit import train_classifier
from muvit.training.optim import OptimConfig
from muvit.training.recipes import ClassifyDataConfig, ClassifyRecipe, InitConfig
from muvit.training.run_config import RunConfig
from muvit.training.slides import recipe_slides
from muvit.training.tasks import ClassificationTask

KINDS = ("along", "across", "plain")


def texture(kind, rng):
    """Stripes of one direction, the other, or none, of one mean and one contrast."""
    wave = np.sign(np.sin(np.arange(64) * np.pi / 2 + rng.uniform(0, 6)))
    field = {"along": wave[:, None] * np.ones(64), "across": wave * np.ones((64, 1)), "plain": np.zeros((64, 64))}[kind]
    return (128 + 60 * field + rng.normal(0, 10, (64, 64))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("textures"), np.random.default_rng(0)
    lines = ["name,group"]
    for split, count in (("train", 6), ("val", 3)):
        for i in range(count):
            name, kind = f"{split}{i}", KINDS[i % 3]
            writer = PyramidWriter.create(
                folder / split / "images" / f"{name}.ome.zarr",
                shape=(64, 64),
                num_channels=1,
                dtype=np.uint8,
                levels=(1, 4),
                kind="image",
            )
            writer.write((0, 0), texture(kind, rng)[None])
            writer.finish()
            lines.append(f"{name},{kind}")
    (folder / "slides.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def recipe(data):
    return ClassifyRecipe(
        data=ClassifyDataConfig(
            train=str(data / "train"),
            val=str(data / "val"),
            classes=str(data / "slides.csv"),
            crop_size=16,
            normalization={"kind": "range", "high": 255},
            samples_per_epoch=96,
            val_samples=12,
            batch_size=16,
        ),
        model=ClassifierConfig(
            encoder=EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=32, num_layers=1, heads=2)
        ),
        optim=OptimConfig(lr=5e-3, encoder_lr_factor=1.0, gradient_clip=1.0),
        run=RunConfig(epochs=10, accelerator="cpu", progress=False, pictures=2),
    )


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    return train_classifier(recipe, output), output


def change(recipe, part, **changes):
    return replace(recipe, **{part: replace(getattr(recipe, part), **changes)})


def rows_of(output):
    for log in sorted((output / "logs").iterdir()):
        with (log / "metrics.csv").open(newline="") as lines:
            yield from csv.DictReader(lines)


def test_textures_are_told_apart(finished, data):
    model, output = finished
    assert model == output / "best"
    validated = [row for row in rows_of(output) if row["val_loss"]]
    assert len(validated) == 10
    assert float(validated[-1]["val_auc"]) == 1
    assert float(validated[-1]["val_accuracy"]) == 1
    assert float(validated[-1]["val_crop_accuracy"]) > 0.9
    assert float(validated[-1]["val_loss"]) < 0.5 < float(validated[0]["val_loss"])
    classifier, preprocessing = Classifier.from_folder(model), Preprocessing.load(model)
    assert preprocessing.class_names == ("across", "along", "plain")
    for i, kind in enumerate(KINDS):
        slide = open_slide(data / "val" / "images" / f"val{i}.ome.zarr")
        for num_crops in (5, None):
            found = classify_slide(classifier, slide, preprocessing, num_crops=num_crops, device="cpu")
            assert found.crops.shape == (5 if num_crops else 16, 3)
            assert found.probabilities == pytest.approx(found.crops.mean(0), abs=1e-6)
            assert preprocessing.class_names[found.probabilities.argmax()] == kind
        again = classify_slide(classifier, slide, preprocessing, num_crops=5, batch_size=2, device="cpu")
        assert np.allclose(again.crops, classify_slide(classifier, slide, preprocessing, num_crops=5).crops, atol=1e-5)


def test_a_run_leaves_its_models_settings_and_pictures(finished, recipe):
    output = finished[1]
    assert {f.name for f in output.iterdir()} >= {"best", "last", "logs", "tensorboard", "pictures", "resume"}
    assert Classifier.from_folder(output / "last").config == replace(recipe.model, num_classes=3)
    with Image.open(output / "pictures" / "epoch_0009.png") as picture:
        assert np.asarray(picture).std() > 0
    assert yaml.safe_load((output / "recipe.yaml").read_text())["data"]["column"] == "group"
    assert load_encoder(output).config == recipe.model.encoder


def test_validation_scores_slides_by_the_mean_of_their_crops(recipe):
    crops = ClassificationData(recipe).val_crops
    model = Classifier(ClassifierConfig(encoder=recipe.model.encoder, num_classes=3)).eval()
    task, logged = ClassificationTask(model, recipe.optim), {}
    task.log = lambda name, value, **_: logged.update({name: float(value)})
    samples = [crops[i] for i in range(len(crops))]
    batch = torch.utils.data.default_collate(samples)
    with torch.no_grad():
        task.validation_step({k: v[:5] for k, v in batch.items()}, 0)
        task.validation_step({k: v[5:] for k, v in batch.items()}, 1)
        shares = model(batch["img"], batch["bbox"]).softmax(1).numpy()
    task.on_validation_epoch_end()
    of_slides = np.stack([shares[batch["slide"] == s].mean(0) for s in range(3)])
    classes = np.array([int(batch["class"][batch["slide"] == s][0]) for s in range(3)])
    assert classes.tolist() == [1, 0, 2]
    assert (logged["val_accuracy"], logged["val_auc"]) == pytest.approx(class_scores(of_slides, classes))
    crop_scores = class_scores(shares, batch["class"].numpy())
    assert (logged["val_crop_accuracy"], logged["val_crop_auc"]) == pytest.approx(crop_scores)


class StopAt(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.current_epoch == 1:
            raise RuntimeError("power failure")


def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(recipe, tmp_path):
    recipe = change(recipe, "run", epochs=2, pictures=0, save_every=1)
    train_classifier(recipe, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power failure"):
        train_classifier(recipe, tmp_path / "broken", callbacks=[StopAt()])
    train_classifier(recipe, tmp_path / "broken", resume=True)
    whole, broken = ((tmp_path / run / "last" / "model.safetensors").read_bytes() for run in ("whole", "broken"))
    assert whole == broken
    with pytest.raises(ExistsError, match="--resume"):
        train_classifier(recipe, tmp_path / "whole")


def test_a_frozen_pretrained_encoder_stays_as_it_is(recipe, tmp_path):
    torch.manual_seed(3)
    encoder = MuViTEncoder2d(in_channels=1, levels=(1, 4, 8), patch_size=4, dim=32, num_layers=1, heads=2)
    encoder.save(tmp_path / "encoder")
    frozen = replace(
        change(change(recipe, "run", epochs=1, pictures=0), "data", choice="classes"),
        init=InitConfig(encoder=str(tmp_path / "encoder"), mode="frozen"),
    )
    trained = Classifier.from_folder(model_folder(train_classifier(frozen, tmp_path / "run")))
    expected = encoder.extract_levels((1, 4)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trained.encoder.state_dict().items())


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"placement": "concentric"}, lambda centers: centers),
        # moved back to the border of the image
        (
            {"placement": "free", "free_views": FreeViews(offset_px=((-16, -16), (16, 16)))},
            lambda c: (c + torch.tensor([-16, 16])).clip(16, 48),
        ),
    ],
    ids=["concentric", "free"],
)
@pytest.mark.parametrize("num_crops", [4, None])
def test_coarse_views_lie_in_prediction_where_they_lay_in_training(
    recipe, data, monkeypatch, settings, expected, num_crops
):
    val_samples = num_crops and 3 * num_crops
    geometric = Augmentation(flip_axes=(), box_scale=(1, 1), box_shift_px=0)
    recipe = change(recipe, "data", crop_size=8, val_samples=val_samples, augmentation=geometric, **settings)
    trained = ClassificationData(recipe)
    model = Classifier(ClassifierConfig(encoder=recipe.model.encoder, num_classes=3))
    boxes = [torch.stack([crops[i]["bbox"] for i in range(8)]) for crops in (trained.train_crops, trained.val_crops)]
    monkeypatch.setattr(model, "forward", lambda img, bbox: boxes.append(bbox) or torch.zeros(len(img), 3))
    slide = open_slide(data / "val" / "images" / "val0.ome.zarr")
    classify_slide(model, slide, trained.preprocessing, num_crops=num_crops, device="cpu")
    for fine, coarse in (box.mean(2).unbind(1) for box in boxes):
        assert (coarse - expected(fine)).abs().max() <= 2  # half a coarse pixel
    assert len(boxes) > 2


def test_without_validation_the_last_model_is_the_result(recipe, tmp_path):
    short = change(change(recipe, "run", epochs=1), "data", val=None)
    assert train_classifier(short, tmp_path / "run") == tmp_path / "run" / "last"


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("data", {"column": "disease"}, r"slides\.csv: expected a column 'disease'"),
        ("data", {"val_samples": 2}, r"data\.val_samples: expected at least 3, one of each slide"),
        ("data", {"crop_size": 18}, r"data\.crop_size: expected multiples"),
        ("data", {"augmentation": Augmentation(rotation_degrees=90)}, "expected views with one centre"),
        ("model", {"num_classes": 4}, "expected 4 classes of the training slides, got across, along, plain"),
        ("optim", {"schedule": "plateau"}, r"optim\.schedule: expected cosine"),
        ("data", {"samples_per_epoch": 16, "batch_size": 16, "val": None}, None),
    ],
)
def test_recipes_that_do_not_fit_are_refused_before_anything_is_written(recipe, tmp_path, part, changes, message):
    if message is None:
        with pytest.raises(InputError, match=r"data\.samples_per_epoch: expected at least 32"):
            change(change(recipe, part, **changes), "run", devices=2)
        return
    with pytest.raises(InputError, match=message):
        train_classifier(change(recipe, part, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_slides_without_a_class_or_of_a_new_one_are_refused(recipe, data, tmp_path):
    lines = (data / "slides.csv").read_text().splitlines()
    (tmp_path / "missing.csv").write_text("\n".join(lines[:3]))
    (tmp_path / "new.csv").write_text("\n".join(line.replace("val1,across", "val1,dots") for line in lines))
    with pytest.raises(InputError, match=r"missing\.csv, group: expected a value for every slide, got none for 'tr"):
        train_classifier(change(recipe, "data", classes=str(tmp_path / "missing.csv")), tmp_path / "run")
    with pytest.raises(InputError, match=r"new\.csv: expected classes of the training slides: .*, got dots"):
        train_classifier(change(recipe, "data", classes=str(tmp_path / "new.csv")), tmp_path / "run")


def test_levels_that_a_slide_lacks_are_computed_as_a_pyramid_would_store_them(data, tmp_path, caplog):
    stored = open_slide(data / "val" / "images" / "val0.ome.zarr")
    Image.fromarray(stored.read(1, (0, 0), stored.shape)[0]).save(tmp_path / "val0.png")
    torch.manual_seed(0)
    encoder = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=8, num_layers=1, heads=1)
    model = Classifier(ClassifierConfig(encoder=encoder, num_classes=3))
    settings = Preprocessing(
        crop_size=(16, 16), normalization=Range(high=255), class_names=KINDS, class_colors=((0, 0, 0),) * 3
    )
    expected, found = (
        classify_slide(model, slide, settings, num_crops=4) for slide in (stored, open_slide(tmp_path / "val0.png"))
    )
    np.testing.assert_array_equal(found.crops, expected.crops)
    assert [message.count("`muvit convert --levels` would store them") for message in caplog.messages] == [1]


def test_slides_are_divided_by_class_and_listed_in_tables(recipe, data, tmp_path):
    split = change(recipe, "data", val=None, split=SplitConfig(val=0.5, by="slide"))
    sets = recipe_slides(split)
    classes = read_column(data / "slides.csv", "group")
    for slides in (sets["train"], sets["val"]):
        assert sorted(classes[slide.name] for slide in slides) == sorted(KINDS)
    slides = [replace(one, split=name) for name in ("train", "val") for one in sets[name]]
    write_slides(tmp_path / "slides.csv", slides)
    listed = recipe_slides(change(recipe, "data", train=str(tmp_path / "slides.csv"), val=None))
    assert [[one.name for one in listed[k]] for k in ("train", "val")] == [
        [one.name for one in sets[k]] for k in ("train", "val")
    ]
    with pytest.raises(InputError, match=r"run\.folds: expected none, but in the training of a segmentation model"):
        change(recipe, "run", folds=3)
