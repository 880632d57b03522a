import csv
import logging
import shutil
from argparse import Namespace
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning import Callback, Trainer
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from muvit.data.crops.augment import Augmentation
from muvit.data.crops.dataset import MuViTDataset
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.splits import SplitConfig
from muvit.data.synthetic.images import SyntheticConfig, write_synthetic
from muvit.errors import ExistsError, InputError, ReadError
from muvit.geometry import naive_boxes
from muvit.mae import MuViTMAE2d
from muvit.models.folder import model_folder
from muvit.models.mae import MuViTMAE
from muvit.models.masking import TokenMask
from muvit.training.best_validation import BestReconstructions
from muvit.training.datamodules import PretrainData
from muvit.training.fit import fit_mae, pretrain_mae
from muvit.training.optim import PretrainOptimConfig, build_pretrain_optimizer, build_schedule
from muvit.training.recipes import PretrainDataConfig, PretrainRecipe
from muvit.training.run_config import RunConfig
from muvit.training.runs import prepare_folder
from muvit.training.slides import recipe_slides
from muvit.training.tasks import PretrainTask

TINY = {"levels": (1, 4), "patch_size": 4, "dim": 16, "num_layers": 1, "heads": 2, "dim_decoder": 16}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides") / "set"
    write_synthetic(folder, num_train=1, num_val=1, num_test=1, config=SyntheticConfig.small(), workers=1)
    for split in ("train", "val"):  # no labels are needed
        (folder / split / "labels").rename(folder / f"labels of {split}")
    return PretrainRecipe(
        data=PretrainDataConfig(
            train=str(folder / "train"),
            val=str(folder / "val"),
            crop_size=16,
            normalization={"kind": "range", "low": 0, "high": 1000},
            samples_per_epoch=12,
            val_samples=4,
            batch_size=4,
        ),
        model=tiny(dropout=0.1).config,
        optim=PretrainOptimConfig(lr=1e-3, ema_decay=0.9),
        run=RunConfig(epochs=2, accelerator="cpu", progress=False, pictures=1, save_every=1),
    )


class Scenes(MuViTDataset):
    """Flat views whose brightness is told by their level and number; everything follows from the sample's number."""

    def __init__(self, count=8, levels=(1, 4), channels=1, spoil=None):
        self.count, self._levels, self.channels, self.spoil = count, levels, channels, spoil

    levels = property(lambda self: self._levels)
    n_channels = property(lambda self: self.channels)
    ndim = property(lambda self: 2)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        img = torch.rand(len(self.levels), self.channels, 16, 16, generator=torch.Generator().manual_seed(index))
        bbox = naive_boxes(self.levels, (16, 16)) + 100.0 * index
        sample = {"img": img, "bbox": bbox}
        return sample if self.spoil is None else self.spoil(sample)


def tiny(**changes):
    torch.manual_seed(0)
    return MuViTMAE2d(**TINY | changes)


def loader(dataset, batch_size=4):
    return DataLoader(dataset, batch_size=batch_size)


def fit(model, output, dataset=None, val=None, **options):
    train = loader(dataset or Scenes())
    fit_mae(model, train, val, output, accelerator="cpu", **{"precision": "32-true", "num_epochs": 2} | options)


def log_rows(folder):
    with next((folder / "logs").glob("*/metrics.csv")).open() as file:
        return list(csv.DictReader(file))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same_files(a, b):
    return all((b / file.name).read_bytes() == file.read_bytes() for file in a.iterdir())


# the task


def test_pixels_that_are_not_finite_count_as_zero():
    task = PretrainTask(tiny(), PretrainOptimConfig(), batch_size=2)
    img = torch.rand(2, 2, 1, 16, 16)
    img[0, 0, 0, 3, 3], img[0, 1, 0, 5, 5], img[0, 1, 0, 6, 6] = torch.nan, torch.inf, -torch.inf
    batch = {"img": img, "bbox": naive_boxes((1, 4), (16, 16)).expand(2, -1, -1, -1)}
    cleaned = task.on_after_batch_transfer(task.on_before_batch_transfer(batch, 0), 0)["img"]
    assert torch.equal(cleaned, torch.where(img.isfinite(), img, 0))
    assert cleaned[0, 0, 0, 3, 3] == cleaned[0, 1, 0, 5, 5] == cleaned[0, 1, 0, 6, 6] == 0


