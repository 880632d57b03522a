import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from muvit.cli import main
from muvit.data.normalize import Range
from muvit.data.ome_zarr import PyramidWriter
from muvit.data.preprocessing import Preprocessing
from muvit.segmentation import Segmenter

PREPROCESSING = Preprocessing(
    crop_size=(16, 16),
    normalization=Range(high=255),
    class_names=("background", "one", "two"),
    class_colors=((0, 0, 0), (255, 0, 0), (0, 255, 0)),
)
OPTIONS = ["--block_px", "32", "--overlap", "0.25", "--probabilities", "uint8", "--batch_size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model and image, and the result of an undisturbed run."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    encoder = {"in_channels": 1, "levels": (1, 4), "num_layers": 4, "dim": 16, "heads": 1}
    model = Segmenter(encoder=encoder, num_classes=3, decoder_widths=(4, 4, 4, 4), stem_width=4)
    model.save(folder / "model", extra_files={"preprocessing.yaml": PREPROCESSING.to_yaml()})
    pixels = np.random.default_rng(0).integers(0, 256, (1, 90, 70), dtype=np.uint8)
    writer = PyramidWriter.create(
        folder / "image.ome.zarr", shape=(90, 70), num_channels=1, dtype=np.uint8, levels=(1, 4), chunk=16, shard=64
    )
    writer.write((0, 0), pixels)
    writer.finish()
    assert predict(folder, folder / "whole") == 0
    return folder


def predict(folder, output, *more):
    return main(["predict", f"{folder}/model", f"{folder}/image.ome.zarr", "--output", f"{output}", *OPTIONS, *more])


def hashes(output):
    files = (path for path in output.rglob("*") if path.is_file())
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# -- killed runs -------------------------------------------------------------------------------------------------------


def forked_run(folder, output, *more):
    """The command in a process of its own, from a server that has imported all it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "muvit.cli.predict"])
    process = context.Process(target=run_and_exit, args=(folder, output, *more))
    process.start()
    return process


def run_and_exit(folder, output, *more):
    os._exit(predict(folder, output, *more))


def num_files(output):
    return sum(1 for _ in output.rglob("*"))


def test_a_run_that_is_killed_again_and_again_makes_the_same_bytes(work, tmp_path):
    """SIGKILL at random moments of everything that a run does, from creating the stores to publishing them."""
    draw, kills, trial, expected = random.Random(0), 0, 0, hashes(work / "whole")
    while kills < 14:
        trial += 1
        output = tmp_path / str(trial)
        while True:
            process = forked_run(work, output)
            target = num_files(output) + draw.randint(0, 8)
            while process.is_alive() and num_files(output) < target:
                time.sleep(0.002)
            process.join(draw.uniform(0, 0.02))
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
        assert hashes(output) == expected
    assert kills > 4 * trial
