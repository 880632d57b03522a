import re
from importlib import import_module
from inspect import signature

import numpy as np
import pytest
from jsonargparse import ArgumentParser
from PIL import Image

from muvit.cli import main
from muvit.cli.prepare import DATASETS, add_arguments
from muvit.data.folders import open_labelled_folder


def run(*argv):
    return main([str(argument) for argument in argv])


def said(capfd):
    """What the command printed, and its complaints without progress bars."""
    out, err = capfd.readouterr()
    lines = err.replace("\r", "\n").splitlines()
    return out, [line for line in lines if line.strip() and not re.search(r"\[\d\d:\d\d", line)]


@pytest.fixture
def sections(tmp_path):
    for kind, value in (("images", 100), ("labels", 2)):
        (tmp_path / "in" / kind).mkdir(parents=True)
        for animal in ("BM3", "BM15"):
            Image.fromarray(np.full((20, 30), value, np.uint8)).save(tmp_path / "in" / kind / f"{animal}_1.png")
    return tmp_path / "in"


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_explains_its_options(dataset, capfd):
    parser = ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    [datasets] = [action for action in parser._actions if action.choices]
    for action in datasets.choices[dataset]._actions:
        assert len((action.help or "").split()) >= 2, action.dest
        assert "SUPPRESS" not in action.help or "--help" in action.option_strings
    assert run("prepare", dataset, "--help") == 0
    assert DATASETS[dataset][1:] in " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name != "synthetic"])
def test_options_of_a_data_set_are_arguments_of_the_function_that_finds_it(dataset):
    parser = ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    [datasets] = [action for action in parser._actions if action.choices]
    options = {action.dest for action in datasets.choices[dataset]._actions}
    common = {"help", "source", "output", "check", "levels", "pixel_size_um", "overwrite"}
    find = getattr(import_module(f"muvit.data.sources.{dataset}"), f"find_{dataset}")
    assert options - common == set(signature(find).parameters) - {"folder"}


def test_a_folder_is_checked_and_converted(sections, capfd):
    output = sections.parent / "out"
    assert run("prepare", "mouse", sections, output, "--check") == 0
    assert said(capfd) == (f"{sections}: 1 train, 0 val, 1 test\n", [])
    assert not output.exists()
    options = ["--levels", "[1,4]", "--pixel_size_um", "1.35"]
    assert run("prepare", "mouse", sections, output, *options) == 0
    assert said(capfd) == (f"{output}: 1 train, 0 val, 1 test\n", [])
    [(image, labels)] = open_labelled_folder(output / "test")
    assert (image.levels, image.pixel_size_um, labels.read(1, (0, 0), (1, 1))) == ((1, 4), (1.35, 1.35), 2)
    assert run("prepare", "mouse", sections, output, "--levels", "[1,2]") == 1
    assert "expected levels [1, 4], as it was begun with, got [1, 2]" in said(capfd)[1][0]
    assert run("prepare", "mouse", sections, output, "--levels", "[1,2]", "--overwrite") == 0


def test_mouse_options_reach_the_data_set(sections, capfd):
    (sections / "map.yaml").write_text("nothing: [0, 1]\nall of it: 2\n")
    options = ["--label_map", sections / "map.yaml", "--specimen", r"BM(\d+)", "--test_specimens", "[]"]
    places = ["--images", "images/*.png", "--labels", "labels/BM{specimen}_1.png", "--val_specimens", '["3"]']
    assert run("prepare", "mouse", sections, sections.parent / "out", *options, *places) == 0
    assert "1 train, 1 val, 0 test" in said(capfd)[0]
    [(_, labels)] = open_labelled_folder(sections.parent / "out" / "val")
    assert labels.label_names == {0: "nothing", 1: "all of it"}
    assert labels.read(1, (0, 0), (1, 1)) == 1


def test_warnings_stand_before_the_work_and_problems_stop_it(tmp_path, capfd):
    for name in ("11-356_wsi", "11-356_mask", "11-357_wsi"):
        file = tmp_path / "in" / "train" / "DN" / f"{name}.tiff"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(file)
    assert run("prepare", "kpis", tmp_path / "in", tmp_path / "out") == 1
    _, complaints = said(capfd)
    assert complaints[1] == "muvit: warning: train DN: 1 slides instead of the published 5"
    assert complaints[-2].endswith("expected the complete kpis data, got 1 problem:")
    assert complaints[-1].endswith("11-357_wsi.tiff: no 11-357_mask.tiff.")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name != "synthetic"])
def test_a_folder_that_is_not_there_is_refused_in_one_sentence(dataset, tmp_path, capfd):
    assert run("prepare", dataset, tmp_path / "nowhere", tmp_path / "out") == 1
    assert said(capfd)[1] == [f"muvit: {tmp_path / 'nowhere'}: expected the folder of {dataset}, got nothing there."]


def test_the_synthetic_data_are_generated(tmp_path, capfd):
    counts = ["--train", "1", "--val", "0", "--test", "1", "--size_px", "512", "--workers", "1", "--seed", "3"]
    assert run("prepare", "synthetic", tmp_path / "out", *counts) == 0
    assert said(capfd)[0] == f"{tmp_path / 'out'}: 1 train, 0 val, 1 test\n"
    assert open_labelled_folder(tmp_path / "out" / "test")[0][0].shape == (512, 512)
    assert run("prepare", "synthetic", tmp_path / "out", *counts[:-1], "4") == 1
