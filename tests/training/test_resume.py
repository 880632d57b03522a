import errno
import logging
import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning import Callback
from small_slides import write_slides

from muvit import durable
from muvit.errors import CheckpointError, InputError, MuViTError
from muvit.models.classifier import ClassifierConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.mae import MAEConfig
from muvit.models.segmenter import SegmenterConfig
from muvit.training import resume
from muvit.training.fit import pretrain_mae, train_classifier, train_segmenter
from muvit.training.optim import OptimConfig, PretrainOptimConfig
from muvit.training.recipes import (
    ClassifyDataConfig,
    ClassifyRecipe,
    DataConfig,
    PretrainDataConfig,
    PretrainRecipe,
    Recipe,
)
from muvit.training.resume import LAST, NEXT, PREVIOUS, StateFiles, newest_state, read_state, write_state
from muvit.training.run_config import RunConfig

STATE = {
    "state_dict": {"w": torch.arange(500.0)},
    "loops": {},
    "callbacks": {},
    "optimizer_states": [{}],
    "lr_schedulers": [],
    "global_step": 7,
}


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return write_slides(tmp_path_factory.mktemp("slides"))


@pytest.fixture(scope="module")
def jobs(slides):
    """Function and recipe of each kind of training: four steps in each of two epochs, a state before every step."""
    train, val = str(slides / "train"), str(slides / "val")
    crops = {"crop_size": 16, "samples_per_epoch": 16, "val_samples": 2, "batch_size": 4, "train": train, "val": val}
    encoder = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=2, heads=2, dropout=0.1)
    run = RunConfig(epochs=2, accelerator="cpu", progress=False, pictures=0, save_every="0s")
    segmenter = SegmenterConfig(encoder=encoder, num_classes=2, decoder_widths=(8, 8, 4), stem_width=4)
    mae = MAEConfig(encoder=encoder, dim_decoder=16)
    averaged = PretrainOptimConfig(lr=1e-3, ema_decay=0.9)
    classes = ClassifyDataConfig(**crops, classes=str(slides / "slides.csv"))
    return {
        "train": (train_segmenter, Recipe(data=DataConfig(**crops), model=segmenter, run=run)),
        "pretrain": (
            pretrain_mae,
            PretrainRecipe(data=PretrainDataConfig(**crops), model=mae, optim=averaged, run=run),
        ),
        "classify": (train_classifier, ClassifyRecipe(data=classes, model=ClassifierConfig(encoder=encoder), run=run)),
    }


class FailAfter(Callback):
    """The power fails after some steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.steps:
            raise RuntimeError("power failure")


class Steps(Callback):
    """Number of every step, and the loss."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, task, outputs, *_):
        self.seen.append((trainer.global_step, float(outputs["loss"].detach())))


