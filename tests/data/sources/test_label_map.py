from pathlib import Path

import numpy as np
import pytest

from muvit.data.sources.label_map import LabelMap, vote
from muvit.errors import InputError, ReadError
from muvit.labels import IGNORED

FILE = Path("labels.png")
MERGED = LabelMap({"background": (0,), "cortex": (11, 7), "ignore": (255,), "midbrain": (600_000_000,)})
COLORS = LabelMap({"land": ((0, 0, 0),), "water": ((150, 200, 250),), "ignore": ((255, 255, 255),)})


def test_values_become_the_classes_in_their_order():
    stored = np.array([[[0, 7, 11], [600_000_000, 255, 0]]], np.uint32)
    classes = MERGED.decode(stored, FILE)
    np.testing.assert_array_equal(classes, [[0, 1, 1], [2, IGNORED, 0]])
    assert (classes.dtype, MERGED.names) == (np.uint8, ("background", "cortex", "midbrain"))


def test_colours_become_the_classes_in_their_order():
    rgb = np.array([[[0, 150, 255]], [[0, 200, 255]], [[0, 250, 255]]], np.uint8)
    np.testing.assert_array_equal(COLORS.decode(rgb, FILE), [[0, 1, IGNORED]])


@pytest.mark.parametrize(
    ("label_map", "pixels", "message"),
    [
        (
            MERGED,
            np.full((1, 2, 2), 12, np.uint8),
            r"labels\.png: expected labels of .*cortex.*, got the value 12\. .*map",
        ),
        (COLORS, np.full((3, 2, 2), 9, np.uint8), r"got the colour \(9, 9, 9\)"),
        (COLORS, np.zeros((1, 2, 2), np.uint8), r"expected labels in colours .*, got 1 channel"),
        (MERGED, np.zeros((3, 2, 2), np.uint8), "expected labels in one channel, got 3"),
    ],
)
def test_labels_that_are_in_no_class_are_refused_by_the_files_name(label_map, pixels, message):
    with pytest.raises(InputError, match=message):
        label_map.decode(pixels, FILE)


def test_a_map_is_read_from_yaml_and_written_as_json(tmp_path):
    (tmp_path / "a.yaml").write_text("background: 0\ncortex: [11, 7]\nignore: 255\nmidbrain: 600000000\n")
    assert LabelMap.read(tmp_path / "a.yaml") == MERGED
    (tmp_path / "b.yaml").write_text("land: [[0, 0, 0]]\nwater: [[150, 200, 250]]\nignore: [[255, 255, 255]]\n")
    assert LabelMap.read(tmp_path / "b.yaml") == COLORS
    assert COLORS.to_json() == {"land": [[0, 0, 0]], "water": [[150, 200, 250]], "ignore": [[255, 255, 255]]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [2, 1]", "every value in one class, got 1 more than once"),
        ("a: one", "whole numbers or colours"),
        ("a: [[1, 2]]", "whole numbers or colours"),
        ("a: [[1, 2, 300]]", "whole numbers or colours"),
        ("a: true", "whole numbers or colours"),
        ("a: 1\nb: [[1, 2, 3]]", "either numbers or colours"),
        ("ignore: 1", "1 to 254 classes, got 0"),
        ("a: []", "either numbers or colours, got no values"),
    ],
)
def test_maps_that_mean_nothing_are_refused(tmp_path, text, message):
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        LabelMap.read(tmp_path / "map.yaml")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", None])
def test_files_that_are_no_maps_are_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(ReadError, match="YAML that gives the values of each class"):
        LabelMap.read(tmp_path / "map.yaml")


def test_the_majority_decides_ties_go_to_the_lower_class_and_nobody_votes_by_leaving_blank():
    blank = IGNORED
    votes = np.array([[3, 2, 2, blank, blank], [3, 1, 2, blank, 3], [0, blank, 0, blank, blank]], np.uint8)
    np.testing.assert_array_equal(vote(list(votes), 4), [3, 1, 2, blank, 3])
