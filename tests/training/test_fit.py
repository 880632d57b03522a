import csv
import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from lightning import Callback
from PIL import Image

from muvit.data.crops.augment import Augmentation
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.crops.stain import Macenko, measure_stains
from muvit.data.crops.stored import finish
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.open import open_slide
from muvit.data.synthetic.images import STORE, SyntheticConfig, write_synthetic
from muvit.errors import ExistsError, InputError, MuViTError, ReadError
from muvit.geometry import box_size
from muvit.locks import sole_writer
from muvit.metrics import Scores, scores
from muvit.models.baselines import BaselineConfig
from muvit.models.card import read_card
from muvit.models.encoder import EncoderConfig
from muvit.models.relay.config import RelayConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import build_model
from muvit.training import runs
from muvit.training.callbacks import SaveBestAndLast
from muvit.training.datamodules import SegmentationData
from muvit.training.fit import train_segmenter
from muvit.training.optim import OptimConfig
from muvit.training.recipes import DataConfig, InitConfig, LossConfig, Recipe
from muvit.training.run_config import RunConfig
from muvit.training.slides import complete, count_classes

STEPS_PER_EPOCH = 3


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    return write_synthetic(
        folder / "set", num_train=2, num_val=1, num_test=1, config=SyntheticConfig.small(), workers=1
    )


@pytest.fixture(scope="module")
def recipe(slides):
    return Recipe(
        data=DataConfig(
            train=str(slides / "train"),
            val=str(slides / "val"),
            crop_size=32,
            samples_per_epoch=4 * STEPS_PER_EPOCH,
            val_samples=4,
            batch_size=4,
        ),
        model=SegmenterConfig(
            encoder=EncoderConfig(
                in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=2, heads=2, dropout=0.1
            ),
            num_classes=3,
            decoder_widths=(8, 8, 4),
            stem_width=4,
        ),
        run=RunConfig(epochs=2, accelerator="cpu", progress=False, pictures=2, save_every=1),
    )


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    model = train_segmenter(recipe, output)
    return model, output


