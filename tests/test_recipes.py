"""Every recipe is read by the commands that its header names.

Those for a CPU train two steps on a small replica of their data; those for a GPU name such a twin, and their model is
built.
"""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from muvit.cli import _parser
from muvit.cli.train import recipe_from
from muvit.data.ome_zarr import PyramidWriter
from muvit.layers.patch import patch_grid
from muvit.mae import build_mae
from muvit.models import build_model, load_model
from muvit.training.pretrain import pretrain_mae
from muvit.training.recipe import PretrainRecipe, Recipe
from muvit.training.train import train_segmenter

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
KINDS = {"train": Recipe, "compare": Recipe, "pretrain": PretrainRecipe}


TWINS = {file: re.search(r"Twin for a CPU[^:]*: (\w+)\.yaml", file.read_text()) for file in RECIPES}
FOR_GPU = [file for file in RECIPES if TWINS[file]]
FOR_CPU = [file for file in RECIPES if not TWINS[file]]


def commands(file):
    """Command lines of the header that use the recipe."""
    header = re.match(r"(#.*\n)+", file.read_text()).group()
    lines = re.sub(r"\\\n#\s*", "", header).splitlines()
    return [line.strip("# ") for line in lines if re.search(rf"muvit \w+ .*{file.name}", line)]


def read(file, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, verb, *_ = words = shlex.split(command)
    return recipe_from(_parser(verb).parse_args(words[1:])[verb], KINDS[verb])


def write(path, pixels, levels, kind):
    writer = PyramidWriter.create(
        path,
        shape=pixels.shape[1:],
        num_channels=len(pixels),
        dtype=pixels.dtype,
        levels=(1, *(level for level in levels if level != 1)),
        kind=kind,
    )
    writer.write((0,) * (pixels.ndim - 1), pixels)
    writer.finish()


def replica(folder, encoder, values):
    """Two random slides with the channels, levels and label values of a recipe."""
    rng = np.random.default_rng(0)
    space = (160,) * encoder.ndim if encoder.ndim == 2 else (32,) * encoder.ndim
    for i in range(2):
        pixels = rng.integers(0, 255, (encoder.in_channels, *space), dtype=np.uint8)
        write(folder / "images" / f"{i}.ome.zarr", pixels, encoder.levels, "image")
        if values:
            write(
                folder / "labels" / f"{i}.ome.zarr", rng.choice(np.uint8(values), (1, *space)), encoder.levels, "label"
            )
    return str(folder)


def with_fresh_weights(recipe):
    """The network of a recipe, without weights that would be fetched."""
    return replace(recipe.network, pretrained=False) if recipe.relay else recipe.network


def test_there_are_recipes():
    assert FOR_GPU
    assert FOR_CPU


@pytest.mark.parametrize("file", FOR_GPU, ids=lambda file: file.stem)
def test_a_recipe_for_a_gpu_has_a_model_and_a_twin_for_a_cpu(file, monkeypatch):
    assert ROOT / "recipes" / f"{TWINS[file][1]}.yaml" in FOR_CPU
    recipe = read(file, commands(file)[0], monkeypatch)
    model = build_mae(recipe.model) if isinstance(recipe, PretrainRecipe) else build_model(with_fresh_weights(recipe))
    assert sum(p.numel() for p in model.parameters()) > 1e7


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_header_tells_commands_that_read_the_recipe(file, monkeypatch):
    assert commands(file)
    for command in commands(file):
        recipe = read(file, command, monkeypatch)
        encoder = recipe.model.encoder if isinstance(recipe, Recipe) else recipe.model
        size = recipe.data.crop_size
        assert patch_grid((size,) * len(encoder.patch) if isinstance(size, int) else size, encoder.patch)


@pytest.mark.parametrize("file", FOR_CPU, ids=lambda file: file.stem)
def test_the_recipe_trains(file, monkeypatch, tmp_path):
    recipe = read(file, commands(file)[0], monkeypatch)
    encoder = recipe.model.encoder if isinstance(recipe, Recipe) else recipe.model
    values = [*range(recipe.model.num_classes), *recipe.data.ignore_labels] if isinstance(recipe, Recipe) else []
    folder = replica(tmp_path / "data", encoder, values)
    data = replace(
        recipe.data,
        train=folder,
        val=recipe.data.val and folder,
        val_samples=2,
        crop_size=tuple(4 * p for p in encoder.patch),  # small, for a CPU
        samples_per_epoch=4,
        batch_size=2,
        num_workers=0,
    )
    run = replace(recipe.run, epochs=1, accelerator="cpu", devices=1, num_nodes=1, progress=False, wandb_project=None)
    recipe = replace(recipe, data=data, run=run)
    if isinstance(recipe, PretrainRecipe):
        assert pretrain_mae(recipe, tmp_path / "run").is_dir()
        return
    model = load_model(train_segmenter(replace(recipe, init=None), tmp_path / "run"))
    assert type(model) is type(build_model(recipe.network))
    assert all(torch.isfinite(p).all() for p in model.parameters())
