"""Recipes and metadata of any content: read, or refused by one of the package's errors."""

import copy
import json
from contextlib import suppress
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import FILE, Preprocessing
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.open import open_slide
from muvit.errors import MuViTError
from muvit.models.encoder import EncoderConfig
from muvit.models.folder import plain
from muvit.models.segmenter import SegmenterConfig
from muvit.settings import make_settings
from muvit.training.recipes import DataConfig, Recipe

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["muvit", "relay", "unet", "nested", "1e3", "null", "../x", "10min", "!!python/name:os.system"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
ENCODER = EncoderConfig(in_channels=1, levels=(1, 4))
RECIPE = plain(asdict(Recipe(data=DataConfig(train="x"), model=SegmenterConfig(encoder=ENCODER, num_classes=2))))
PREPROCESSING = yaml.safe_load(
    Preprocessing(
        crop_size=(16, 16), normalization=Range(), class_names=("a", "b"), class_colors=((0, 0, 0), (1, 1, 1))
    ).to_yaml()
)


def paths(values, prefix=()):
    """The path of every value in mappings and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


def changed(original):
    """``original`` with up to three values replaced, removed or added."""

    def change(edits):
        values = copy.deepcopy(original)
        for path, name, value, how in edits:
            inner = values
            for key in path[:-1]:
                inner = inner[key] if isinstance(inner, dict | list) and _has(inner, key) else None
            if not isinstance(inner, dict | list) or not _has(inner, path[-1]):
                continue
            if how == "remove":
                del inner[path[-1]]
            elif how == "add" and isinstance(inner, dict):
                inner[name] = value
            else:
                inner[path[-1]] = value
        return values

    where = st.sampled_from(sorted(paths(original), key=str))
    edit = st.tuples(where, st.text(max_size=6), VALUES, st.sampled_from(["replace", "replace", "remove", "add"]))
    return st.lists(edit, min_size=1, max_size=3).map(change)


def _has(values, key):
    return key in values if isinstance(values, dict) else isinstance(key, int) and key < len(values)


def read_recipe(values):
    try:
        make_settings(values, Recipe, subject="recipe.yaml")
    except MuViTError as error:
        assert "\n" not in str(error) or "\n" in str(values)


def read_preprocessing(folder, values):
    (folder / FILE).write_text(yaml.safe_dump(values))
    with suppress(MuViTError):
        Preprocessing.load(folder)


def read_metadata(store, values):
    (store / "zarr.json").write_text(json.dumps(values))
    with suppress(MuViTError):
        slide = open_slide(store)
        slide.read(slide.levels[0], (0,) * slide.ndim, (4,) * slide.ndim)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "a.ome.zarr"
    writer = PyramidWriter.create(folder, shape=(32, 32), num_channels=1, dtype=np.uint8, levels=(1, 4), kind="image")
    writer.write((0, 0), np.ones((1, 32, 32), np.uint8))
    writer.finish()
    return folder, json.loads((folder / "zarr.json").read_text())


def run(kind, store, folder, count):
    original, read = {
        "recipes": (RECIPE, read_recipe),
        "preprocessing": (PREPROCESSING, lambda values: read_preprocessing(folder, values)),
        "metadata": (store[1], lambda values: read_metadata(store[0], values)),
    }[kind]
    quiet = settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    quiet(given(changed(original))(read))()


SHARES = {"recipes": 5000, "preprocessing": 1000, "metadata": 4000}
"""Of 10,000 examples in all."""


@pytest.mark.parametrize("kind", SHARES)
def test_50_of_each(kind, store, tmp_path):
    run(kind, store, tmp_path, 50)


@pytest.mark.long
@pytest.mark.parametrize("kind", SHARES)
def test_10_000_in_all(kind, store, tmp_path):
    run(kind, store, tmp_path, SHARES[kind])