class StopAt(Callback):
    """The power fails in the middle of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch and trainer.global_step % STEPS_PER_EPOCH == 2:
            raise RuntimeError("power failure")


def log_rows(output):
    for log in sorted((output / "logs").iterdir()):
        with (log / "metrics.csv").open(newline="") as lines:
            yield from csv.DictReader(lines)


def change(recipe, part, **changes):
    return replace(recipe, **{part: replace(getattr(recipe, part), **changes)})


def change_encoder(recipe, **changes):
    return change(recipe, "model", encoder=replace(recipe.model.encoder, **changes))


def test_a_run_leaves_its_models_settings_logs_and_pictures(finished, recipe):
    model, output = finished
    assert model == output / "best"
    assert {f.name for f in output.iterdir()} >= {"best", "last", "logs", "tensorboard", "pictures", "resume"}
    for name in ("best", "last"):
        files = sorted(f.name for f in (output / name).iterdir())
        assert files == ["README.md", "config.yaml", "model.safetensors", "preprocessing.yaml"]
        assert Segmenter.from_folder(output / name).config == recipe.model
        card = read_card(output / name)
        assert (card.levels, card.channels, card.kind) == (recipe.model.levels, recipe.model.in_channels, "muvit")
        assert card.classes == Preprocessing.load(output / name).class_names
        assert 0 <= card.scores["val_mdsc"] <= 1 and card.provenance["seed"] == recipe.run.seed
        assert card.data["slides to train on"] > 0 and card.data["from"].endswith("/train")
        assert recipe.data.train not in (output / name / "README.md").read_text()  # where it lies is nobody's business
    pictures = sorted((output / "pictures").iterdir())
    assert [f.name for f in pictures] == ["epoch_0000.png", "epoch_0001.png", "worst_and_best.png"]
    detail, kept = json.loads((output / "validation.json").read_text()), read_card(output / "best").scores
    confusion = np.sum([slide["confusion"] for slide in detail["slides"]], axis=0)
    assert scores(confusion).mean_dice == pytest.approx(kept["val_mdsc"])  # of the weights that were kept
    with Image.open(pictures[0]) as picture:
        assert np.asarray(picture).std() > 0
    settings = yaml.safe_load((output / "recipe.yaml").read_text())
    assert settings["data"]["samples_per_epoch"] == 12
    assert settings["model"]["encoder"]["levels"] == [1, 4]


def test_the_log_holds_losses_scores_and_rates(finished):
    rows = list(log_rows(finished[1]))
    logged = {name for row in rows for name, value in row.items() if value}
    assert {"epoch", "step", "train_loss", "val_loss", "val_mdsc", "val_dice/background"} <= logged
    assert any(name.startswith("lr-") for name in logged)
    validated = [row for row in rows if row["val_loss"]]
    assert [(int(row["epoch"]), int(row["step"])) for row in validated] == [(0, 2), (1, 5)]
    assert all(float(row["val_loss"]) > 0 for row in validated)


def test_without_a_background_every_class_enters_the_means_and_the_dice_loss(recipe, tmp_path):
    recipe = change(change(recipe, "data", has_background=False), "run", epochs=1, pictures=0)
    losses = []

    class Watch(Callback):
        def on_train_end(self, trainer, task):
            losses.append(task.loss.has_background)

    model = train_segmenter(recipe, tmp_path / "run", callbacks=[Watch()])
    assert losses == [False]
    assert not Preprocessing.load(model).has_background
    (row,) = (row for row in log_rows(tmp_path / "run") if row["val_mdsc"])
    dice = [float(value) for name, value in row.items() if name.startswith("val_dice/") and value]
    assert float(row["val_mdsc"]) == pytest.approx(np.mean(dice))
    assert row["val_mean_iou"] == row["val_mean_foreground_iou"]


def test_the_last_model_is_the_one_in_the_checkpoint(finished):
    stored = torch.load(finished[1] / "resume" / "last.ckpt", weights_only=True)["state_dict"]
    kept = Segmenter.from_folder(finished[1] / "last").state_dict()
    assert all(torch.equal(stored[f"model.{name}"], value) for name, value in kept.items())


def test_what_prediction_needs_lies_beside_the_weights(finished):
    preprocessing = Preprocessing.load(finished[0])
    assert preprocessing.crop_size == (32, 32)
    assert preprocessing.class_names == ("background", "outer cell", "inner cell")
    assert preprocessing.class_colors[1:] == tuple(STORE.label_colors[i][:3] for i in (1, 2))


def test_every_epoch_shows_new_crops_in_their_order(recipe, tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, task, batch, *_):
            self.seen += batch["img"]

    watch = Watch()
    train_segmenter(change(recipe, "run", pictures=0), tmp_path / "run", callbacks=[watch])
    crops = SegmentationData(recipe, build_model(recipe.model).views).train_crops
    assert len(watch.seen) == 2 * 4 * STEPS_PER_EPOCH
    assert all(torch.equal(img, crops[i]["img"]) for i, img in enumerate(watch.seen))
    assert len({img.numpy().tobytes() for img in watch.seen}) == len(watch.seen)


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(finished, recipe, tmp_path):
    expected = (finished[1] / "last" / "model.safetensors").read_bytes()
    train_segmenter(recipe, tmp_path / "again")
    assert (tmp_path / "again" / "last" / "model.safetensors").read_bytes() == expected
    train_segmenter(change(recipe, "run", seed=1), tmp_path / "other")
    assert (tmp_path / "other" / "last" / "model.safetensors").read_bytes() != expected


@pytest.mark.parametrize("val_every", [1, 2])
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(recipe, tmp_path, val_every):
    recipe = change(recipe, "run", epochs=4, val_every=val_every, pictures=0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_segmenter(recipe, whole)
    with pytest.raises(RuntimeError, match="power failure"):
        train_segmenter(recipe, broken, callbacks=[StopAt(2)])
    model = train_segmenter(recipe, broken, resume=True)
    assert model == broken / "best"
    for name in ("last", "best"):
        for file in (whole / name).iterdir():
            assert (broken / name / file.name).read_bytes() == file.read_bytes()
    scores = [[(row["step"], row["val_mdsc"]) for row in log_rows(run) if row["val_mdsc"]] for run in (whole, broken)]
    assert scores[0] == scores[1]
    assert [int(step) for step, _ in scores[0]] == [STEPS_PER_EPOCH * n - 1 for n in range(val_every, 5, val_every)]


class Steps(Callback):
    """Epoch and number of every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, *_):
        self.steps.append((trainer.current_epoch, trainer.global_step))


