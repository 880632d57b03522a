"""The verbs that measure trained models, from the command line."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from PIL import Image

from muvit.cli import main
from muvit.cli.study import STUDIES, named_paths
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import FILE, Preprocessing
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.errors import InputError
from muvit.evaluation.studies import probe
from muvit.mae import MuViTMAE2d
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig

ENCODER = {"in_channels": 1, "levels": (1, 4), "patch_size": 4, "dim": 16, "num_layers": 2, "heads": 2}
SEGMENTER = {"num_classes": 2, "decoder_widths": (4, 4, 4), "stem_width": 2}


def run(*argv):
    return main([str(argument) for argument in argv])


def said(capfd):
    """What the command printed, and its complaints without progress bars."""
    out, err = capfd.readouterr()
    lines = err.replace("\r", "\n").splitlines()
    return out, [line for line in lines if line.strip() and not re.search(r"\[\d\d:\d\d", line)]


def write(path, pixels, kind, **options):
    names = {"label_names": {0: "background", 1: "bright"}} if kind == "label" else {}
    writer = PyramidWriter.create(
        path, shape=pixels.shape, num_channels=1, dtype=np.uint8, levels=(1, 4), kind=kind, **names, **options
    )
    writer.write((0, 0), pixels[None])
    writer.finish()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two slides of each of two groups with labels, predictions, and untrained models in the folders of runs."""
    folder, rng = tmp_path_factory.mktemp("work"), np.random.default_rng(0)
    lines = ["name,split,group"]
    for split in ("train", "test"):
        for i in range(4):
            pixels = rng.normal(60 + 120 * (i % 2), 20, (32, 48)).clip(0, 255).astype(np.uint8)
            write(folder / split / "images" / f"{split}{i}.ome.zarr", pixels, "image")
            labels = (pixels > 100 + 80 * (i % 2)).astype(np.uint8)
            write(folder / split / "labels" / f"{split}{i}.ome.zarr", labels, "label")
            for model, wrong in (("good", 0.02), ("bad", 0.4)):
                flipped = np.where(rng.random(labels.shape) < wrong, 1 - labels, labels)
                write(folder / model / f"{split}{i}.ome.zarr", flipped, "label")
            lines.append(f"{split}{i},{split},{'bright' if i % 2 else 'dark'}")
    (folder / "slides.csv").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    labelled = Preprocessing(
        crop_size=(16, 16),
        normalization=Range(high=255),
        class_names=("background", "bright"),
        class_colors=((0, 0, 0), (255, 0, 0)),
    )
    Segmenter(SegmenterConfig(encoder=EncoderConfig(**ENCODER), **SEGMENTER)).save(
        folder / "run" / "best", extra_files={FILE: labelled.to_yaml()}
    )
    bare = Preprocessing(crop_size=(16, 16), normalization=Range(high=255), class_names=(), class_colors=())
    for name in ("true", "naive"):
        MuViTMAE2d(**ENCODER, dim_decoder=16).save(folder / name / "last", extra_files={FILE: bare.to_yaml()})
        (folder / name / "recipe.yaml").write_text(yaml.safe_dump({"boxes": name}))
    (folder / "run" / "logs" / "version_0").mkdir(parents=True)
    (folder / "run" / "logs" / "version_0" / "metrics.csv").write_text("epoch,step,val_mdsc\n0,9,0.25\n1,19,0.5\n")
    return folder


def results(folder, name):
    """The three files of a study."""
    assert sorted(f.name for f in folder.iterdir()) == [
        f"{name}{suffix}" for suffix in (".csv", ".html", ".json", ".png")
    ]
    with Image.open(folder / f"{name}.png") as picture:
        assert np.asarray(picture).std() > 0
    with (folder / f"{name}.csv").open(newline="") as lines:
        return json.loads((folder / f"{name}.json").read_text()), list(csv.DictReader(lines))


def test_evaluation_writes_numbers_table_and_picture(work, tmp_path, capfd):
    truth = tmp_path / "truth"
    truth.mkdir()
    for split in ("train", "test"):
        for file in (work / split / "labels").iterdir():
            (truth / file.name).symlink_to(file)
    assert run("evaluate", work / "good", truth, "--output", tmp_path / "out", "--num_resamples", "50") == 0
    out, complaints = said(capfd)
    assert complaints == []
    data, rows = results(tmp_path / "out", "scores")
    assert float(out.splitlines()[-1].split()[-1]) == pytest.approx(data["mean_slide_dice"], abs=1e-4)
    low, high = data["intervals"]["mean_dice"]
    assert low < data["pooled"]["mean_dice"] < high
    (row,) = (r for r in rows if r["slide"] == "all" and r["score"] == "mean_dice")
    assert float(row["low"]) == low
    assert data["pooled"]["boundary_f1"]["bright"] > 0
    arguments = ("evaluate", work / "good", truth, "--output", tmp_path / "out.csv", "--boundary_tolerance", "null")
    assert run(*arguments) == 0
    assert "boundary" not in (tmp_path / "out.csv").read_text()
    said(capfd)
    assert run(*arguments) == 1
    assert "out.csv: exists already" in said(capfd)[1][0]