def test_one_bad_pixel_does_not_poison_the_training(tmp_path):
    def spoil(sample):
        sample["img"][0, 0, 2, 2] = torch.nan
        return sample

    for name, spoiler in (("pixel", spoil), ("all", lambda s: s | {"img": torch.full_like(s["img"], torch.nan)})):
        model = tiny()
        fit(model, tmp_path / name, Scenes(spoil=spoiler), loader(Scenes(spoil=spoiler)))
        assert weights(model).isfinite().all()
        losses = [float(row["val_loss"]) for row in log_rows(tmp_path / name) if row["val_loss"]]
        assert len(losses) == 2 and np.isfinite(losses).all()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s | {"bbox": s["bbox"] * torch.nan}, "bbox: expected finite coordinates"),
        (lambda s: s | {"img": (255 * s["img"]).byte()}, "img: expected floating-point pixels"),
        (lambda s: s | {"img": s["img"][..., :15]}, "multiples of the patch"),
    ],
)
def test_batches_that_no_model_can_take_are_refused(spoil, message):
    with pytest.raises(InputError, match=message):
        fit(tiny(), None, Scenes(spoil=spoil), dry=True)


@pytest.mark.parametrize("batch", [[torch.zeros(1)], {"img": torch.zeros(1)}])
def test_a_batch_names_its_parts(batch):
    with pytest.raises(InputError, match="'img' and 'bbox'"):
        PretrainTask(tiny(), PretrainOptimConfig(), batch_size=1).on_before_batch_transfer(batch, 0)


def test_the_optimiser_is_the_papers():
    config, model = PretrainOptimConfig(), tiny()
    assert (config.lr, config.betas, config.gradient_clip, config.warmup_epochs) == (6e-5, (0.9, 0.95), 0.5, 2)
    optimizer = build_pretrain_optimizer(model, config, 48)
    assert [g["lr"] for g in optimizer.param_groups] == [6e-5, 6e-5]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
    assert all(g["betas"] == (0.9, 0.95) for g in optimizer.param_groups)
    undecayed = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert {id(model.mask_token), id(model.encoder.level_embed), id(model.final.bias)} <= undecayed
    assert id(model.final.weight) not in undecayed
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_the_rate_of_release_010_grows_with_the_root_of_the_batch():
    rule = PretrainOptimConfig(lr=None)
    assert rule.peak_lr(128) == pytest.approx(1e-4)
    assert rule.peak_lr(48) == pytest.approx(6.1e-5, rel=0.01)
    assert PretrainOptimConfig(lr=3e-4).peak_lr(48) == 3e-4


def test_the_rate_rises_from_one_percent_and_falls_to_zero():
    schedule = build_schedule(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), 100, 0.2, 0.01)
    factor = schedule.lr_lambdas[0]
    assert factor(0) == pytest.approx(0.01)
    assert factor(10) == pytest.approx(0.505)
    assert factor(20) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0.0)


@pytest.mark.parametrize(
    "wrong", [{"lr": 0}, {"betas": (1, 0.9)}, {"warmup_epochs": -1}, {"warmup_start": 1}, {"ema_decay": 1.0}]
)
def test_optimiser_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        PretrainOptimConfig(**wrong)


# from a user's own data


def test_the_published_example_works(tmp_path):
    model = tiny(in_channels=1)
    before = weights(model)
    fit(model, tmp_path / "pretrained", val=loader(Scenes(4)))
    assert not torch.equal(weights(model), before)
    encoder = MuViTMAE2d.from_folder(tmp_path / "pretrained").encoder
    assert encoder.compute_features(torch.rand(1, 2, 1, 16, 16)).shape == (1, 2, 16, 4, 4)
    assert model_folder(tmp_path / "pretrained") == tmp_path / "pretrained" / "best"
    rows = log_rows(tmp_path / "pretrained")
    assert {"train_loss", "val_loss", "val_loss/level_1", "val_loss/level_4"} <= set(rows[0])
    assert list((tmp_path / "pretrained" / "tensorboard").rglob("events.*"))


