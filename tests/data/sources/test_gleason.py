import numpy as np
import pytest
from PIL import Image

from muvit.data.slides.open import open_slide
from muvit.data.sources.gleason import find_gleason, split_of
from muvit.data.sources.label_map import LabelMap
from muvit.data.sources.prepare import prepare
from muvit.data.sources.source import check_source
from muvit.errors import InputError
from muvit.labels import IGNORED


def save(file, pixels):
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(file)


def write_core(folder, name, maps):
    """A core and the codes that each annotator gave to its pixels, one row of them."""
    width = len(next(iter(maps.values())))
    save(folder / "Train Imgs" / f"{name}.jpg", np.full((8, width, 3), 200, np.uint8))
    for annotator, codes in maps.items():
        save(
            folder / f"Maps{annotator}_T" / f"{name}_classimg_nonconvex.png", np.tile(np.array(codes, np.uint8), (8, 1))
        )


@pytest.fixture
def folder(tmp_path):
    #                                          benign codes count together; 3 and 4 tie; blank
    write_core(tmp_path, "slide001_core016", {1: [1, 3, 4, 0], 3: [6, 5, 3, 0], 6: [3, 5, 4, 0], 5: [3, 3, 3, 5]})
    write_core(tmp_path, "slide002_core015", {2: [4, 4, 4, 4]})
    write_core(tmp_path, "slide007_core003", {2: [5, 5, 5, 5], 4: [5, 5, 5, 5]})
    return tmp_path


def test_annotators_are_put_to_the_vote_and_cores_split_by_slide_and_number(folder, tmp_path_factory):
    source = find_gleason(folder)
    assert {item.name: (item.split, item.group, len(item.labels)) for item in source.items} == {
        "slide001_core016": ("train", "slide001", 4),
        "slide002_core015": ("val", "slide002", 1),
        "slide007_core003": ("test", "slide007", 2),
    }
    output = prepare(source, tmp_path_factory.mktemp("out") / "gleason")
    labels = open_slide(output / "train" / "labels" / "slide001_core016.ome.zarr")
    np.testing.assert_array_equal(labels.read(1, (0, 0), (1, 4)), [[[0, 1, 1, 0]]])
    assert labels.label_names == {0: "benign", 1: "grade 3", 2: "grade 4", 3: "grade 5"}
    assert not labels.has_background


def test_blank_pixels_can_be_no_vote(folder):
    strict = LabelMap({"benign": (1, 2, 6), "grade 3": (3,), "grade 4": (4,), "grade 5": (5,), "ignore": (0,)})
    write_core(folder, "slide003_core020", {1: [0, 0, 0], 2: [0, 4, 5], 3: [0, 0, 1]})
    source = find_gleason(folder, label_map=strict)
    core = next(item for item in source.items if item.name == "slide003_core020")
    np.testing.assert_array_equal(source.open_labels(core).read(1, (0, 0), (1, 3)), [[[IGNORED, 2, 0]]])


def test_what_is_missing_is_listed_together(folder):
    (folder / "Maps2_T" / "slide002_core015_classimg_nonconvex.png").unlink()
    (folder / "Train Imgs" / "slide007_core003.jpg").unlink()
    save(folder / "Maps6_T" / "slide001_core016_classimg_nonconvex.png", np.zeros((9, 4), np.uint8))
    source = find_gleason(folder)
    assert source.warnings == ("slide007_core003: maps without an image",)
    with pytest.raises(InputError, match="2 problems") as caught:
        check_source(source)
    assert "slide002_core015.jpg: no map of it by any annotator" in str(caught.value)
    assert "slide001_core016_classimg_nonconvex.png: expected shape (8, 4)" in str(caught.value)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match="2 problems:\n  no images Train Imgs"):
        check_source(find_gleason(tmp_path))


def test_an_unknown_code_is_refused(folder, tmp_path_factory):
    write_core(folder, "slide004_core001", {1: [9]})
    with pytest.raises(InputError, match=r"slide004_core001_classimg_nonconvex\.png: .* got the value 9"):
        prepare(find_gleason(folder), tmp_path_factory.mktemp("out") / "gleason")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("slide007_core100", "test"),
        ("slide007_core003", "test"),
        ("slide006_core015", "val"),
        ("slide001_core016", "train"),
    ],
)
def test_splits(name, split):
    assert split_of(name) == split
