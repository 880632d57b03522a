import numpy as np
import pytest
from PIL import Image

from muvit.data.folders import open_labelled_folder
from muvit.data.sources.label_map import LabelMap
from muvit.data.sources.mouse import CLASSES, find_mouse
from muvit.data.sources.prepare import prepare
from muvit.data.sources.source import check_source
from muvit.errors import InputError
from muvit.labels import IGNORED


def write(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 10), value, np.uint8)).save(file)


@pytest.fixture
def flat(tmp_path):
    for index, name in enumerate(("BM3_01", "BM3_02", "BM15_01", "BM7_01")):
        write(tmp_path / "images" / f"{name}.png", 100 + index)
        write(tmp_path / "labels" / f"{name}.png", 1 + index)
    return tmp_path


def splits(source):
    return {item.name: (item.split, item.animal) for item in source.items}


def test_whole_specimens_are_held_out(flat, tmp_path_factory):
    source = find_mouse(flat, val_specimens=["BM7"])
    assert splits(source) == {
        "BM3_01": ("train", "BM3"),
        "BM3_02": ("train", "BM3"),
        "BM7_01": ("val", "BM7"),
        "BM15_01": ("test", "BM15"),
    }
    output = prepare(source, tmp_path_factory.mktemp("out") / "mouse", pixel_size_um=1.35)
    [(image, labels)] = open_labelled_folder(output / "test")
    assert (image.name, image.read(1, (0, 0), (1, 1)), labels.read(1, (0, 0), (1, 1))) == ("BM15_01", 102, 3)
    assert image.pixel_size_um == labels.pixel_size_um == (1.35, 1.35)
    assert tuple(labels.label_names.values()) == CLASSES and labels.has_background
    assert image.levels == (1, 2, 4, 8, 16, 32)


def test_any_layout_and_any_label_values_can_be_said(tmp_path):
    for animal, number in (("BM15", 1), ("BM15", 2), ("BM3", 1)):
        write(tmp_path / animal / "raw" / f"s{number}.tif", 7)
        write(tmp_path / animal / "regions" / f"s{number}_atlas.png", 40 + number)
    regions = LabelMap({"background": (0, 41), "hippocampus": (40,), "ignore": (42,)})
    source = find_mouse(
        tmp_path,
        images="*/raw/*.tif",
        labels="{specimen}/regions/{name}_*.png",
        label_map=regions,
        specimen=r"(BM\d+)/raw",
    )
    assert splits(source) == {"BM15_s1": ("test", "BM15"), "BM15_s2": ("test", "BM15"), "BM3_s1": ("train", "BM3")}
    values = [source.open_labels(item).read(1, (0, 0), (1, 1)) for item in source.items]
    assert values == [0, IGNORED, 0]


def test_what_is_missing_is_listed_together(flat):
    (flat / "labels" / "BM3_01.png").unlink()
    write(flat / "labels" / "BM3_02.tif", 1)
    write(flat / "images" / "other.png", 1)
    source = find_mouse(flat, val_specimens=["BM8"])
    with pytest.raises(InputError, match="4 problems") as caught:
        check_source(source)
    for problem in (
        "images/BM3_01.png: no label files labels/BM3_01.*",
        "images/BM3_02.png: 2 label files",
        r"images/other.png: no specimen ('BM\\d+') in its path",
        "no image of specimen BM8",
    ):
        assert problem in str(caught.value)
    with pytest.raises(InputError, match=r"no images nothing/\*"):
        check_source(find_mouse(flat, images="nothing/*"))


def test_settings_that_contradict_each_other_are_refused(flat):
    with pytest.raises(InputError, match="val_specimens: expected none of the test specimens, got BM15"):
        find_mouse(flat, val_specimens=["BM15"])
    with pytest.raises(InputError, match="specimen: expected a regular expression"):
        find_mouse(flat, specimen="(")
    for option in ("images", "labels"):
        for pattern in ("/etc/*", ""):
            with pytest.raises(InputError, match=f"{option}: expected a pattern of paths inside the folder, got '"):
                find_mouse(flat, **{option: pattern})