def test_fitting_lowers_the_loss(tmp_path):
    model = tiny()
    flat = Scenes(spoil=lambda s: s | {"img": torch.full_like(s["img"], 0.7)})
    fit(model, tmp_path / "run", flat, loader(flat), lr=3e-3, num_epochs=12, warmup_epochs=1)
    losses = [float(row["val_loss"]) for row in log_rows(tmp_path / "run") if row["val_loss"]]
    assert losses[-1] < 0.3 * losses[0]


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options in ({"dry": True}, {"fast_dev_run": True}, {"dry": True, "fast_dev_run": True}):
        model = tiny()
        before = weights(model)
        fit(model, None, val=loader(Scenes(2)), **options)
        assert not torch.equal(weights(model), before)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_needed_and_not_overwritten(tmp_path):
    with pytest.raises(InputError, match="output"):
        fit(tiny(), None)
    (tmp_path / "precious").touch()
    with pytest.raises(ExistsError):
        fit(tiny(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_a_fit_goes_on_from_its_checkpoint(tmp_path):
    whole, parts = tiny(), tiny()
    fit(whole, tmp_path / "whole", num_epochs=3, val=loader(Scenes(2)))

    class Stop(Exception):
        pass

    class Half(Scenes):
        fails = False

        def __getitem__(self, index):
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen > 8 + 1 + 8 + 4:  # in the third epoch; one look was the check of the first sample
                raise Stop
            return super().__getitem__(index)

    with pytest.raises(Stop):
        fit(parts, tmp_path / "parts", Half(), num_epochs=3, val=loader(Scenes(2)))
    checkpoint = tmp_path / "parts" / "resume" / "last.ckpt"
    fit(tiny(), tmp_path / "parts", num_epochs=3, val=loader(Scenes(2)), ckpt_path=checkpoint)
    for name in ("best", "last"):
        assert same_files(tmp_path / "whole" / name, tmp_path / "parts" / name)


def test_boxes_can_be_hidden(tmp_path):
    def moved(sample):
        sample["bbox"][1] += 37
        return sample

    for nobox in (True, False):
        models = tiny(), tiny()
        for model, spoil in zip(models, (None, moved), strict=True):
            fit(model, None, Scenes(spoil=spoil), dry=True, nobox=nobox)
        assert torch.equal(*map(weights, models)) == nobox


def test_the_generators_seed_decides_the_masks():
    first, again, other = tiny(), tiny(), tiny()
    for model, seed in ((first, 3), (again, 3), (other, 4)):
        fit(model, None, dry=True, data_gen=torch.Generator().manual_seed(seed))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_half_precision_runs_on_a_cpu():
    model = tiny()
    fit(model, None, dry=True, precision="bf16-mixed", num_epochs=1)
    assert weights(model).dtype == torch.float32
    assert weights(model).isfinite().all()


def test_further_settings_are_logged(tmp_path):
    fit(tiny(), tmp_path / "run", num_epochs=1, args_namespace=Namespace(note="mine"))
    logged = next((tmp_path / "run" / "logs").glob("*/hparams.yaml"))
    assert yaml.safe_load(logged.read_text()) == {"note": "mine"}


@pytest.mark.parametrize("logger, shows", [("tb", True), ("tensorboard", True), (None, False)])
def test_csv_files_are_always_written(tmp_path, logger, shows):
    fit(tiny(), tmp_path / "run", num_epochs=1, logger=logger)
    assert (tmp_path / "run" / "tensorboard").exists() == shows
    assert log_rows(tmp_path / "run")


def test_weights_and_biases_is_needed_only_when_asked_for(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr("muvit.errors.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"wandb.*pip install wandb"):
        fit(tiny(), tmp_path / "fit", logger="wandb")
    with pytest.raises(InputError, match="pip install wandb"):
        pretrain_mae(replace(recipe, run=replace(recipe.run, wandb_project="mine")), tmp_path / "run")
    with pytest.raises(InputError, match="logger"):
        fit(tiny(), tmp_path / "fit", logger="mlflow")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "dataset, message",
    [
        (Scenes(levels=(1, 4, 16)), "n_levels: expected 2"),
        (Scenes(channels=3), "n_channels: expected 1"),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused(dataset, message):
    with pytest.raises(InputError, match=message):
        fit(tiny(), None, dataset, dry=True)


def test_other_levels_than_the_models_are_pointed_out(caplog):
    with caplog.at_level(logging.WARNING, "muvit"):
        fit(tiny(), None, Scenes(levels=(1, 8)), dry=True, num_epochs=1)
    assert "(1, 8)" in caplog.text and "(1, 4)" in caplog.text


# from a recipe


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    return pretrain_mae(recipe, output), output


def test_a_run_leaves_models_settings_logs_and_pictures(finished, recipe):
    model, output = finished
    assert model == output / "best"
    assert {f.name for f in output.iterdir()} == {
        "best",
        "last",
        "logs",
        "tensorboard",
        "pictures",
        "resume",
        "recipe.yaml",
        "slides.csv",
    }
    assert MuViTMAE2d.from_folder(output).config == recipe.model
    kept = Preprocessing.load(model)
    assert (kept.crop_size, kept.class_names, kept.normalization.high) == ((16, 16), (), 1000)
    pictures = sorted((output / "pictures").iterdir())
    assert [p.name for p in pictures] == ["epoch_0000.png", "epoch_0001.png", "worst_and_best.png"]
    with Image.open(pictures[0]) as picture:
        width, height = picture.size
    assert width > 4 * 256 and height > 2 * 256  # four pictures of each of two levels
    assert yaml.safe_load((output / "recipe.yaml").read_text())["model"]["encoder"]["levels"] == [1, 4]


def test_the_best_model_has_the_lowest_validation_loss(recipe, tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.losses, self.kept = [], []

        def on_train_epoch_end(self, trainer, *_):  # after the model has been kept
            self.losses.append(float(trainer.callback_metrics["val_loss"]))
            self.kept.append((tmp_path / "run" / "best" / "model.safetensors").stat().st_mtime_ns)

    watch = Watch()
    wild = replace(recipe, optim=PretrainOptimConfig(lr=0.5), run=replace(recipe.run, epochs=5, pictures=0))
    pretrain_mae(wild, tmp_path / "run", callbacks=[watch])
    lowest = [loss == min(watch.losses[: i + 1]) for i, loss in enumerate(watch.losses)]
    assert [b != a for a, b in zip([0, *watch.kept], watch.kept, strict=False)] == lowest
    assert not all(lowest)


def test_the_same_seed_gives_the_same_weights(finished, recipe, tmp_path):
    pretrain_mae(recipe, tmp_path / "again")
    assert same_files(finished[1] / "last", tmp_path / "again" / "last")
    pretrain_mae(replace(recipe, run=replace(recipe.run, seed=1)), tmp_path / "other")
    assert not same_files(finished[1] / "last", tmp_path / "other" / "last")


def test_a_stopped_and_resumed_run_ends_in_the_same_bits(finished, recipe, tmp_path):
    class PowerFailure(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise RuntimeError("power failure")

    with pytest.raises(RuntimeError, match="power failure"):
        pretrain_mae(recipe, tmp_path / "run", callbacks=[PowerFailure()])
    pretrain_mae(recipe, tmp_path / "run", resume=True)
    for name in ("best", "last"):
        assert same_files(finished[1] / name, tmp_path / "run" / name)


def test_averaged_weights_are_kept_and_validated(recipe, tmp_path):
    class Watch(Callback):
        def on_train_start(self, trainer, task):
            self.average = [p.detach().clone() for p in task.model.parameters()]

        def on_train_batch_end(self, trainer, task, *_):
            current = task.model.parameters()
            self.average = [0.9 * a + 0.1 * p.detach() for a, p in zip(self.average, current, strict=True)]

    watch = Watch()
    pretrain_mae(replace(recipe, run=replace(recipe.run, pictures=0)), tmp_path / "run", callbacks=[watch])
    kept = MuViTMAE2d.from_folder(tmp_path / "run" / "last").parameters()
    for expected, p in zip(watch.average, kept, strict=True):
        torch.testing.assert_close(p.detach(), expected, atol=1e-6, rtol=1e-5)


def test_steps_of_training_differ_in_their_masks_and_validations_do_not():
    task = PretrainTask(tiny(), PretrainOptimConfig(), batch_size=4, seed=1)
    img = torch.zeros(3, 2, 1, 16, 16)
    train, val = ([task._mask(img, purpose, step).order for step in range(3)] for purpose in range(2))
    for a, b in combinations([*train, *val], 2):
        assert not torch.equal(a, b)
    assert torch.equal(task._mask(img, 0, 2).order, train[2])


def test_masks_are_the_same_whatever_the_number_of_processes(monkeypatch):
    """Sample ``i`` of process ``r`` of two is sample ``2i + r`` of one."""
    one, two = (PretrainTask(tiny(), PretrainOptimConfig(), batch_size=size, seed=1) for size in (6, 3))
    whole = one._mask(torch.zeros(6, 2, 1, 16, 16), 0, 5)
    monkeypatch.setattr(PretrainTask, "num_processes", 2)
    for rank, count in ((0, 3), (1, 2)):  # a last batch may be smaller
        monkeypatch.setattr(PretrainTask, "global_rank", rank)
        mask = two._mask(torch.zeros(count, 2, 1, 16, 16), 0, 5)
        assert torch.equal(mask.order, whole.order[rank::2][:count])
        assert mask.num_visible == whole.num_visible


@pytest.mark.parametrize("average", ["level", "token"])
def test_the_validation_loss_is_that_of_all_samples_at_once(average):
    """Whatever the batches: a level's error is the mean over its masked tokens."""
    task = PretrainTask(tiny(loss_average=average), PretrainOptimConfig(), batch_size=3)
    data, orders = Scenes(8), []
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    logged = trainer.validate(task, loader(data, 3), verbose=False)[0]
    for index, batch in enumerate(loader(data, 3)):
        orders.append(task._mask(batch["img"], 1, index))
    mask = TokenMask(torch.cat([m.order for m in orders]), orders[0].num_visible)
    whole = default_collate([data[i] for i in range(8)])
    with torch.inference_mode():
        result = task.model.eval()(whole["img"], whole["bbox"], mask=mask)
    assert logged["val_loss"] == pytest.approx(result["loss"].item(), rel=1e-5)
    for name, loss in zip(("1", "4"), result["loss_per_level"], strict=True):
        assert logged[f"val_loss/level_{name}"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_worst_and_best_crops_are_ranked_by_the_loss_of_what_was_hidden(recipe, tmp_path):
    data = PretrainData(recipe)
    task = PretrainTask(MuViTMAE(recipe.model), PretrainOptimConfig(), batch_size=4)
    kept = SimpleNamespace(is_improved=True)
    ranking = BestReconstructions(tmp_path, data.val_crops, kept)
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=[ranking], enable_progress_bar=False, enable_model_summary=False
    )
    trainer.validate(task, loader(data.val_crops, 2), verbose=False)
    ranked = [*ranking.worst, *reversed(ranking.best)]
    assert sorted(crop.number for crop in ranked) == [0, 1, 2, 3]
    losses = [crop.score for crop in ranked]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    for crop in ranked:
        sample = data.val_crops[crop.number]
        assert torch.equal(crop.sample["img"], sample["img"])
        with torch.inference_mode():
            result = task.model.eval()(sample["img"][None], sample["bbox"][None], mask=crop.result)
        assert crop.score == pytest.approx(result["loss"].item(), rel=1e-5)
    ranking.on_train_epoch_end(SimpleNamespace(is_global_zero=True), task)
    with Image.open(tmp_path / "pictures" / "worst_and_best.png") as picture:
        assert picture.height > 8 * 256  # two levels of four crops


def test_without_validation_the_last_model_is_the_result(recipe, tmp_path):
    blind = replace(recipe, data=replace(recipe.data, val=None), run=replace(recipe.run, epochs=1))
    assert pretrain_mae(blind, tmp_path / "run") == tmp_path / "run" / "last"
    assert MuViTMAE2d.from_folder(tmp_path / "run").config == recipe.model


@pytest.mark.parametrize(
    "part, changes, error, message",
    [
        ("data", {"train": "nowhere"}, ReadError, "nowhere"),
        ("data", {"crop_size": 18}, InputError, "multiples of"),
        ("encoder", {"levels": (1, 3.5)}, InputError, "3.5"),
        ("encoder", {"in_channels": 3}, InputError, r"expected 3 channel\(s\), as the model has, got 1"),
        ("encoder", {"ndim": 3}, InputError, "spatial axes"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(recipe, tmp_path, part, changes, error, message):
    if part == "encoder":
        part, changes = "model", {"encoder": replace(recipe.model.encoder, **changes)}
    with pytest.raises(error, match=message):
        pretrain_mae(replace(recipe, **{part: replace(getattr(recipe, part), **changes)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_augmentation_reaches_the_training_crops_only(recipe):
    bright = Augmentation(gain=(1, 1), offset=(50, 50), box_scale=(1, 1), box_shift_px=0)
    data = PretrainData(replace(recipe, data=replace(recipe.data, augmentation=bright)))
    assert data.train_crops[0]["img"].mean() > 40
    assert data.val_crops[0]["img"].mean() < 10
    assert "label" not in data.train_crops[0]


def test_further_processes_leave_the_folder_to_the_first(finished, recipe, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in finished[1].rglob("*")}
    monkeypatch.setattr("muvit.training.runs.rank_zero_only.rank", 1)
    assert prepare_folder(recipe, finished[1], resume=False, overwrite=True) is None
    assert prepare_folder(recipe, finished[1], resume=True, overwrite=False) == finished[1] / "resume" / "last.ckpt"
    assert {file: file.stat().st_mtime_ns for file in finished[1].rglob("*")} == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("use_boxes", [True, False])
@pytest.mark.parametrize("changes", [{}, {"masking_mode": (1.0, 2.0)}, {"loss": "norm_mse"}])
def test_a_training_step_never_waits_for_the_device(use_boxes, changes):
    task = PretrainTask(tiny(**changes), PretrainOptimConfig(ema_decay=0.9), batch_size=2, use_boxes=use_boxes).cuda()
    task.log = lambda *_, **__: None
    optimizer = build_pretrain_optimizer(task.model, task.optim, 2)
    batch = {"img": torch.rand(2, 2, 1, 16, 16), "bbox": naive_boxes((1, 4), (16, 16)).expand(2, -1, -1, -1)}
    batch = {name: t.cuda() for name, t in task.on_before_batch_transfer(batch, 0).items()}
    for mode in ("default", "error"):  # the first step may build what is kept
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss = task._step(task.model, task.on_after_batch_transfer(batch, 0), 0, 1)[0]["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            task.on_train_batch_end(None, None, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_pretraining_divides_its_slides(recipe, tmp_path):
    source = Path(recipe.data.train) / "images"
    (image,) = source.iterdir()
    for number in range(4):
        shutil.copytree(image, tmp_path / "images" / f"{number}.ome.zarr")
    data = replace(recipe.data, train=str(tmp_path), val=None, split=SplitConfig(val=0.25, test=0.25, by="slide"))
    sets = recipe_slides(replace(recipe, data=data))
    assert [len(sets[name]) for name in ("train", "val", "test")] == [2, 1, 1]
    with pytest.raises(InputError, match=r"run\.folds: expected none, but in the training of a segmentation model"):
        replace(recipe, run=replace(recipe.run, folds=3))
