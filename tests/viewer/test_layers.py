"""The layers that napari gets, and the manifest of the plugin; napari itself is not needed."""

import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from array_slide import ArraySlide
from PIL import Image

from muvit.cli import main
from muvit.data.pyramids.writer import PyramidWriter
from muvit.viewer import layers
from muvit.viewer.layers import LevelArray, image_layer, labels_layer, read_layers, reader_for

ROOT = Path(__file__).parents[2]
LABELS = np.zeros((40, 60), np.uint8)
LABELS[8:20, 8:30] = 1


@pytest.fixture(autouse=True)
def without_napari(monkeypatch):
    monkeypatch.setattr(layers, "find_spec", lambda _: None)


def write_labels(path):
    writer = PyramidWriter.create(
        path,
        shape=LABELS.shape,
        num_channels=1,
        dtype=np.uint8,
        kind="label",
        levels=(1, 4),
        pixel_size_um=0.5,
        label_names={0: "glass", 1: "cell"},
        label_colors={0: (9, 9, 9), 1: (255, 0, 51)},
    )
    writer.write((0, 0), LABELS[None])
    writer.finish()
    return path


def test_an_image_is_shown_with_its_stored_levels_in_micrometers():
    pixels = np.random.default_rng(0).integers(10, 90, (1, 600, 800)).astype(np.uint16)
    slide = ArraySlide(pixels, levels=(1, 2, 8), pixel_size_um=(0.25, 0.5), name="a")
    data, settings, kind = image_layer(slide)
    assert kind == "image" and [level.shape for level in data] == [(600, 800), (300, 400), (75, 100)]
    assert (settings["scale"], settings["units"]) == ((0.25, 0.5), ("um", "um"))
    low, high = settings["contrast_limits"]
    assert 10 <= low < high <= 89
    slide.windows.clear()
    np.testing.assert_array_equal(np.asarray(data[1][10:20, 30:50]), slide.pyramid[2.0][0, 10:20, 30:50])
    assert {level for level, _ in slide.windows} == {2.0}  # and nothing of another level
    assert max(max(size) for _, size in slide.windows) <= 512


def test_colours_stay_together_and_other_channels_are_layers():
    colors = np.random.default_rng(0).integers(0, 256, (3, 20, 30)).astype(np.uint8)
    data, settings, _ = image_layer(ArraySlide(colors))
    assert settings["rgb"] and data[0].shape == (20, 30, 3) and settings["scale"] == (1.0, 1.0)
    np.testing.assert_array_equal(np.asarray(data[0]), np.moveaxis(colors, 0, -1))
    data, settings, _ = image_layer(ArraySlide(np.stack([np.arange(600), np.zeros(600)]).reshape(2, 20, 30), name="b"))
    assert settings["channel_axis"] == 0 and settings["name"] == ["b channel 0", "b channel 1"]
    limits = settings["contrast_limits"]
    assert limits[0][1] > 500 and limits[1] == (0.0, 1.0)  # without contrast, still a range


def test_labels_have_the_names_and_colours_of_their_classes(tmp_path):
    path = write_labels(tmp_path / "a.ome.zarr")
    ((data, settings, kind),) = read_layers(str(path))
    assert kind == "labels" and [level.shape for level in data] == [(40, 60), (10, 15)]
    assert settings["scale"] == (0.5, 0.5)
    assert settings["features"] == {"index": [0, 1], "class": ["glass", "cell"]}
    assert settings["colormap"][1] == (1.0, 0.0, 0.2, 1.0) and settings["colormap"][0][3] == 0  # background is clear
    np.testing.assert_array_equal(np.asarray(data[0]), LABELS)
    plain = labels_layer(ArraySlide(LABELS))[1]
    assert "colormap" not in plain


def test_the_labels_inside_an_image_follow_it(tmp_path):
    image = tmp_path / "a.ome.zarr"
    writer = PyramidWriter.create(image, shape=LABELS.shape, num_channels=1, dtype=np.uint8)
    writer.write((0, 0), LABELS[None])
    writer.finish()
    write_labels(image / "labels" / "cells")
    assert [(settings["name"], kind) for _, settings, kind in read_layers(str(image))] == [
        ("a", "image"),
        ("cells", "labels"),
    ]


def test_files_of_others_are_left_to_others(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.tif").write_text("words")
    assert reader_for(str(tmp_path / "a.png")) is read_layers
    assert reader_for([str(tmp_path / "a.png"), str(tmp_path / "b.tif")]) is None
    assert len(read_layers([str(tmp_path / "a.png")] * 2)) == 2


def test_a_level_is_indexed_like_an_array():
    pixels = np.arange(2 * 6 * 8).reshape(2, 6, 8)
    level = LevelArray(ArraySlide(pixels), 1)
    assert (level.shape, level.ndim) == ((2, 6, 8), 3)
    for index in (np.s_[0:1, 2:5, 3:], np.s_[1, :, 4], np.s_[:, 1:6:2, ::3]):
        np.testing.assert_array_equal(level[index], pixels[index])


def test_the_manifest_names_what_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, file = project["entry-points"]["napari.manifest"]["muvit"].partition(":")
    manifest = yaml.safe_load((ROOT / "src" / module.replace(".", "/") / file).read_text())
    commands = {command["id"]: command["python_name"] for command in manifest["contributions"]["commands"]}
    for name in commands.values():
        home, _, attribute = name.partition(":")
        source = (ROOT / "src" / f"{home.replace('.', '/')}.py").read_text()
        assert f"def {attribute}(" in source or f"class {attribute}(" in source
    used = [one["command"] for kind in ("readers", "widgets") for one in manifest["contributions"][kind]]
    assert set(used) == set(commands)


@pytest.mark.skipif(find_spec("napari") is not None, reason="napari is installed")
def test_without_napari_the_command_says_what_to_install(tmp_path, capfd):
    assert main(["view", str(tmp_path / "a.png")]) == 1
    assert "pip install muvit[napari]" in capfd.readouterr().err
