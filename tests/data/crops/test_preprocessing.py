import pytest
import yaml

from muvit.data.crops.normalize import Percentile, Range, Standardize
from muvit.data.crops.placement import FreeViews
from muvit.data.crops.preprocessing import FILE, Preprocessing
from muvit.errors import CheckpointError, InputError

SETTINGS = {
    "crop_size": (64, 96),
    "normalization": Range(0, 255),
    "class_names": ("background", "vessel"),
    "class_colors": ((0, 0, 0), (255, 128, 0)),
}


def keep(folder, **changes):
    preprocessing = Preprocessing(**SETTINGS | changes)
    (folder / FILE).write_text(preprocessing.to_yaml())
    return preprocessing


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"padding": "reflect", "pixel_size_um": (0.5, 0.25)},
        {"normalization": Percentile(2, 98, scope="sample")},
        {"normalization": Standardize(mean=(1.0, 2.0), std=(0.5, 3.0), local_mean=(1,)), "placement": "concentric"},
        {"class_names": ("Hintergrund", "Gefäß"), "crop_size": (8, 16, 16)},
    ],
)
def test_settings_come_back_as_they_were(tmp_path, changes):
    assert keep(tmp_path, **changes) == Preprocessing.load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"context": "random", "free_views": None}, {"placement": "nested"}),
        ({"context": "centered", "free_views": None}, {"placement": "concentric"}),
        (
            {"context": "random", "free_views": {"offset_px": None, "boxes": "true"}},
            {"placement": "free", "free_views": FreeViews()},
        ),
        ({}, {}),
    ],
)
def test_older_spellings_of_the_placement_are_read(tmp_path, old, new):
    values = yaml.safe_load(Preprocessing(**SETTINGS).to_yaml())
    del values["placement"], values["free_views"]
    (tmp_path / FILE).write_text(yaml.safe_dump(values | old))
    assert Preprocessing.load(tmp_path) == Preprocessing(**SETTINGS | new)


def test_the_file_is_plain_yaml(tmp_path):
    keep(tmp_path)
    values = yaml.safe_load((tmp_path / FILE).read_text())
    assert values["crop_size"] == [64, 96]
    assert values["normalization"] == {"kind": "range", "low": 0, "high": 255}


def test_a_file_that_does_not_tell_of_the_background_has_one(tmp_path):
    keep(tmp_path, has_background=False)
    assert not Preprocessing.load(tmp_path).has_background
    older = yaml.safe_load((tmp_path / FILE).read_text())
    del older["has_background"]
    (tmp_path / FILE).write_text(yaml.safe_dump(older))
    assert Preprocessing.load(tmp_path).has_background


def test_every_class_has_a_colour():
    with pytest.raises(InputError, match="class_colors: expected one colour for each of 2 classes"):
        Preprocessing(**SETTINGS | {"class_colors": ((0, 0, 0),)})


def test_a_folder_without_the_file_is_no_trained_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a trained model, with preprocessing\.yaml, got none"):
        Preprocessing.load(tmp_path)


def spoiled(**changes):
    values = yaml.safe_load(Preprocessing(**SETTINGS).to_yaml()) | changes
    return yaml.safe_dump({name: value for name, value in values.items() if value != "gone"})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "just words",
        "crop_size: [1",
        spoiled(crop_size="gone"),
        spoiled(normalization="gone"),
        spoiled(normalization={"kind": "whiten"}),
        spoiled(normalization="range"),
        spoiled(normalization={"kind": "range", "low": "dark"}),
        spoiled(speed=3),
        spoiled(class_colors=[[0, 0, 0]]),
        spoiled(class_names=None),
        spoiled(padding="mirror"),
        spoiled(placement="anywhere"),
        spoiled(context="centered"),
        spoiled(crop_size=[0, 64]),
        spoiled(crop_size=[]),
        spoiled(crop_size="big"),
        spoiled(has_background="road"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"preprocessing\.yaml: expected the settings of a trained model"):
        Preprocessing.load(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / FILE).write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(CheckpointError, match="settings of a trained model"):
        Preprocessing.load(tmp_path)


def test_yaml_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    (tmp_path / FILE).write_text(f'padding: !!python/object/apply:os.mkdir ["{tmp_path / "proof"}"]\n')
    with pytest.raises(CheckpointError, match="settings of a trained model"):
        Preprocessing.load(tmp_path)
    assert not (tmp_path / "proof").exists()