class SignalAt(StopAt):
    """Somebody stops the process in the middle of an epoch."""

    def __init__(self, epoch, number):
        super().__init__(epoch)
        self.number = number

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch and trainer.global_step % STEPS_PER_EPOCH == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_that_is_told_to_stop_saves_its_state_and_goes_on_from_there(finished, recipe, tmp_path, number, epoch):
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a shell takes from what it does not wait for
    try:
        with pytest.raises(KeyboardInterrupt) as stopped:
            train_segmenter(recipe, tmp_path / "run", callbacks=[SignalAt(epoch, number)])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    (note,) = stopped.value.__notes__
    assert note == f"The run in {tmp_path / 'run'} can be resumed with --resume."
    assert (tmp_path / "run" / "last").exists() == (epoch == 1)
    seen = Steps()
    train_segmenter(recipe, tmp_path / "run", resume=True, callbacks=[seen])
    assert seen.steps[0] == (epoch, STEPS_PER_EPOCH * epoch + 2)
    weights = [(run / "last" / "model.safetensors").read_bytes() for run in (finished[1], tmp_path / "run")]
    assert weights[0] == weights[1]


def test_a_run_that_fails_before_its_first_state_says_so(recipe, tmp_path):
    with pytest.raises(RuntimeError, match="power failure") as stopped:
        train_segmenter(recipe, tmp_path / "run", callbacks=[StopAt(0)])
    said = f"The run in {tmp_path / 'run'} has not saved its state yet: restart it with --overwrite."
    assert stopped.value.__notes__ == [said]


def test_resuming_goes_on_at_the_next_epoch(recipe, tmp_path):
    watch = Steps()
    with pytest.raises(RuntimeError, match="power failure"):
        train_segmenter(recipe, tmp_path / "run", callbacks=[StopAt(1)])
    train_segmenter(recipe, tmp_path / "run", resume=True, callbacks=[watch])
    assert watch.steps == [(1, 3), (1, 4), (1, 5)]


def test_a_finished_run_can_be_made_longer(recipe, tmp_path):
    short = change(recipe, "run", epochs=1, pictures=0)
    train_segmenter(short, tmp_path / "run")
    train_segmenter(change(short, "run", epochs=2), tmp_path / "run", resume=True)
    assert [int(row["step"]) for row in log_rows(tmp_path / "run") if row["val_mdsc"]] == [2, 5]
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["run"]["epochs"] == 2


