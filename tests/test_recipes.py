"""Every command in the header of a recipe is read by the command line, and with it the recipe.

Recipes for a CPU train two steps on a small replica of their data; those for a GPU name such a twin, and their model is
built. Settings of a study are run as they are, on a replica and an untrained model.
"""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from muvit.cli import _parser, main
from muvit.cli.demo import recipe as demo_recipe
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import FILE, Preprocessing
from muvit.data.pyramids.writer import PyramidWriter
from muvit.mae import MuViTMAE2d
from muvit.models.classifier import Classifier
from muvit.models.layers.patch import patch_grid
from muvit.models.mae import MuViTMAE
from muvit.models.relay.config import RelayConfig
from muvit.models.segmenter import Segmenter
from muvit.models.trained import build_model, load_network
from muvit.settings import settings_from
from muvit.training.fit import pretrain_mae, train_classifier, train_segmenter
from muvit.training.pretrained import load_pretrained_encoder
from muvit.training.recipes import ClassifyRecipe, PretrainRecipe, Recipe
from muvit.training.slides import complete

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
KINDS = {"train": Recipe, "compare": Recipe, "pretrain": PretrainRecipe, "train-classifier": ClassifyRecipe}

GROUPS = ("56Nx", "DN", "NEP25", "normal")


def commands(file):
    """Command lines of a header, in words."""
    header = re.match(r"(#.*\n)+", file.read_text()).group()
    lines = re.sub(r"\\\n#\s*", "", header).splitlines()
    return [shlex.split(line.strip("# ")) for line in lines if line.startswith("#   muvit ")]


def uses(file):
    """Those of them that use the recipe."""
    return [words for words in commands(file) if f"recipes/{file.name}" in words]


def parsed(words):
    _, verb, *given = words
    return _parser(verb, given).parse_args(words[1:])[verb]


def read(words, monkeypatch):
    """The recipe that a command of its header reads."""
    monkeypatch.chdir(ROOT)
    return settings_from(parsed(words), KINDS[words[1]])


STUDIES = [file for file in RECIPES if uses(file)[0][1] == "study"]
TWINS = {file: re.search(r"Twin for a CPU[^:]*: (\w+)\.yaml", file.read_text()) for file in RECIPES}
FOR_GPU = [file for file in RECIPES if TWINS[file]]
FOR_CPU = [file for file in RECIPES if not TWINS[file] and file not in STUDIES]


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


def replica(folder, levels, *, channels=3, ndim=2, values=()):
    """Random slides with the channels, levels and label values of a recipe, one of each group, each of a tint."""
    rng, space = np.random.default_rng(0), (160,) * ndim if ndim == 2 else (32,) * ndim
    for i in range(len(GROUPS)):
        pixels = rng.integers(0, 64, (channels, *space), dtype=np.uint8)
        pixels[i : i + 1] *= 4
        write(folder / "images" / f"{i}.ome.zarr", pixels, levels, "image")
        if values:
            write(folder / "labels" / f"{i}.ome.zarr", rng.choice(np.uint8(values), (1, *space)), levels, "label")
    return str(folder)


def write_groups(file):
    """Which group each slide of a replica is of."""
    file.write_text("".join(["name,group\n", *(f"{i},{group}\n" for i, group in enumerate(GROUPS))]))
    return str(file)


def network(recipe):
    """The network of a recipe for a GPU, without weights that would be fetched."""
    if isinstance(recipe, Recipe):
        recipe = complete(recipe)
        is_relay = isinstance(recipe.model, RelayConfig)
        return build_model(replace(recipe.model, pretrained=False) if is_relay else recipe.model)
    return MuViTMAE(recipe.model) if isinstance(recipe, PretrainRecipe) else Classifier(recipe.model)


def encoder_of(recipe):
    """The encoder of a recipe's model, or the model itself if it has none: its channels, levels and axes."""
    return getattr(recipe.model, "encoder", recipe.model)


def patch_of(recipe):
    """Patch of the encoder; backbones with relay tokens have one of 16 px."""
    return getattr(encoder_of(recipe), "patch", (16, 16))


def test_there_are_recipes():
    assert FOR_GPU
    assert FOR_CPU
    assert STUDIES


