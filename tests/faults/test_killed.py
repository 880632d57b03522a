"""Verbs killed at random moments: the same command again ends with the bytes of an undisturbed run."""

import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from verbs import Workshop, leftovers, result

from muvit.models.encoder import EncoderConfig, MuViTEncoder

KILLS = 20


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop") / "workshop")


KILLED = ["train", "pretrain", "train-classifier", "convert", "predict", "features", "compare"]


def undisturbed(workshop, verb, output):
    """Seconds that a verb takes, and the files that it makes."""
    begin = time.monotonic()
    call = workshop.call(verb, output)
    assert call.code == 0, call.said
    expected = result(verb, output)
    assert expected
    return time.monotonic() - begin, expected


def check_again(workshop, verb, output, expected):
    """The same command again, after a kill."""
    again = workshop.call(verb, output)
    assert again.code == 0, again.said
    assert result(verb, output) == expected
    assert leftovers(output) == []


@pytest.mark.long
@pytest.mark.parametrize("verb", KILLED)
def test_a_killed_verb_goes_on_to_the_same_bytes(workshop, tmp_path, verb):
    lasted, expected = undisturbed(workshop, verb, tmp_path / "whole" / "out")
    rng = random.Random(0)
    killed = 0
    for i in range(KILLS):
        output = tmp_path / str(i) / "out"
        call = workshop.start(verb, output)
        call.process.join(rng.uniform(0.1, 1) * lasted)
        killed += call.process.is_alive()
        call.process.kill()
        call.process.join()
        check_again(workshop, verb, output, expected)
    assert killed >= KILLS // 2


@pytest.mark.long
@pytest.mark.parametrize("verb", [verb for verb in KILLED if verb != "compare"])  # whose workers rename
def test_a_verb_killed_between_two_renames_goes_on_to_the_same_bytes(workshop, tmp_path, verb):
    """On another file system than the folder of temporary files, where the machine has one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path) as folder:  # noqa: PTH112
        _, expected = undisturbed(workshop, verb, Path(folder) / "whole" / "out")
        rng, killed = random.Random(0), 0
        for i in range(KILLS):
            output = Path(folder) / str(i) / "out"
            call = workshop.start(verb, output, renames=i if i < KILLS // 2 else rng.randrange(KILLS // 2, 2 * KILLS))
            call.process.join()
            killed += call.code == -signal.SIGKILL
            check_again(workshop, verb, output, expected)
            shutil.rmtree(output.parent)
        assert killed >= KILLS // 4


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
