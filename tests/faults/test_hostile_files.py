"""Files of others: refused by one of the package's errors, in one sentence, with nothing executed."""

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from memory_slide import MemorySlide

from muvit.cli.compare import _variants
from muvit.data.annotations.formats import geojson_objects, read_json
from muvit.data.annotations.open import read_annotations
from muvit.data.crops.preprocessing import FILE, Preprocessing
from muvit.data.sources.label_map import LabelMap
from muvit.errors import MuViTError
from muvit.inference.tiling.region import read_region
from muvit.models.encoder import EncoderConfig
from muvit.models.folder import CONFIG, WEIGHTS
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import TrainedModel, load_model
from muvit.settings import read_settings
from muvit.training.recipes import DataConfig, Recipe

CONFIGURATION = SegmenterConfig(
    encoder=EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=2, heads=2),
    num_classes=3,
    decoder_widths=(8, 8, 4),
    stem_width=4,
)
SETTINGS = Preprocessing(
    crop_size=(16, 16),
    normalization=Preprocessing.from_plain(
        {
            "crop_size": [16, 16],
            "normalization": {"kind": "range", "low": 0, "high": 1},
            "class_names": [],
            "class_colors": [],
        }
    ).normalization,
    class_names=("a", "b", "c"),
    class_colors=((0, 0, 0), (1, 1, 1), (2, 2, 2)),
)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
"""YAML of a billion values in a few hundred bytes."""
CODE = "!!python/object/apply:os.system ['touch executed']"
TEXTS = {
    "aliases": BOMB,
    "code": CODE,
    "code in a value": f"kind: {CODE}\n",
    "deep lists": "[" * 100_000,
    "deep mappings": "".join(f"{' ' * i}a:\n" for i in range(500)),
    "a key twice": "kind: muvit\nkind: muvit\n",
    "many bytes": "a: " + "x" * 10_000_000,
    "no text": "\0\1\2",
    "other encoding": "\udcff",
    "empty": "",
    "a list": "- 1\n- 2\n",
    "a number": "3",
    "a long number": "a: " + "9" * 50_000,
    "a date": "a: 2024-99-99\n",
    "alias of itself": "a: &a [*a]\n",
}
GEOJSON = {
    "deep lists": "[" * 100_000,
    "deep features": '{"type": "FeatureCollection", "features": [' * 50_000,
    "deep geometry": '{"type": "Polygon", "coordinates": ' + "[" * 900 + "]" * 900 + "}",
    "infinite": '{"type": "Polygon", "coordinates": [[[0, 0], [1e400, 0], [1, 1], [0, 0]]]}',
    "no numbers": '{"type": "Polygon", "coordinates": [[["a", 0], [1, 0], [1, 1], ["a", 0]]]}',
    "a string": '"Polygon"',
    "a number": "3",
    "no type": "{}",
    "other type": '{"type": ["Polygon"], "coordinates": 3}',
    "empty": "",
    "no text": "\0",
}


@pytest.fixture(autouse=True)
def _nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("executed").exists()


def write(file, text):
    file.write_bytes(text.encode(errors="surrogateescape"))


def refused(call, *arguments):
    with pytest.raises(MuViTError) as error:
        call(*arguments)
    said = str(error.value)
    assert "\n" not in said and len(said) < 1000, said


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    TrainedModel(model=Segmenter(CONFIGURATION), preprocessing=SETTINGS).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", ["model", "preprocessing", "recipe", "variants", "label map", "run of a study"])
def test_text(model, tmp_path, kind, name):
    file = {"model": model / CONFIG, "preprocessing": model / FILE}.get(kind, tmp_path / "file.yaml")
    write(file, TEXTS[name])
    recipe = Recipe(data=DataConfig(train="x"), model=CONFIGURATION)
    if kind in ("model", "preprocessing"):
        refused(load_model, model)
    elif kind == "recipe":
        refused(read_settings, file, Recipe)
    elif kind == "variants" and name != "empty":
        refused(_variants, file, recipe)
    elif kind == "label map":
        refused(LabelMap.read, file)


@pytest.mark.parametrize("name", GEOJSON)
def test_outlines(tmp_path, name):
    file = tmp_path / "outlines.geojson"
    write(file, GEOJSON[name])
    refused(read_region, str(file), MemorySlide({1: np.zeros((1, 64, 64), np.uint8)}))
    refused(lambda: geojson_objects(file, read_json(file)))


ARCHIVES = {
    "names outside": [("../../executed.roi", b"Iout" + bytes(60)), ("/executed.roi", b"")],
    "a bomb": [("a.roi", bytes(20_000_000))],
    "many bombs": [(f"{i}.roi", bytes(2_000_000)) for i in range(9)],
    "a folder": [("a.roi/", b"")],
    "no regions": [("a.txt", b"x")],
}