@pytest.mark.parametrize("file", FOR_GPU, ids=lambda file: file.stem)
def test_a_recipe_for_a_gpu_has_a_model_and_a_twin_for_a_cpu(file, monkeypatch):
    assert ROOT / "recipes" / f"{TWINS[file][1]}.yaml" in FOR_CPU
    model = network(read(uses(file)[0], monkeypatch))
    assert sum(p.numel() for p in model.parameters()) > 1e7


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_header_tells_commands_that_are_read(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert uses(file)
    for words in commands(file):
        parsed(words)


def test_the_demo_trains_the_model_of_its_recipe(monkeypatch, tmp_path):
    written = read(uses(ROOT / "recipes" / "synthetic_scattered.yaml")[0], monkeypatch)
    own = demo_recipe(tmp_path)
    data = replace(written.data, train=own.data.train, val=own.data.val)
    assert replace(written, data=data, run=replace(written.run, progress=False)) == own


@pytest.mark.parametrize("file", FOR_GPU + FOR_CPU, ids=lambda file: file.stem)
def test_crops_fit_the_encoder(file, monkeypatch):
    for words in uses(file):
        recipe = read(words, monkeypatch)
        ndim, size = encoder_of(recipe).ndim, recipe.data.crop_size
        assert patch_grid((size,) * ndim if isinstance(size, int) else size, patch_of(recipe))


def starts_pretrained(recipe):
    """Whether part of the network comes with weights that were trained before."""
    if recipe.init is not None:
        return True
    return bool(getattr(recipe.model, "pretrained", False) or getattr(recipe.model, "encoder_weights", None))


def shrunk(encoder):
    return replace(encoder, num_layers=3, dim=64)


@pytest.mark.parametrize("file", [f for f in FOR_GPU + FOR_CPU if "pretrain" not in f.stem], ids=lambda file: file.stem)
def test_a_recipe_says_what_it_starts_from_and_random_weights_learn_at_the_full_rate(file, monkeypatch, tmp_path):
    recipe = read(uses(file)[0], monkeypatch)
    header = " ".join(re.match(r"(#.*\n)+", file.read_text()).group().replace("#", " ").split())
    if not starts_pretrained(recipe):
        assert "from random weights" in header.lower()
        assert recipe.optim.encoder_lr_factor == 1
    elif recipe.init is None:
        assert "from its released weights" in header
    else:
        source = Path(recipe.init.encoder).name
        assert f"fine-tuned from {source}.yaml" in header
        earlier = read(uses(ROOT / "recipes" / f"{source}.yaml")[0], monkeypatch)
        assert parsed(uses(ROOT / "recipes" / f"{source}.yaml")[0]).output == Path(recipe.init.encoder)
        mae = MuViTMAE(replace(earlier.model, encoder=shrunk(earlier.model.encoder)))
        mae.save(tmp_path / source)
        encoder = shrunk(recipe.model.encoder)
        config = replace(recipe.model, encoder=encoder)
        model = Classifier(config) if isinstance(recipe, ClassifyRecipe) else Segmenter(config)
        load_pretrained_encoder(model, replace(recipe.init, encoder=str(tmp_path / source)))
        kept = mae.encoder.extract_levels(encoder.levels)
        torch.testing.assert_close(model.encoder.state_dict(), kept.state_dict())


@pytest.mark.parametrize("file", FOR_CPU, ids=lambda file: file.stem)
def test_the_recipe_trains(file, monkeypatch, tmp_path):
    recipe = read(uses(file)[0], monkeypatch)
    encoder, space = encoder_of(recipe), {}
    if isinstance(recipe, Recipe):
        space["values"] = [*range(recipe.model.num_classes), *recipe.data.ignore_labels]
    folder = replica(tmp_path / "data", encoder.levels, channels=encoder.in_channels, ndim=encoder.ndim, **space)
    data = replace(
        recipe.data,
        train=folder,
        val=recipe.data.val and folder,
        val_samples=len(GROUPS),
        crop_size=tuple(4 * p for p in patch_of(recipe)),  # small, for a CPU
        samples_per_epoch=4,
        batch_size=2,
        num_workers=0,
    )
    run = replace(recipe.run, epochs=1, accelerator="cpu", devices=1, num_nodes=1, progress=False, wandb_project=None)
    recipe = replace(recipe, data=data, run=run)
    if isinstance(recipe, PretrainRecipe):
        assert pretrain_mae(recipe, tmp_path / "run").is_dir()
        return
    recipe = replace(recipe, init=None)
    if isinstance(recipe, ClassifyRecipe):
        table = replace(data, classes=write_groups(tmp_path / "slides.csv"))
        folder = train_classifier(replace(recipe, data=table), tmp_path / "run")
        assert Preprocessing.load(folder).class_names == GROUPS
        model = Classifier.from_folder(folder)
    else:
        model = load_network(train_segmenter(recipe, tmp_path / "run"))
        assert type(model) is type(build_model(complete(recipe).model))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("words", [w for f in STUDIES for w in uses(f)], ids=lambda words: Path(words[-1]).name)
def test_the_settings_of_a_study_find_what_prepare_and_pretraining_leave(words, monkeypatch, tmp_path):
    run, output = Path(words[3].split("=")[-1]), Path(words[-1])
    levels = read(uses(ROOT / "recipes" / f"{run.name}.yaml")[0], monkeypatch).model.encoder.levels
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(ROOT / "recipes")
    for split in ("train", "test"):
        replica(Path("data/kpis") / split, levels)
    write_groups(Path("data/kpis/slides.csv"))
    torch.manual_seed(0)
    mae = MuViTMAE2d(in_channels=3, levels=levels, patch_size=8, dim=16, num_layers=1, heads=2, dim_decoder=16)
    bare = Preprocessing(crop_size=(16, 16), normalization=Range(high=255), class_names=(), class_colors=())
    mae.save(run / "last", extra_files={FILE: bare.to_yaml()})
    assert main(words[1:]) == 0
    scores = json.loads((output / "probe.json").read_text())["probe"][0]
    assert all(scores[f"auc/{group}"] > 0.9 for group in GROUPS)  # the tints tell them apart