def test_a_slide_without_a_prediction_is_refused_or_named(work, tmp_path, capfd):
    truth, some = work / "test" / "labels", tmp_path / "some"
    some.mkdir()
    for i in (0, 2):
        (some / f"test{i}.ome.zarr").symlink_to(work / "good" / f"test{i}.ome.zarr")
    arguments = ("evaluate", some, truth, "--boundary_tolerance", "null", "--num_resamples", "9")
    assert run(*arguments) == 1
    assert re.search(r"some: expected a prediction of every slide in .*got none of 'test1', 'test3'", said(capfd)[1][0])
    for number, option in enumerate(("--allow_missing", "--allow-missing")):
        output = tmp_path / f"out{number}"
        assert run(*arguments, option, "--output", output) == 0
        out, complaints = said(capfd)
        assert complaints == []
        assert out.splitlines()[-1] == "Not scored, as there is no prediction: test1, test3"
        data, rows = results(output, "scores")
        assert data["missing"] == ["test1", "test3"]
        assert list(data["slides"]) == ["test0", "test2"]
        assert [row["slide"] for row in rows if row["score"] == "missing"] == ["test1", "test3"]
    # one file is what it is asked for
    assert run("evaluate", some / "test0.ome.zarr", truth) == 0
    groups = ("--truth", truth, "--groups", work / "slides.csv", "--output", tmp_path / "groups")
    assert run("study", "groups", some, *groups) == 1
    assert run("study", "groups", some, *groups, "--allow_missing") == 0


def test_whether_class_0_is_background_comes_from_the_predictions_or_an_option(work, tmp_path, capfd):
    folder = tmp_path / "labels"
    for file in (work / "test" / "labels").iterdir():
        pixels = OmeZarrSlide(work / "good" / file.name).read(1, (0, 0), (32, 48))[0]
        write(folder / file.name, pixels, "label", has_background=False)
    found = {}
    for name, options in (("stated", ()), ("told", ("--has_background", "true"))):
        output = tmp_path / f"{name}.json"
        assert run("evaluate", folder, work / "test" / "labels", "--output", output, *options) == 0
        found[name] = json.loads(output.read_text())
        dice, iou = found[name]["pooled"]["dice"], found[name]["pooled"]["iou"]
        assert found[name]["pooled"]["mean_iou"] == pytest.approx(np.mean(list(iou.values())))
    assert (found["stated"]["has_background"], found["told"]["has_background"]) == (False, True)
    assert found["stated"]["pooled"]["mean_dice"] == pytest.approx(np.mean(list(dice.values())))
    assert found["told"]["pooled"]["mean_dice"] == dice["bright"]
    said(capfd)


def test_noise(work, tmp_path, capfd):
    options = ["--data", work / "test", "--sigmas", "[0,16]", "--output", tmp_path / "out"]
    assert run("study", "noise", f"ours={work / 'run'}", *options) == 0
    out, complaints = said(capfd)
    assert complaints == []
    data, rows = results(tmp_path / "out", "noise")
    assert [row["sigma_px"] for row in rows] == ["0.0", "16.0", ""]
    assert [row["boxes"] for row in data["noise"]] == ["noisy", "noisy", "naive"]
    assert out.startswith("ours  sigma 0 px")


def test_scaling(tmp_path, capfd):
    model = [f"--model.{part}" for part in ("encoder.dim=16", "encoder.num_layers=3", "encoder.heads=2")]
    model += ["--model.decoder_widths=[4,4,4,4]", "--model.stem_width=2"]
    sizes = ["--sizes", "[16]", "--level_sets", "[[1],[1,8]]", "--repeats", "1", "--device", "cpu"]
    assert run("study", "scaling", *sizes, *model, "--output", tmp_path / "out") == 0
    assert said(capfd)[1] == []
    data, rows = results(tmp_path / "out", "scaling")
    assert [(row["levels"], row["tokens"]) for row in rows] == [("1", "4")] * 2 + [("1,8", "8")] * 2
    assert all(row["seconds"] > 0 for row in data["scaling"])