def write_archive(file, name):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in ARCHIVES[name]:
            archive.writestr(entry, content)


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(tmp_path, name):
    write_archive(tmp_path / "regions.zip", name)
    refused(read_annotations, tmp_path / "regions.zip", MemorySlide({1: np.zeros((1, 64, 64), np.uint8)}))
    assert [path.name for path in tmp_path.iterdir()] == ["regions.zip"]


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder.num_layers": 10**9},
        {"encoder.dim": 10**7},
        {"encoder.dim": 2**70},
        {"encoder.dim": -16},
        {"encoder.heads": 0},
        {"encoder.levels": [[]]},
        {"encoder.patch_size": 10**6},
        {"encoder": 3},
        {"num_classes": 10**10},
        {"num_classes": float("nan")},
        {"decoder_widths": [10**6] * 3},
        {"decoder_widths": "abc"},
        {"stem_width": 2**40},
        {"format": 99},
        {"format": "x"},
        {"format": [1]},
        {"kind": "nonsense"},
        {"kind": ["muvit"]},
        {"other": 1},
    ],
)
def test_settings_of_models(model, changes):
    settings = yaml.safe_load((model / CONFIG).read_text())
    for path, value in changes.items():
        *section, name = path.split(".")
        (settings[section[0]] if section else settings)[name] = value
    write(model / CONFIG, yaml.safe_dump(settings))
    refused(load_model, model)


@pytest.mark.parametrize(
    "changes",
    [
        {"pixel_size_um": [-1.0, 1.0]},
        {"pixel_size_um": [0.0, 1.0]},
        {"pixel_size_um": "x"},
        {"pixel_size_um": [float("inf"), 1.0]},
        {"crop_size": []},
        {"crop_size": [0, 16]},
        {"crop_size": [16.5, 16]},
        {"normalization": 3},
        {"normalization": {"kind": "range", "low": "a", "high": 1}},
        {"normalization": {"kind": ["range"]}},
        {"class_names": 3},
        {"class_colors": [[0, 0]] * 3},
        {"class_colors": [[0, 0, 300]] * 3},
        {"padding": "x"},
        {"nonfinite": "x"},
        {"free_views": 3},
        {"other": 1},
    ],
)
def test_preprocessing(model, changes):
    settings = yaml.safe_load((model / FILE).read_text()) | changes
    write(model / FILE, yaml.safe_dump(settings))
    refused(load_model, model)


def header(content, length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header({}, 2**63),
        header(b"[" * 1_000_000),
        header(b" " * (2**23 + 1)),
        header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}),
        header({"a": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 4]}}) + b"\0" * 4,
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 4,
        header({}),
    ],
)
def test_weights(model, content):
    (model / WEIGHTS).write_bytes(content)
    refused(load_model, model)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_weights_of_format_0_that_hold_code(model):
    from muvit.models.upgrade import OLD_WEIGHTS

    (model / WEIGHTS).unlink()
    torch.save({"a": Evil()}, model / OLD_WEIGHTS)
    with pytest.raises(MuViTError, match="neither is loaded") as error:
        load_model(model)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    "entry", ["a: {settings: 3}", "a: {settings: [1]}", "a: {more: 1}", "a: 1", "1: {settings: {model: 3}}"]
)
def test_variants(tmp_path, entry):
    write(tmp_path / "variants.yaml", entry)
    refused(_variants, tmp_path / "variants.yaml", Recipe(data=DataConfig(train="x"), model=CONFIGURATION))


_MEASURE = """
import resource, sys, time
sys.path[:0] = {path!r}
import test_hostile_files as tests
from pathlib import Path
before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
try:
    tests.{call}
except tests.MuViTError:
    print(time.monotonic() - begin, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs the memory of a process")
@pytest.mark.parametrize(
    "kind", ["aliases", "deep lists", "deep mappings", "many bytes", "a long number", "weights", "sizes", "archive"]
)
def test_a_refusal_takes_little_time_and_memory(model, kind):
    call = "load_model(Path('model'))"
    if kind == "archive":
        write_archive("regions.zip", "a bomb")
        call = "read_annotations(Path('regions.zip'), tests.MemorySlide({1: tests.np.zeros((1, 64, 64), 'u1')}))"
    elif kind == "weights":
        (model / WEIGHTS).write_bytes(header(b" " * 99_000_000))
    elif kind == "sizes":
        settings = yaml.safe_load((model / CONFIG).read_text())
        settings["encoder"]["num_layers"] = 10**9
        write(model / CONFIG, yaml.safe_dump(settings))
    else:
        write(model / CONFIG, TEXTS[kind])
    path = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE.format(path=path, call=call)], capture_output=True, text=True, check=True
    )
    seconds, mebibytes = map(float, done.stdout.split())
    assert seconds < 2 and mebibytes < 200, (seconds, mebibytes)
