import csv
import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from muvit.data.folders import open_labelled_folder
from muvit.data.sources import prepare as module
from muvit.data.sources.label_map import LabelMap
from muvit.data.sources.prepare import prepare
from muvit.data.sources.source import Item, Source, check_source, mapped
from muvit.errors import ExistsError, InputError, ReadError

RNG = np.random.default_rng(0)
MAP = LabelMap({"nothing": (0,), "thing": (1,)})
PLACES = {"a": "train", "b": "train", "c": "test"}


def write(folder, name, high=2, size=(40, 50)):
    folder.mkdir(exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    Image.fromarray(RNG.integers(0, high, size, dtype=np.uint8)).save(folder / f"{name}_labels.png")


def find(folder, **changes):
    items = tuple(
        Item(
            name=name,
            split=split,
            images=(folder / f"{name}.png",),
            labels=(folder / f"{name}_labels.png",),
            group=name.upper(),
        )
        for name, split in PLACES.items()
        if (folder / f"{name}.png").exists()
    )
    settings = {"dataset": "toy", "folder": folder, "items": items, "levels": (1, 2), **mapped(MAP)}
    return Source(**settings | changes)


@pytest.fixture
def folder(tmp_path):
    for name in PLACES:
        write(tmp_path / "in", name)
    return tmp_path / "in"


def times(output):
    return {f.relative_to(output): f.stat().st_mtime_ns for f in sorted(output.rglob("*.ome.zarr/zarr.json"))}


def test_a_data_set_becomes_folders_to_train_on(tmp_path, folder):
    steps = []
    assert prepare(find(folder), tmp_path / "out", progress=lambda *step: steps.append(step)) == tmp_path / "out"
    for split, names in (("train", ["a", "b"]), ("test", ["c"])):
        pairs = open_labelled_folder(tmp_path / "out" / split)
        assert [image.name for image, _ in pairs] == names
        for image, labels in pairs:
            stored = np.asarray(Image.open(folder / f"{image.name}.png")).transpose(2, 0, 1)
            np.testing.assert_array_equal(image.read(1, (0, 0), image.shape), stored)
            stored = np.asarray(Image.open(folder / f"{image.name}_labels.png"))
            np.testing.assert_array_equal(labels.read(1, (0, 0), labels.shape)[0], stored)
            assert (image.levels, labels.levels, labels.label_names) == ((1, 2), (1, 2), {0: "nothing", 1: "thing"})
    assert steps[-1] == (6, 6)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    rows = list(csv.DictReader((tmp_path / "out" / "slides.csv").read_text().splitlines()))
    assert rows[2] == {"name": "c", "split": "test", "group": "C", "animal": "", "source": "c.png"}


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, folder, monkeypatch):
    output = tmp_path / "out"
    prepare(find(folder), tmp_path / "straight")
    convert, done = module.convert_image, []

    def fail_at_the_fourth(source, target, **options):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(target)
        return convert(source, target, **options)

    monkeypatch.setattr(module, "convert_image", fail_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        prepare(find(folder), output)
    assert not (output / "slides.csv").exists()
    before = times(output)
    assert len(before) == 3
    # what a process leaves that is killed while it writes, and what half a copy of a store looks like
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (output / "train" / "labels" / f".b.ome.zarr.{ended.pid}.x1y2.{socket.gethostname()}.partial").mkdir()
    (output / "test" / "images" / "c.ome.zarr" / "0").mkdir(parents=True)
    (output / "test" / "images" / "c.ome.zarr" / "unfinished.json").write_text("{}")

    monkeypatch.setattr(module, "convert_image", convert)
    prepare(find(folder), output)
    after = times(output)
    assert {file: after[file] for file in before} == before
    assert len(after) == 6
    assert not list(output.rglob("*.partial"))
    files = [f.relative_to(output) for f in sorted(output.rglob("*")) if f.is_file()]
    assert files == [
        f.relative_to(tmp_path / "straight") for f in sorted((tmp_path / "straight").rglob("*")) if f.is_file()
    ]
    assert all((output / file).read_bytes() == (tmp_path / "straight" / file).read_bytes() for file in files)


def test_a_run_with_other_options_is_refused_until_it_may_begin_anew(tmp_path, folder):
    output = prepare(find(folder), tmp_path / "out")
    before = times(output)
    for change, message in (
        ({"levels": (1, 4)}, r"expected levels \[1, 2\], as it was begun with, got \[1, 4\]\. .*--overwrite"),
        ({"pixel_size_um": 0.5}, r"expected pixel_size_um null, .* got 0\.5"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(find(folder), output, **change)
    with pytest.raises(InputError, match=r'expected label_map null, .* got \{"x": \[1\]\}'):
        prepare(find(folder, options={"label_map": {"x": [1]}}), output)
    with pytest.raises(InputError, match=r'expected dataset "toy", .* got "other"'):
        prepare(find(folder, dataset="other"), output)
    assert times(output) == before
    prepare(find(folder), output, levels=(1, 4), overwrite=True)
    assert open_labelled_folder(output / "test")[0][0].levels == (1, 4)
    assert times(output).keys() == before.keys()


def test_slides_may_be_added_but_not_taken_away(tmp_path, folder):
    (folder / "b.png").rename(folder / "later")
    output = prepare(find(folder), tmp_path / "out")
    before = times(output)
    (folder / "later").rename(folder / "b.png")
    prepare(find(folder), output)
    assert {file: times(output)[file] for file in before} == before
    assert len(open_labelled_folder(output / "train")) == 2
    (folder / "a.png").unlink()
    with pytest.raises(InputError, match=r"expected the slide train/a it was begun with, got a source without it"):
        prepare(find(folder), output)


def test_a_slide_whose_files_have_changed_is_made_again(tmp_path, folder):
    output = prepare(find(folder), tmp_path / "out")
    before = times(output)
    write(folder, "b", size=(41, 50))
    prepare(find(folder), output)
    assert [image.shape for image, _ in open_labelled_folder(output / "train")] == [(40, 50), (41, 50)]
    assert {file for file, time in times(output).items() if time == before[file]} == {
        file for file in before if "b.ome.zarr" not in file.parts
    }


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, folder):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(ExistsError, match="choose another output"):
            prepare(find(folder), tmp_path / "out", overwrite=overwrite)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_damaged_manifest_is_named(tmp_path, folder):
    output = prepare(find(folder), tmp_path / "out")
    (output / "prepare.json").write_text('{"dataset": "toy"')
    with pytest.raises(ReadError, match=r"prepare\.json"):
        prepare(find(folder), output)


def test_a_label_without_a_class_stops_the_run_which_goes_on_once_it_is_mended(tmp_path, folder):
    good = (folder / "b_labels.png").read_bytes()
    Image.fromarray(np.full((40, 50), 7, np.uint8)).save(folder / "b_labels.png")
    with pytest.raises(
        InputError, match=r"b_labels\.png: expected labels of the classes nothing, thing only, got the value 7"
    ):
        prepare(find(folder), tmp_path / "out")
    assert len(times(tmp_path / "out")) == 3
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["slides"]["train/a"]["factor"] == 1
    (folder / "b_labels.png").write_bytes(good)
    prepare(find(folder), tmp_path / "out")
    assert (tmp_path / "out" / "slides.csv").exists()


def test_all_problems_are_told_at_once_and_before_any_work(tmp_path, folder):
    (folder / "a_labels.png").write_bytes(b"nothing")
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(folder / "b_labels.png")
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(folder / "c.png")
    with pytest.raises(InputError, match="expected the complete toy data, got 4 problems") as caught:
        prepare(find(folder, problems=("a thing is missing",)), tmp_path / "out")
    for problem in ("a thing is missing", "a_labels.png: expected a PNG", "b.png has shape", "images differ"):
        assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"), [({"levels": (2, 4)}, "levels"), ({"pixel_size_um": 0.0}, "pixel_size_um")]
)
def test_a_folder_is_not_begun_with_settings_that_cannot_be(tmp_path, folder, change, message):
    with pytest.raises(InputError, match=message):
        prepare(find(folder), tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_a_long_list_of_problems_is_cut(folder):
    with pytest.raises(InputError, match="30 problems") as caught:
        check_source(find(folder, problems=tuple(f"no {index}.png" for index in range(30))))
    assert str(caught.value).endswith("no 19.png\n  and 10 more.")


def test_names_twice_and_animals_in_two_splits_are_refused(folder):
    twins = [
        Item(name="x", split=split, images=(folder / f"{n}.png",), labels=(folder / f"{n}_labels.png",), animal="M1")
        for n, split in PLACES.items()
    ]
    with pytest.raises(InputError, match=r"several slides are called x: .*a\.png.*c\.png") as caught:
        check_source(find(folder, items=tuple(twins)))
    assert "slides of one animal, M1, are in train and test" in str(caught.value)


def test_a_folder_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(ReadError, match="expected the folder of toy, got nothing there"):
        check_source(find(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no images with labels were found"):
        check_source(find(tmp_path))
