import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import two_processes
from small_slides import write_slides

from muvit.errors import InputError
from muvit.training.datamodules import PretrainData


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Five validation tiles: three for the first process, two for the second."""
    return write_slides(tmp_path_factory.mktemp("slides"), shape=(32, 160), num_train=1)


@pytest.fixture(scope="module")
def runs(slides, tmp_path_factory):
    """The same steps on one process and on two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    script = Path(two_processes.__file__)
    done = subprocess.run([sys.executable, script, slides, two], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two_processes.train_all(slides, one, 1)
    return one, two


@pytest.mark.long
@pytest.mark.parametrize("verb", ["train", "pretrain"])
def test_two_processes_take_the_step_of_one(runs, verb):
    one, two = (torch.load(folder / verb / "gradients.pt", weights_only=True) for folder in runs)
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(
            two[name], gradient, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.long
@pytest.mark.parametrize(
    "verb, scores",
    [
        ("train", ("val_mdsc", "val_accuracy", "val_loss")),
        ("pretrain", ("val_loss", "val_loss/level_1", "val_loss/level_4")),
    ],
)
def test_two_processes_score_the_tiles_of_one(runs, verb, scores):
    """No tile is scored twice though they are five, and the loss is that of all."""
    one, two = (json.loads((folder / verb / "scores.json").read_text()) for folder in runs)
    assert set(scores) <= one.keys() == two.keys()
    for name in scores:
        assert two[name] == pytest.approx(one[name], abs=1e-6), name


def test_each_process_has_a_crop_to_validate(slides):
    """One without any would leave the others waiting for its scores."""
    (_, _, _), (_, _, recipe) = two_processes.recipes(slides, 1)
    many = replace(
        recipe,
        data=replace(recipe.data, samples_per_epoch=24, batch_size=1),
        run=replace(recipe.run, devices=6),
    )
    with pytest.raises(InputError, match=r"data\.val: expected slides of at least 6 crops, one for each device, got 5"):
        _ = PretrainData(many).val_crops
