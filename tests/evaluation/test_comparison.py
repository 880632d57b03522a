import csv
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, replace

import pytest
import yaml

from muvit.checkpoints import plain
from muvit.data.synthetic import SyntheticConfig, write_synthetic
from muvit.encoders import EncoderConfig
from muvit.errors import ExistsError, InputError, ReadError
from muvit.evaluation.comparison import PRESETS, Variant, compare, preset, read_curves, with_controls
from muvit.segmentation import SegmenterConfig
from muvit.training.recipe import DataConfig, Recipe, RunConfig


@pytest.fixture
def recipe():
    encoder = EncoderConfig(in_channels=1, levels=(1, 4, 8), dim=32, num_layers=3, heads=2)
    return Recipe(data=DataConfig(train="nowhere"), model=SegmenterConfig(encoder=encoder, num_classes=3))


def test_controls_differ_from_the_model_in_one_thing_each(recipe):
    ours, single, naive = with_controls(recipe)
    assert [v.name for v in (ours, single, naive)] == ["MuViT[1,4,8]", "MuViT[1]", "MuViT[1,4,8] naive boxes"]
    assert ours.recipe == recipe
    one_level = replace(recipe.model.encoder, levels=(1,))
    assert single.recipe == replace(recipe, model=replace(recipe.model, encoder=one_level))
    assert naive.recipe == replace(recipe, model=replace(recipe.model, boxes="naive"))


def test_names_become_distinct_folder_names(recipe):
    assert [v.slug for v in with_controls(recipe)] == ["muvit_1_4_8", "muvit_1", "muvit_1_4_8_naive_boxes"]


@pytest.mark.parametrize("spoil", ["levels", "boxes"])
def test_a_model_that_is_a_control_itself_is_refused(recipe, spoil):
    one_level = replace(recipe.model.encoder, levels=(1,))
    model = replace(recipe.model, **({"encoder": one_level} if spoil == "levels" else {"boxes": "naive"}))
    with pytest.raises(InputError, match="model: expected several levels and true boxes"):
        with_controls(replace(recipe, model=model))


def test_every_preset_is_a_model_of_its_own_on_the_same_data(recipe):
    variants = {name: preset(recipe, name) for name in PRESETS}
    assert len({variant.slug for variant in variants.values()}) == len(PRESETS)
    networks = [str(variant.recipe.network) for variant in variants.values()]
    assert len(set(networks)) == len(networks)
    for variant in variants.values():
        assert variant.recipe.data == recipe.data
        assert (variant.recipe.optim, variant.recipe.loss, variant.recipe.run) == (
            recipe.optim,
            recipe.loss,
            recipe.run,
        )
        network = variant.recipe.network
        assert network.num_classes == 3
        sees_all = "every level" in variant.description
        levels = network.encoder.levels if isinstance(network, SegmenterConfig) else network.levels
        assert levels == ((1, 4, 8) if sees_all else (1,))


def test_a_preset_takes_the_place_of_another_network(recipe):
    unet = preset(recipe, "unet").recipe
    assert preset(unet, "muvit").recipe == recipe
    assert preset(unet, "relay_vit").recipe.baseline is None


def test_an_unknown_preset_is_refused_with_the_known_ones(recipe):
    with pytest.raises(InputError, match=r"models: expected names out of muvit, finest, .*, got 'unett'"):
        preset(recipe, "unett")


def log(run, version, rows):
    folder = run / "logs" / f"version_{version}"
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("epoch", "step", "train_loss", "val_mdsc"))
        writer.writeheader()
        writer.writerows(rows)


def test_curves_are_read_in_the_order_of_the_runs_parts(tmp_path):
    log(tmp_path, 0, [{"step": 9, "train_loss": 1.5}, {"step": 9, "val_mdsc": 0.25}])
    log(tmp_path, 2, [{"step": 19, "train_loss": 1.25}])
    log(tmp_path, 10, [{"step": 29, "train_loss": 1.0}, {"step": 29, "val_mdsc": 0.5}])
    (tmp_path / "logs" / "version_11").mkdir()  # of a complete run that was resumed
    curves = read_curves(tmp_path, ("train_loss", "val_mdsc", "unheard"))
    assert curves == {
        "train_loss": ([9, 19, 29], [1.5, 1.25, 1.0]),
        "val_mdsc": ([9, 29], [0.25, 0.5]),
        "unheard": ([], []),
    }