@pytest.mark.parametrize(
    "part, changes",
    [
        ("optim", {"lr": 1e-3}),
        ("data", {"batch_size": 2}),
        ("loss", {"dice_weight": 0.5}),
        ("model", {"boxes": "naive"}),
        ("run", {"seed": 5}),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(finished, recipe, part, changes):
    before = (finished[1] / "last" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=rf"recipe\.yaml: expected the settings .* got others in {part}"):
        train_segmenter(change(recipe, part, **changes), finished[1], resume=True)
    assert (finished[1] / "last" / "model.safetensors").read_bytes() == before


def test_what_was_never_begun_cannot_be_resumed(recipe, tmp_path):
    with pytest.raises(InputError, match="expected an interrupted run, to resume it"):
        train_segmenter(recipe, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_a_run_is_overwritten_only_when_asked_and_only_if_it_is_one(finished, recipe, tmp_path):
    with pytest.raises(ExistsError, match=r"--resume .* --overwrite"):
        train_segmenter(recipe, finished[1])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.txt").write_text("dear")
    with pytest.raises(ExistsError):
        train_segmenter(recipe, tmp_path / "photos")
    with pytest.raises(InputError, match="expected a run to overwrite"):
        train_segmenter(recipe, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "holiday.txt").read_text() == "dear"
    (tmp_path / "file").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(MuViTError):
            train_segmenter(recipe, tmp_path / "file", overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "dear"


def test_overwriting_begins_afresh(recipe, tmp_path):
    run = tmp_path / "run"
    quick = change(recipe, "run", epochs=1, pictures=0)
    train_segmenter(quick, run)
    (run / "stale").touch()
    train_segmenter(quick, run, overwrite=True)
    assert not (run / "stale").exists()
    assert len(list((run / "logs").iterdir())) == 1


def test_without_validation_the_last_model_is_the_result(recipe, tmp_path):
    blind = change(change(recipe, "data", val=None), "run", epochs=1)
    assert train_segmenter(blind, tmp_path / "run") == tmp_path / "run" / "last"
    assert not (tmp_path / "run" / "best").exists()
    assert not (tmp_path / "run" / "pictures").exists()


def test_the_best_model_is_the_one_of_the_highest_score(tmp_path, recipe):
    class Stub:
        is_global_zero = True

        def __init__(self, score):
            self.callback_metrics = {} if score is None else {"val_mdsc": torch.tensor(score)}

    saved = []
    keep = SaveBestAndLast(tmp_path, None)
    keep._save = lambda *given: saved.append(given[-1])
    for score in (0.5, 0.4, float("nan"), None, 0.6):
        saved.append(score)
        keep.on_train_epoch_end(Stub(score), None)
    assert saved[:8] == [0.5, "last", "best", 0.4, "last", *saved[5:8]]
    assert saved.count("best") == 2
    assert saved[-2:] == ["last", "best"]
    resumed = SaveBestAndLast(tmp_path, None)
    resumed.load_state_dict(keep.state_dict())
    assert resumed.best == pytest.approx(0.6)


def test_augmentation_and_balance_reach_the_crops(recipe):
    plain = change(recipe, "data", augmentation=Augmentation.geometric(), balance="classes", foreground_fraction=1.0)
    crops = SegmentationData(plain, build_model(plain.model).views).train_crops
    assert all((crops[i]["label"] > 0).any() for i in range(8))
    widths = [crops[i]["bbox"][:, 1] - crops[i]["bbox"][:, 0] for i in range(4)]
    assert all(w.tolist() == [[32, 32], [128, 128]] for w in widths)


def test_batches_hold_the_bytes_of_the_slides_until_the_task_finishes_them(recipe):
    data = SegmentationData(recipe, build_model(recipe.model).views)
    for loader, crops in ((data.train_dataloader(), data.train_crops), (data.val_dataloader(), data.val_crops)):
        batch = next(iter(loader))
        assert batch["img"].dtype == torch.uint8
        assert torch.equal(finish(batch)["img"], torch.stack([crops[i]["img"] for i in range(len(batch["img"]))]))


def bad_recipes():
    yield "no folder", lambda r, _: change(r, "data", train="nowhere"), ReadError, "nowhere"
    yield "no validation folder", lambda r, _: change(r, "data", val="nowhere"), ReadError, "nowhere"
    yield "channels", lambda r, _: change_encoder(r, in_channels=3), InputError, r"\.ome\.zarr: expected 3 channel"
    yield "classes", lambda r, _: change(r, "model", num_classes=2), InputError, r"label values from 0 to 1, got 2"
    yield (
        "crop",
        lambda r, _: change(r, "data", crop_size=30),
        InputError,
        r"multiples of \(4, 4\), as the model takes, got \(30, 30\)",
    )
    yield (
        "an encoder for another network",
        lambda r, _: replace(r, init=InitConfig(encoder="e"), model=BaselineConfig(kind="unet")),
        InputError,
        "init: expected model.kind muvit",
    )
    yield (
        "a schedule without scores",
        lambda r, _: replace(change(r, "data", val=None), optim=OptimConfig(schedule="plateau")),
        InputError,
        "data.val: expected slides",
    )
    for names in ((), ("", "a", "b"), ("a", "a", "b")):
        yield (
            f"class names {names}",
            lambda r, _, names=names: change(r, "data", class_names=names),
            InputError,
            "data.class_names: expected 3 different names",
        )
    yield "crop axes", lambda r, _: change(r, "data", crop_size=(32, 32, 32)), InputError, "crop_size"
    yield "no crop", lambda r, _: change(r, "data", crop_size=0), InputError, "size"
    yield "level order", lambda r, _: change_encoder(r, levels=(4, 1)), InputError, "ascending order"
    yield (
        "names",
        lambda r, _: change(r, "data", class_names=("a", "b")),
        InputError,
        "class_names: expected 3 different names",
    )
    yield (
        "normalization",
        lambda r, _: change(r, "data", normalization={"kind": "whiten"}),
        InputError,
        "normalization: expected a kind out of",
    )
    yield (
        "class weights",
        lambda r, _: replace(r, loss=LossConfig(class_weights=(1.0, 2.0))),
        InputError,
        "class_weights: expected 3",
    )
    yield "no labels", lambda r, path: change(r, "data", train=str(unlabelled(path))), MuViTError, "no labels for"
    yield "truncated", lambda r, path: change(r, "data", train=str(truncated(path))), ReadError, "a.png"
    yield "dtype", lambda r, path: change(r, "data", train=str(float_labels(path))), InputError, "integer type"


def write(path, pixels, kind):
    writer = PyramidWriter.create(
        path, shape=pixels.shape, num_channels=1, dtype=pixels.dtype, levels=(1, 4), kind=kind
    )
    writer.write((0, 0), pixels[None])
    writer.finish()


def unlabelled(folder):
    pixels = np.zeros((128, 128), np.uint8)
    for name in ("images/a", "images/b", "labels/a"):
        write(folder / f"{name}.ome.zarr", pixels, "label" if "labels" in name else "image")
    return folder


def truncated(folder):
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.zeros((128, 128), np.uint8)).save(folder / name / "a.png")
        (folder / name / "a.png").write_bytes((folder / name / "a.png").read_bytes()[:40])
    return folder


def float_labels(folder):
    write(folder / "images" / "a.ome.zarr", np.zeros((128, 128), np.uint8), "image")
    write(folder / "labels" / "a.ome.zarr", np.zeros((128, 128), np.float32), "image")
    return folder


@pytest.mark.parametrize("spoil, error, message", [pytest.param(*rest, id=name) for name, *rest in bad_recipes()])
def test_bad_input_is_refused_before_anything_is_written(recipe, tmp_path, spoil, error, message):
    with pytest.raises(error, match=message):
        train_segmenter(spoil(recipe, tmp_path / "data"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "part, field, value",
    [
        ("data", "samples_per_epoch", 0),
        ("data", "val_samples", 0),
        ("data", "batch_size", 0),
        ("data", "batch_size", 100),
        ("data", "num_workers", -1),
        ("data", "foreground_fraction", 2.0),
        ("data", "padding", "mirror"),
        ("data", "balance", "evenly"),
        ("run", "epochs", 0),
        ("run", "devices", 0),
        ("run", "val_every", 0),
        ("run", "min_epochs", 0),
        ("run", "pictures", -1),
        ("run", "seed", -1),
        ("run", "accelerator", "abacus"),
    ],
)
def test_settings_that_do_not_fit_are_refused(recipe, tmp_path, part, field, value):
    with pytest.raises(InputError):
        train_segmenter(change(recipe, part, **{field: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_views_of_one_centre_are_scaled_and_turned_in_training_alone(recipe):
    similar = Augmentation(box_scale=(1, 1), box_shift_px=0, scale=(0.5, 2), rotation_degrees=90)
    recipe = change(recipe, "data", placement="concentric", augmentation=similar, val_samples=None)
    data = SegmentationData(recipe, build_model(recipe.model).views)
    assert data.preprocessing.placement == "concentric"
    sides = {round(float(box_size(data.train_crops[i]["bbox"])[0, 0]), 3) for i in range(12)}
    assert 32 in sides
    assert len(sides) > 3
    sample = data.val_crops[0]  # in a corner, which its context leaves
    assert sample["bbox"].tolist() == [[[0, 0], [32, 32]], [[-48, -48], [80, 80]]]
    with pytest.raises(InputError, match="expected views with one centre, placement concentric, got placement nested"):
        SegmentationData(change(recipe, "data", placement="nested"), build_model(recipe.model).views)


def test_statistics_of_the_training_slides_are_kept_for_prediction(recipe):
    recipe = change(recipe, "data", normalization={"kind": "standardize", "local_mean": [0]})
    data = SegmentationData(recipe, build_model(recipe.model).views)
    pixels = np.stack([image.read(1, (0, 0), image.shape) for image, _ in data.train_slides])
    kept = data.preprocessing.normalization
    assert kept.mean == pytest.approx((pixels.mean(),), rel=0.1)
    assert kept.std == pytest.approx((pixels.std(),), rel=0.1)
    assert kept.local_mean == (0,)
    assert abs(data.train_crops[0]["img"].mean()) < 0.1 + abs(data.train_crops.augmentation.offset[1])


def test_the_stains_of_the_training_slides_are_kept_for_prediction(recipe, tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for name in ("a", "b"):
        amount = rng.uniform(0, 1.5, (2, 1, 128, 128))
        density = amount[0] * [[[0.6]], [[0.7]], [[0.4]]] + amount[1] * [[[0.1]], [[0.9]], [[0.3]]]
        pixels = (255 * np.exp(-density)).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(rng.integers(0, 3, (128, 128)).astype(np.uint8)).save(tmp_path / "labels" / f"{name}.png")
    recipe = change(recipe, "data", train=str(tmp_path), val=None, normalization={"kind": "macenko"})
    recipe = change_encoder(recipe, in_channels=3)
    data = SegmentationData(recipe, build_model(recipe.model).views)
    kept = Preprocessing.from_plain(yaml.safe_load(data.preprocessing.to_yaml()))
    assert kept == data.preprocessing
    slides = [image for image, _ in data.train_slides]
    assert kept.normalization == measure_stains(Macenko, slides)
    img = data.train_crops[0]["img"]
    assert torch.isfinite(img).all() and 0.1 < img.mean() < 1


@pytest.mark.parametrize(("least", "epochs"), [(1, 3), (5, 5)])
def test_training_stops_when_the_score_rises_no_more(recipe, tmp_path, monkeypatch, least, epochs):
    always = Scores(dice=np.full(3, 0.5), iou=np.full(3, 0.5), accuracy=0.5)
    monkeypatch.setattr("muvit.training.tasks.scores", lambda confusion, **_: always)

    class Count(Callback):
        epochs = 0

        def on_train_epoch_end(self, trainer, task):
            self.epochs += 1

    watch = Count()
    run = replace(recipe.run, epochs=9, early_stop=2, min_epochs=least, pictures=0)
    train_segmenter(replace(recipe, run=run), tmp_path / "run", callbacks=[watch])
    assert watch.epochs == epochs  # the first is the best, and two more are no better


@pytest.mark.parametrize(
    ("placement", "changes", "is_told"),
    [
        ("nested", {}, True),
        ("concentric", {}, False),
        ("nested", {"relay_tokens": 0}, False),
        ("nested", {"fusion": "decision"}, False),
        ("nested", {"levels": (1,)}, False),
        ("nested", {"exchange": "world"}, False),
    ],
)
def test_relay_tokens_with_views_that_lie_anywhere_are_told(recipe, caplog, placement, changes, is_told):
    relay = RelayConfig(
        **{"backbone": "vit_tiny_patch16_224", "timm_options": {"depth": 1}, "levels": (1, 4)} | changes
    )
    coupled = complete(replace(change(recipe, "data", placement=placement), model=relay))
    SegmentationData(coupled, build_model(coupled.model).views)
    assert ["data.placement" in record.message for record in caplog.records] == [True] * is_told


def test_channels_and_classes_come_from_the_data(recipe):
    unset = change(change_encoder(recipe, in_channels=None), "model", num_classes=None)
    assert complete(unset) == recipe
    unet = complete(replace(recipe, model=BaselineConfig(kind="unet", levels=(1, 4))))
    assert (unet.model.in_channels, unet.model.num_classes, unet.model.size) == (1, 3, (32, 32))
    named = change(unset, "data", class_names=("a", "b", "c", "d"))
    assert complete(named).model.num_classes == 4


def test_a_run_that_another_process_trains_is_left_alone(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "sole_writer", partial(sole_writer, wait_s=0))
    with sole_writer(tmp_path / "run"), pytest.raises(InputError, match="that no other process is writing"):
        train_segmenter(recipe, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_modern_preset_changes_what_is_left_at_the_papers_values(recipe):
    assert recipe.preset == "paper" and complete(recipe) == recipe
    default = change_encoder(recipe, rotary_base=10000.0, level_embed_std=1.0)
    modern = complete(replace(default, preset="modern"))
    # patches of 4 px at level 1; crops of 32 px at level 4
    assert (modern.model.encoder.rotary_base, modern.model.encoder.level_embed_std) == ((8, 256), 0.02)
    assert (modern.model.decode, modern.data.label_levels) == ("all", "all")  # coarse views learn from their labels
    assert modern == replace(change(default, "data", label_levels="all"), preset="modern", model=modern.model)
    assert complete(modern) == modern
    finest = complete(replace(change_encoder(default, levels=(1,)), preset="modern"))
    assert (finest.model.decode, finest.data.label_levels) == ("finest", "finest")
    own = change_encoder(default, rotary_base=77.0)
    assert complete(replace(own, preset="modern")).model.encoder.rotary_base == 77.0
    learned_base = complete(replace(change_encoder(default, rotary_param="base"), preset="modern"))
    assert learned_base.model.encoder.rotary_base == 10000.0
    unet = complete(replace(default, preset="modern", model=BaselineConfig(kind="unet", levels=(1, 4))))
    assert unet.optim == recipe.optim


@pytest.mark.parametrize(
    ("values", "ignored", "classes"),
    [([0, 1, 2], (), 3), ([0, 1, 255], (255,), 2), ([0, 1, 255], (), None), ([0], (), None), ([1, 2], (), None)],
)
def test_without_names_the_classes_are_counted_by_the_values_of_the_labels(tmp_path, values, ignored, classes):
    pixels = np.repeat(np.uint8(values), 8)[None].repeat(8, 0)
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        Image.fromarray(pixels).save(tmp_path / kind / "a.png")
    data = DataConfig(train=str(tmp_path), ignore_labels=ignored)
    if classes is not None:
        assert count_classes(data, 1) == classes
        return
    with pytest.raises(InputError, match=r"expected values 0, 1 and so on, .* Set model\.num_classes"):
        count_classes(data, 1)


def test_a_run_of_an_earlier_version_is_resumed(finished, recipe, tmp_path):
    """Its recipe has the sections baseline and relay beside the model, and no kind."""
    run = tmp_path / "run"
    shutil.copytree(finished[1], run)
    settings = yaml.safe_load((run / "recipe.yaml").read_text()) | {"baseline": None, "relay": None}
    del settings["model"]["kind"]
    settings["data"] |= {"context": "random"}
    del settings["data"]["placement"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(settings))
    longer = change(recipe, "run", epochs=3)
    train_segmenter(longer, run, resume=True)
    assert {row["epoch"] for row in log_rows(run)} >= {"0", "1", "2"}
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model"]["kind"] == "muvit"


def test_a_class_without_a_pixel_is_told(recipe, caplog):
    four = replace(recipe, model=replace(recipe.model, num_classes=4))
    data = SegmentationData(four, build_model(four.model).views)
    assert data.preprocessing.class_names[3] == "class 3"
    assert [record.message for record in caplog.records] == [
        f"{recipe.data.train}: no pixel of class 3 was found; absent classes cannot be learned"
    ]


def test_an_ignored_class_without_a_pixel_is_no_warning(recipe, caplog):
    four = change(replace(recipe, model=replace(recipe.model, num_classes=4)), "data", ignore_labels=(3,))
    data = SegmentationData(four, build_model(four.model).views)
    assert data.preprocessing.class_names[3] == "class 3"
    assert caplog.records == []


def test_levels_that_the_slides_lack_are_computed_as_a_pyramid_would_store_them(recipe, slides, tmp_path, caplog):
    recipe = change(recipe, "data", normalization={"kind": "range", "high": 255})
    pyramids = SegmentationData(recipe, build_model(recipe.model).views)
    for kind in ("images", "labels"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        for path in sorted((slides / "train" / kind).glob("*.ome.zarr")):
            slide = open_slide(path)
            pixels = slide.read(1, (0, 0), slide.shape)[0]
            Image.fromarray(pixels).save(tmp_path / "train" / kind / f"{slide.name}.png")
    flat = SegmentationData(
        change(recipe, "data", train=str(tmp_path / "train"), val=None), build_model(recipe.model).views
    )
    for stored, computed in ((pyramids.train_crops[i], flat.train_crops[i]) for i in range(4)):
        assert all(torch.equal(stored[key], computed[key]) for key in ("bbox", "label"))
        assert torch.equal(stored["img"][0], computed["img"][0])
        # level 4 was stored as the rounded mean of a rounded level 2; augmentation multiplies by at most 1.2
        torch.testing.assert_close(stored["img"][1], computed["img"][1], rtol=0, atol=1.21 / 255)
    assert [message.count("`muvit convert --levels` would store them") for message in caplog.messages] == [1]