def test_probe(work, tmp_path, capfd):
    folders = ["--train", work / "train", "--test", work / "test", "--classes", work / "slides.csv"]
    options = ["--train_crops", "3", "--test_crops", "2", "--neighbors", "3", "--pooling", "levels"]
    assert run("study", "probe", work / "true", *folders, *options, "--output", tmp_path / "out") == 0
    out, complaints = said(capfd)
    assert complaints == []
    data, rows = results(tmp_path / "out", "probe")
    assert {row["model"] for row in rows} == {"true"}
    assert data["probe"][0]["mean_auc"] > 0.9
    assert "logistic regression" in out
    levels = ["--levels", "[4]", "--output", tmp_path / "one.csv"]
    assert run("study", "probe", work / "true", *folders, *options, *levels) == 0
    said(capfd)
    assert run("study", "probe", work / "true", *folders, "--column", "x", "--output", tmp_path / "new") == 1
    assert "slides.csv: expected a column 'x'" in said(capfd)[1][0]


def test_settings_of_a_probe_stand_in_a_file_and_arguments_override_them(work, tmp_path, capfd, monkeypatch):
    settings = {"train": str(work / "train"), "test": str(work / "test"), "classes": str(work / "slides.csv")}
    settings |= {"train_crops": 3, "test_crops": 2, "neighbors": 3, "levels": [4]}
    file, seen, study = tmp_path / "probe.yaml", [], probe.study_probe

    def keep(name, encoder, preprocessing, train, test, classes, config, **options):
        seen.append((encoder.levels, train, test, config))
        return study(name, encoder, preprocessing, train, test, classes, config, **options)

    monkeypatch.setattr(probe, "study_probe", keep)
    file.write_text(yaml.safe_dump(settings))
    by_file = ["study", "probe", work / "true", "--config", file]
    assert run(*by_file, "--output", tmp_path / "file.csv") == 0
    assert run(*by_file, "--levels", "[1]", "--train_crops", "2", "--output", tmp_path / "one.csv") == 0
    config = probe.ProbeConfig(train_crops=3, test_crops=2, neighbors=3)
    folders = (work / "train", work / "test")
    assert seen == [((4,), *folders, config), ((1,), *folders, replace(config, train_crops=2))]
    said(capfd)
    for wrong, message in (("crops: 3", "crops"), ("train_crops: many", "train_crops")):
        file.write_text(wrong)
        assert run(*by_file, "--output", tmp_path / "new") == 2
        (complaint,) = said(capfd)[1]
        assert message in complaint
    assert not (tmp_path / "new").exists()


def test_epochs(work, tmp_path, capfd):
    assert run("study", "epochs", work / "run", "--epochs", "[1]", "--output", tmp_path / "out") == 0
    out, complaints = said(capfd)
    assert complaints == []
    assert out == "run  E1 0.250  last (E2) 0.500\n"
    data, rows = results(tmp_path / "out", "epochs")
    assert data == {"val_mdsc": {"run": {"1": 0.25, "2": 0.5}}}
    assert [row["epoch"] for row in rows] == ["1", "2"]


def test_reconstruction(work, tmp_path, capfd):
    options = ["--data", work / "test", "--num_crops", "4", "--batch_size", "2", "--output", tmp_path / "out"]
    assert run("study", "reconstruction", work / "true", work / "naive", *options) == 0
    out, complaints = said(capfd)
    assert complaints == []
    _, rows = results(tmp_path / "out", "reconstruction")
    assert [(row["trained_boxes"], row["boxes"]) for row in rows[::2]] == [
        ("true", "true"),
        ("true", "naive"),
        ("naive", "naive"),
    ]
    assert len(out.splitlines()) == 6


def test_groups(work, tmp_path, capfd):
    truth = ["--truth", tmp_path / "truth", "--groups", work / "slides.csv"]
    (tmp_path / "truth").mkdir()
    for split in ("train", "test"):
        for file in (work / split / "labels").iterdir():
            (tmp_path / "truth" / file.name).symlink_to(file)
    models = [f"one={work / 'good'}", f"two={work / 'bad'}"]
    assert run("study", "groups", *models, *truth, "--output", tmp_path / "out") == 0
    out, complaints = said(capfd)
    assert complaints == []
    data, rows = results(tmp_path / "out", "groups")
    assert data["groups"] == ["bright", "dark"]
    (good, bad) = data["mean_dice"]
    assert min(good) > max(bad)
    assert [row["slides"] for row in rows] == ["4"] * 4
    assert out.splitlines()[0].startswith("one:  bright 0.")