def test_steps_that_a_resumed_run_repeated_are_drawn_once(tmp_path):
    log(tmp_path, 2, [{"step": s, "train_loss": float(s)} for s in (9, 19, 29)])
    log(tmp_path, 10, [{"step": s, "train_loss": s + 0.5} for s in (19, 29, 39)])
    assert read_curves(tmp_path, ("train_loss",))["train_loss"] == ([9, 19, 29, 39], [9, 19.5, 29.5, 39.5])


def test_an_earlier_comparison_is_kept(recipe, tmp_path):
    (tmp_path / "metrics.json").write_text("dear")
    with pytest.raises(ExistsError, match=r"metrics\.json"):
        compare(with_controls(recipe), tmp_path / "nowhere", tmp_path, title="", intro="")
    assert (tmp_path / "metrics.json").read_text() == "dear"


def test_test_slides_are_opened_before_any_training(recipe, tmp_path):
    with pytest.raises(ReadError, match="nowhere"):
        compare(with_controls(recipe), tmp_path / "nowhere", tmp_path / "out", title="", intro="")
    assert not (tmp_path / "out").exists()


def test_what_is_trained_is_not_trained_again(recipe, tmp_path):
    data = write_synthetic(
        tmp_path / "data", num_train=1, num_val=1, num_test=1, config=SyntheticConfig.small(), workers=1
    )
    short = replace(
        recipe,
        data=DataConfig(train=str(data / "train"), crop_size=16, samples_per_epoch=4, batch_size=2),
        model=replace(recipe.model, decoder_widths=(8, 8, 8, 8), stem_width=4),
        run=RunConfig(epochs=2, accelerator="cpu", progress=False),
    )
    variant = Variant(name="short", description="is soon done", recipe=short)

    def made(**options):
        told = []
        (result,) = compare(
            [variant],
            data / "test",
            tmp_path / "out",
            title="",
            intro="",
            progress=lambda *steps: told.append(steps),
            **options,
        )
        assert told == sorted(told)
        assert told[-1] == (4, 4)
        return result, (tmp_path / "out" / "runs" / "short" / "last" / "model.safetensors").read_bytes()

    first, weights = made()
    (tmp_path / "out" / "metrics.json").unlink()  # as if it had been stopped before the scores
    (tmp_path / "out" / "index.html").unlink()
    second, same = made(resume=True)
    assert same == weights
    assert (second.dice, second.mean_dice, second.curves) == (first.dice, first.mean_dice, first.curves)


def test_what_fails_in_a_process_is_told_here_and_ends_the_others(recipe, tmp_path):
    data = write_synthetic(
        tmp_path / "data", num_train=1, num_val=1, num_test=1, config=SyntheticConfig.small(), workers=1
    )
    wrong = replace(recipe, data=DataConfig(train=str(data / "train"), crop_size=60))
    variant = Variant(name="wrong", description="has a crop that its patches do not fill", recipe=wrong)
    patient = replace(
        recipe,
        data=DataConfig(train=str(data / "train"), crop_size=16, samples_per_epoch=100_000),
        model=replace(recipe.model, decoder_widths=(8, 8, 8, 8), stem_width=4),
        run=RunConfig(epochs=1, accelerator="cpu", progress=False),
    )
    long = Variant(name="long", description="takes its time", recipe=patient)
    with pytest.raises(
        InputError, match=r"data.crop_size: expected multiples of \(8, 8\), as the model takes, got \(60, 60\)"
    ):
        compare([variant, long], data / "test", tmp_path / "out", title="", intro="")
    assert not (tmp_path / "out" / "runs" / "wrong").exists()
    assert multiprocessing.active_children() == []
    assert not list(tmp_path.rglob("last"))
    assert not (tmp_path / "out" / "metrics.json").exists()


WORKER = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from muvit.evaluation.comparison import _start_worker
pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start_worker, (1, []))
pool.submit(print, "ready", flush=True).result()
time.sleep(600)
"""


def test_processes_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        parent.communicate(timeout=60)  # the pipe closes when the last process that holds it has gone
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def test_a_recipe_with_its_controls_survives_yaml(recipe):
    for variant in with_controls(recipe):
        again = yaml.safe_load(yaml.safe_dump(plain(asdict(variant.recipe))))
        assert SegmenterConfig(**again["model"]) == variant.recipe.model
