"""Verbs killed at random moments: the same command again ends with the bytes of an undisturbed run."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from verbs import TRAINING, Workshop, leftovers, result

from muvit.models.encoder import EncoderConfig, MuViTEncoder

KILLS = 20


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop") / "workshop")


@pytest.mark.long
@pytest.mark.parametrize("verb", ["train", "pretrain", "train-classifier", "convert", "predict", "features", "compare"])
def test_a_killed_verb_goes_on_to_the_same_bytes(workshop, tmp_path, verb):
    begin = time.monotonic()
    whole = workshop.call(verb, tmp_path / "whole" / "out")
    assert whole.code == 0, whole.said
    lasted, expected = time.monotonic() - begin, result(verb, tmp_path / "whole" / "out")
    assert expected
    rng = random.Random(0)
    killed = 0
    for i in range(KILLS):
        output = tmp_path / str(i) / "out"
        call = workshop.start(verb, output)
        call.process.join(rng.uniform(0.1, 1) * lasted)
        killed += call.process.is_alive()
        call.process.kill()
        call.process.join()
        again = workshop.call(verb, output)
        if again.code == 1 and verb in TRAINING:  # killed before the recipe was written: there is no run to go on with
            assert "expected a run to overwrite" in again.said or "exists already" in again.said, again.said
            continue
        assert again.code == 0, again.said
        assert result(verb, output) == expected
        assert leftovers(output) == []
    assert killed >= KILLS // 2


def save_for_ever(folder):
    torch.manual_seed(0)
    model = MuViTEncoder(EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=64, num_layers=2, heads=2))
    while True:
        model.save(folder, overwrite=True)


def check_saves(folder, kills):
    rng = random.Random(0)
    for _ in range(kills):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(folder,))
        process.start()
        process.join(rng.uniform(0.02, 0.4))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if folder.exists():
            MuViTEncoder.from_folder(folder)
    model = MuViTEncoder.from_folder(folder)
    model.save(folder, overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_models_saved_in_a_loop_that_is_killed_can_be_loaded(tmp_path):
    check_saves(tmp_path / "saves" / "model", kills=5)


@pytest.mark.long
def test_models_saved_in_a_loop_that_is_killed_100_times_can_be_loaded(tmp_path):
    check_saves(tmp_path / "saves" / "model", kills=100)