def test_a_classifier_is_trained_and_tells_classes(work, tmp_path, capfd):
    recipe = tmp_path / "recipe.yaml"
    data = {"train": str(work / "train"), "val": str(work / "test"), "classes": str(work / "slides.csv")}
    data |= {"crop_size": 16, "normalization": {"kind": "range", "high": 255}, "samples_per_epoch": 64}
    settings = {
        "data": data | {"val_samples": 8, "batch_size": 8},
        "model": {"encoder": ENCODER | {"levels": [1, 4]}, "pooling": "attention"},
        "optim": {"lr": 0.005, "encoder_lr_factor": 1.0},
        "run": {"epochs": 3, "accelerator": "cpu", "progress": False, "pictures": 1},
    }
    recipe.write_text(yaml.safe_dump(settings))
    assert run("train-classifier", "--config", recipe, "--output", tmp_path / "run") == 0
    out, complaints = said(capfd)
    assert (out.split(), complaints) == ([str(tmp_path / "run" / "best")], [])
    slides = sorted((work / "test" / "images").iterdir())
    truth = ["--classes", work / "slides.csv", "--num_crops", "4"]
    assert run("classify", tmp_path / "run", work / "test", *truth, "--output", tmp_path / "out") == 0
    out, complaints = said(capfd)
    assert complaints == []
    assert out.splitlines()[-1] == "accuracy 1.000  AUC 1.000"
    data, rows = results(tmp_path / "out", "classes")
    assert [row["class"] for row in rows] == [row["truth"] for row in rows] == ["dark", "bright"] * 2
    assert sum(data["slides"][0][f"probability/{c}"] for c in ("dark", "bright")) == pytest.approx(1)
    assert run("classify", tmp_path / "run", slides[0], "--num_crops", "null", "--output", tmp_path / "new.json") == 0
    assert "truth" not in json.loads((tmp_path / "new.json").read_text())["slides"][0]


@pytest.mark.parametrize("name", STUDIES)
def test_every_option_of_a_study_is_explained(name, capfd):
    parser = ArgumentParser(exit_on_error=False)
    STUDIES[name].add_arguments(parser)
    actions = [action for action in parser._actions if "--help" not in action.option_strings]
    for action in actions:
        assert action.help and len(action.help.split()) >= 2, action.option_strings or action.dest
    assert run("study", name, "--help") == 0
    text = capfd.readouterr().out
    for action in actions:
        assert (action.option_strings or [action.dest])[0] in text
    assert run("study", "--help") == 0
    assert STUDIES[name].summary in " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["study", "noise", "{work}/none", "--data", "{work}/test"], "none: expected a model folder"),
        (["study", "noise", "{work}/run", "--data", "{work}/none"], "none"),
        (["study", "noise", "{work}/run", "--data", "{work}/test", "--sigmas", "[-1]"], "sigmas: expected"),
        (["study", "scaling", "--sizes", "[30]"], "sizes: expected multiples of the patch (8, 8), got 30"),
        (["study", "epochs", "{work}/true"], "true: expected a run that logged 'val_mdsc'"),
        (["study", "epochs", "{work}/run", "{work}/run"], "run: expected different names, got 'run' twice"),
        (
            ["study", "reconstruction", "{work}/run", "--data", "{work}/test"],
            "expected a model of kind mae, got one of kind muvit",
        ),
        (["classify", "{work}/run", "{work}/slides.csv"], "expected a model of kind classifier, got one of kind muvit"),
        (
            ["study", "groups", "{work}/good", "--truth", "{work}/test/labels", "--groups", "{work}/none.csv"],
            "none.csv: expected a CSV file",
        ),
    ],
)
def test_bad_input_ends_with_1_and_one_sentence_and_writes_nothing(work, tmp_path, capfd, argv, message):
    assert run(*(part.format(work=work) for part in argv), "--output", tmp_path / "new") == 1
    out, complaints = said(capfd)
    assert out == ""
    assert len(complaints) == 1
    assert message in complaints[0]
    assert not (tmp_path / "new").exists()


def test_names_are_given_or_those_of_the_folders(tmp_path):
    assert list(named_paths([f"a={tmp_path}/x", f"{tmp_path}/y/"], "run")) == ["a", "y"]
    with pytest.raises(InputError, match=r"'y' twice\. Write runs as name=path"):
        named_paths([f"{tmp_path}/y", f"{tmp_path}/z/y"], "run")