def models(run):
    """All files but the card, which states the number of workers."""
    files = [file for name in ("best", "last") for file in (run / name).iterdir() if file.name != "README.md"]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(jobs, tmp_path_factory):
    """Folder, steps and state of an undisturbed run of each kind, made when it is asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            train, recipe = jobs[kind]
            steps, folder = Steps(), tmp_path_factory.mktemp(kind) / "run"
            train(recipe, folder, callbacks=[steps])
            made[kind] = folder, steps.seen, torch.load(folder / "resume" / LAST, weights_only=True)
        return made[kind]

    return of


def test_training_goes_on_while_a_state_is_written(tmp_path, monkeypatch):
    """A state is that of the moment of saving, whatever changes before it is on disk; its error comes with the next."""
    may_write, files = threading.Event(), StateFiles()
    whole = resume.write_state
    monkeypatch.setattr(resume, "write_state", lambda *arguments: may_write.wait(30) and whole(*arguments))
    weights = torch.arange(500.0)
    files.save_checkpoint(STATE | {"state_dict": {"w": weights}}, tmp_path / NEXT)
    weights += 1
    assert not list(tmp_path.iterdir())
    may_write.set()
    files.wait()
    torch.testing.assert_close(read_state(tmp_path / LAST)["state_dict"]["w"], torch.arange(500.0))

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resume, "write_state", fail)
    files.save_checkpoint(STATE, tmp_path / NEXT)
    with pytest.raises(OSError, match="No space left"):
        files.save_checkpoint(STATE, tmp_path / NEXT)
    assert [file.name for file in tmp_path.iterdir()] == [LAST]


def check_resumed(jobs, whole, run, kind, steps, num_workers=0):
    train, recipe = jobs[kind]
    recipe = replace(recipe, data=replace(recipe.data, num_workers=num_workers))
    with pytest.raises(RuntimeError, match="power failure"):
        train(recipe, run, callbacks=[FailAfter(steps)])
    resumed, (folder, seen, state) = Steps(), whole(kind)
    train(recipe, run, resume=True, callbacks=[resumed])
    assert resumed.seen == seen[steps - 1 :]
    assert models(run) == models(folder)
    found = torch.load(run / "resume" / LAST, weights_only=True)
    for name, weight in state["state_dict"].items():  # the averaged and the plain weights
        assert torch.equal(found["state_dict"][name], weight)
    assert found["loops"] == state["loops"]


@pytest.mark.parametrize("kind", ["train", "pretrain", "classify"])
@pytest.mark.parametrize("steps", [3, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 4, 5, 7, 8))])
def test_a_run_that_is_resumed_in_mid_epoch_equals_one_that_was_not_interrupted(jobs, whole, tmp_path, kind, steps):
    check_resumed(jobs, whole, tmp_path / "run", kind, steps)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["train", "pretrain", "classify"])
@pytest.mark.parametrize("steps", [3, 5])
def test_workers_that_read_ahead_change_nothing(jobs, whole, tmp_path, kind, steps):
    check_resumed(jobs, whole, tmp_path / "run", kind, steps, num_workers=2)


@pytest.mark.long
@pytest.mark.parametrize("val_every", [1, 2])
def test_a_schedule_of_plateaus_is_resumed(jobs, tmp_path, val_every):
    train, recipe = jobs["train"]
    recipe = replace(
        recipe,
        optim=OptimConfig(schedule="plateau", plateau_patience=0, warmup_fraction=0),
        run=replace(recipe.run, epochs=5, val_every=val_every, save_every=1),
    )
    train(recipe, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power failure"):
        train(recipe, tmp_path / "run", callbacks=[FailAfter(19)])
    train(recipe, tmp_path / "run", resume=True)
    assert models(tmp_path / "run") == models(tmp_path / "whole")
    last = [torch.load(tmp_path / run / "resume" / LAST, weights_only=True) for run in ("run", "whole")]
    rates = [state["optimizer_states"][0]["param_groups"][0]["lr"] for state in last]
    assert rates[0] == rates[1] < recipe.optim.lr * recipe.optim.encoder_lr_factor


@pytest.mark.parametrize("every, saved", [(1, [4, 8]), (2, [8]), ("10min", [8]), ("0s", list(range(1, 9)))])
def test_states_are_saved_as_often_as_is_asked_for(jobs, tmp_path, monkeypatch, every, saved):
    steps = []
    write = write_state
    monkeypatch.setattr(
        "muvit.training.resume.write_state",
        lambda file, state: (steps.append(state["global_step"]), write(file, state))[1],
    )
    train, recipe = jobs["classify"]
    train(replace(recipe, run=replace(recipe.run, save_every=every)), tmp_path / "run")
    assert steps == saved
    left = {LAST} if len(saved) == 1 else {LAST, PREVIOUS}
    assert {file.name for file in (tmp_path / "run" / "resume").iterdir()} == left


@pytest.mark.parametrize("wrong", ["", "10", "min", "-1min", "10 days", "1e3s", 0, -1, True])
def test_intervals_that_are_none_are_refused(wrong):
    with pytest.raises(InputError, match=r"run\.save_every: expected "):
        RunConfig(save_every=wrong)
    assert (RunConfig(save_every="1.5h").save_seconds, RunConfig(save_every=3).save_epochs) == (5400, 3)


# files


def damage(file, how):
    """Damage a file in the way that is named."""
    content = file.read_bytes()
    if how == "empty":
        content = b""
    elif how == "truncated":
        content = content[: len(content) // 2]
    elif how == "zeroed":
        content = content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
    elif how == "text":
        content = b"dear diary"
    file.write_bytes(content)


def pickled(file):
    torch.save({**STATE, "loops": os.system}, file)


def foreign(file):
    torch.save({"weights": torch.zeros(3)}, file)


@pytest.mark.parametrize("how", ["empty", "truncated", "zeroed", "text", pickled, foreign])
def test_damaged_and_foreign_states_are_one_sentence(tmp_path, how):
    file = tmp_path / "resume" / LAST
    write_state(file, STATE)
    how(file) if callable(how) else damage(file, how)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: expected the state of a training run, got ") as error:
        newest_state(tmp_path)
    assert len(str(error.value)) < 300 and "weights_only" not in str(error.value)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    file = tmp_path / "resume" / LAST
    write_state(file, STATE)
    content, rng = file.read_bytes(), np.random.default_rng(0)
    mark = content.rindex(b"muvit256")
    for bit in rng.choice(8 * len(content), 200, replace=False):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(changed)
        if mark <= bit // 8 < mark + 8:  # without its mark it reads as one of an earlier version: nothing else changed
            continue
        with pytest.raises(CheckpointError):
            newest_state(tmp_path)


def test_states_of_earlier_versions_have_no_checksum_and_are_read(tmp_path):
    (tmp_path / "resume").mkdir()
    torch.save(STATE, tmp_path / "resume" / LAST)
    file = newest_state(tmp_path)
    assert torch.equal(read_state(file)["state_dict"]["w"], STATE["state_dict"]["w"])


def test_the_newest_state_that_is_whole_is_taken_and_named(tmp_path, caplog):
    for step, name in enumerate((PREVIOUS, LAST, NEXT)):
        write_state(tmp_path / "resume" / name, STATE | {"global_step": step})
    for taken, spoilt in ((NEXT, NEXT), (LAST, LAST), (PREVIOUS, None)):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert newest_state(tmp_path) == tmp_path / "resume" / taken
        assert len(caplog.messages) == (NEXT, LAST, PREVIOUS).index(taken)
        assert all(f"resumed from {tmp_path / 'resume' / taken}" in message for message in caplog.messages)
        if spoilt:
            damage(tmp_path / "resume" / spoilt, "truncated")


def test_a_write_that_fails_names_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "resume" / LAST
    write_state(file, STATE)
    before, error = file.read_bytes(), OSError(errno.ENOSPC, "No space left on device")

    def full(stream, content):
        raise error

    monkeypatch.setattr("muvit.training.resume._Hashing._forward", full)
    with pytest.raises(OSError, match="No space left") as told:
        write_state(file, STATE)
    assert told.value.filename == str(file)
    assert file.read_bytes() == before
    assert [found.name for found in file.parent.iterdir()] == [LAST]


def test_what_the_disk_did_not_keep_is_noticed_before_it_replaces_anything(jobs, tmp_path, monkeypatch):
    """The state before stays where it is when the new one reads back with other bytes."""
    train, recipe = jobs["classify"]
    train(replace(recipe, run=replace(recipe.run, epochs=1, save_every=1)), tmp_path / "run")
    before = (tmp_path / "run" / "resume" / LAST).read_bytes()
    sync = durable._sync

    def forget(path):
        sync(path)
        for file in (tmp_path / "run" / "resume").glob(NEXT):
            damage(file, "zeroed")

    monkeypatch.setattr(durable, "_sync", forget)
    with pytest.raises(CheckpointError, match=r"next\.ckpt: .* got other bytes than were written"):
        train(replace(recipe, run=replace(recipe.run, epochs=2, save_every=1)), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "resume" / LAST).read_bytes() == before
    monkeypatch.undo()
    train(replace(recipe, run=replace(recipe.run, epochs=2)), tmp_path / "run", resume=True)
    assert {file.name for file in (tmp_path / "run" / "resume").iterdir()} == {LAST, PREVIOUS}


def other_weights(state):
    state["state_dict"] = {name: torch.zeros(3) for name in state["state_dict"]}


def other_optimizer(state):
    state["optimizer_states"] = [{"param_groups": []}]


def numbers_for_loops(state):
    state["loops"] = 3


@pytest.mark.parametrize("change", [other_weights, other_optimizer, numbers_for_loops])
def test_a_state_of_another_run_is_one_sentence(jobs, whole, tmp_path, change):
    train, recipe = jobs["classify"]
    shutil.copytree(whole("classify")[0], tmp_path / "run")
    file = tmp_path / "run" / "resume" / LAST
    state = torch.load(file, weights_only=True)
    change(state)
    write_state(file, state)
    longer = replace(recipe, run=replace(recipe.run, epochs=3))
    with pytest.raises(CheckpointError, match=r"last\.ckpt: expected the state of this run, got ") as error:
        train(longer, tmp_path / "run", resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["", "data: 3", "- a\n- b", "data: !!python/object/apply:os.system [ls]", "{", "data:\n  train: x\n", "\0"],
)
def test_a_damaged_recipe_is_one_sentence(jobs, whole, tmp_path, text):
    train, recipe = jobs["classify"]
    shutil.copytree(whole("classify")[0], tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    with pytest.raises(MuViTError, match=r"recipe\.yaml: expected ") as error:
        train(recipe, tmp_path / "run", resume=True)
    assert "\n" not in str(error.value)
