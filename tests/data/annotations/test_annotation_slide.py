"""Annotations as label images: classes, priority, levels, processes."""

import multiprocessing
import pickle

import numpy as np
import orjson
import pytest
import shapely
from array_slide import ArraySlide

from muvit.data.annotations.objects import AnnotationConfig
from muvit.data.annotations.open import open_annotations
from muvit.data.pyramids.reduction import majority
from muvit.data.slides.derived import DerivedLevels
from muvit.errors import InputError, ReadError
from muvit.labels import IGNORED, WIDE_IGNORED

SHAPE = (75, 98)
IMAGE = ArraySlide(np.zeros(SHAPE, np.uint8), levels=(1, 4), name="a.png", pixel_size_um=(0.5, 0.25))


def write(file, *objects):
    """An object is the name of its class, and its box (top, left, bottom, right) or its polygon."""
    features = [
        {
            "type": "Feature",
            "geometry": orjson.loads(shapely.to_geojson(area if not isinstance(area, tuple) else box(area))),
            "properties": {"classification": {"name": name, "color": [10, 20, 30]}} if name else {},
        }
        for name, area in objects
    ]
    file.write_bytes(orjson.dumps({"type": "FeatureCollection", "features": features}))
    return file


def box(area):
    top, left, bottom, right = area
    return shapely.box(left, top, right, bottom)


def blobs(seed=0, count=25):
    """Discs and rings of a few classes, some beyond the border."""
    rng = np.random.default_rng(seed)
    centers, radii = rng.random((count, 2)) * (SHAPE[1] + 10) - 5, 2 + rng.random(count) * 20
    discs = [shapely.Point(c).buffer(r) for c, r in zip(centers, radii, strict=True)]
    return [(f"class {i % 3 + 1}", disc - shapely.buffer(disc.centroid, 3)) for i, disc in enumerate(discs)]


def whole(slide, level=1):
    return slide.read(level, (0, 0), slide.level_shape(level))[0]


def test_found_classes_have_values_in_alphabetical_order_and_a_line_says_so(tmp_path, caplog):
    names = ("b", "a", "Background", "class 10", "class 2", "Ignore*", None)
    file = write(tmp_path / "a.geojson", *((name, (i, 0, i + 1, 98)) for i, name in enumerate(names)))
    labels = open_annotations(file, IMAGE)
    assert whole(labels)[:8, 0].tolist() == [2, 1, 0, 4, 3, IGNORED, 5, 0]
    assert labels.label_names == {0: "Background", 1: "a", 2: "b", 3: "class 2", 4: "class 10", 5: "unclassified"}
    assert labels.label_colors == dict.fromkeys(range(5), (10, 20, 30))
    assert labels.ignored_labels == (IGNORED,)
    assert caplog.messages == [
        f"{tmp_path}: classes as found in the annotations: Background = 0, Ignore* ignore, a = 1, b = 2, class 2 = 3, "
        "class 10 = 4, unclassified = 5; not annotated: background"
    ]


def test_facts_are_those_of_the_image(tmp_path):
    labels = open_annotations(write(tmp_path / "a.geojson", ("a", (0, 0, 9, 9))), IMAGE, levels=(1, 8))
    assert (labels.shape, labels.levels, labels.pixel_size_um) == (SHAPE, (1, 4, 8), (0.5, 0.25))
    assert (labels.name, labels.dtype, labels.num_channels) == ("a", np.uint8, 1)


def test_settings_say_values_colours_and_what_is_ignored(tmp_path, caplog):
    file = write(tmp_path / "a.geojson", ("a", (0, 0, 1, 98)), ("b", (1, 0, 2, 98)), ("c", (2, 0, 3, 98)))
    config = AnnotationConfig(
        classes={"a": 3, "b": "ignore", "c": 3, "unused": 1}, colors={"a": (1, 1, 1)}, unannotated="ignore"
    )
    labels = open_annotations(file, IMAGE, config)
    assert whole(labels)[:4, 0].tolist() == [3, IGNORED, 3, IGNORED]
    assert (labels.label_names, labels.label_colors) == ({1: "unused", 3: "a/c"}, {3: (1, 1, 1)})
    assert not caplog.messages
    wide = open_annotations(file, IMAGE, AnnotationConfig(classes={"a": 300, "b": "ignore", "c": 0}))
    assert (whole(wide)[:3, 0].tolist(), wide.ignored_labels) == ([300, WIDE_IGNORED, 0], (WIDE_IGNORED,))


@pytest.mark.parametrize("name", ["classes.json", "classes.yaml", "classes.yml"])
def test_settings_may_lie_beside_the_annotations(tmp_path, name):
    file = write(tmp_path / "a.geojson", ("a", (0, 0, 1, 98)))
    (tmp_path / name).write_text('{"classes": {"a": 7}, "unannotated": "ignore"}')
    assert whole(open_annotations(file, IMAGE))[:2, 0].tolist() == [7, IGNORED]
    (tmp_path / "classes.yaml").touch()
    (tmp_path / "classes.json").touch()
    with pytest.raises(ReadError, match=r"expected one of classes.json, classes.yaml, classes.yml, got several"):
        open_annotations(file, IMAGE)


def test_regions_bound_what_counts(tmp_path):
    file = write(tmp_path / "a.geojson", ("a", (0, 0, 10, 10)), ("Region*", (5, 5, 20, 20)), ("Region*", (0, 0, 2, 2)))
    expected = np.full(SHAPE, IGNORED)
    expected[5:20, 5:20] = 0
    expected[5:10, 5:10] = expected[:2, :2] = 1
    np.testing.assert_array_equal(whole(open_annotations(file, IMAGE)), expected)
    other = open_annotations(file, IMAGE, AnnotationConfig(region_class=None))
    assert other.label_names == {0: "background", 1: "Region*", 2: "a"}
    alone = open_annotations(write(tmp_path / "b.geojson", ("Region*", (0, 0, 2, 2))), IMAGE)
    assert (whole(alone) == 0).sum() == 4


@pytest.mark.parametrize(("overlap", "value"), [("area", 2), ("classes", 3), ("file", 1)])
def test_overlapping_objects_have_an_order(tmp_path, overlap, value):
    file = write(tmp_path / "x.geojson", ("b", (2, 2, 9, 9)), ("c", (0, 0, 20, 20)), ("a", (1, 1, 10, 10)))
    labels = open_annotations(file, IMAGE, AnnotationConfig(overlap=overlap))
    assert whole(labels)[5, 5] == value


@pytest.mark.parametrize("level", [2, 3, 4, 8])
def test_levels_up_to_8_are_the_votes_of_the_finest_pixels(tmp_path, level):
    labels = open_annotations(write(tmp_path / "a.geojson", *blobs()), IMAGE, levels=(level,))
    np.testing.assert_array_equal(whole(labels, level), majority(whole(labels)[None], level)[0])


@pytest.mark.parametrize("level", [12, 16, 32])
def test_coarser_levels_differ_from_the_votes_at_outlines_alone(tmp_path, level):
    image = ArraySlide(np.zeros((1000, 1100), np.uint8), levels=(1,), name="a.png")
    shapes = [(name, shapely.transform(area, lambda points: points * 11)) for name, area in blobs(count=60)]
    labels = open_annotations(write(tmp_path / "a.geojson", *shapes), image, levels=(level,))
    coarse, votes = whole(labels, level), whole(DerivedLevels(ArraySlide(whole(labels)), (level,), "label"), level)
    low, high = (fold(whole(labels), level, best) for best in (np.minimum, np.maximum))
    assert (coarse == votes)[low == high].all()
    assert (coarse != votes).sum() <= 0.05 * (low != high).sum()


def fold(labels, level, best):
    rows = best.reduceat(labels, np.arange(0, labels.shape[0], level), axis=0)
    return best.reduceat(rows, np.arange(0, labels.shape[1], level), axis=1)


def test_windows_are_read_as_from_a_label_image(tmp_path):
    labels = open_annotations(write(tmp_path / "a.geojson", *blobs()), IMAGE)
    stored = ArraySlide(whole(labels))
    for start, size in (((3, 5), (20, 30)), ((-4, -7), (20, 20)), ((60, 90), (40, 40))):
        np.testing.assert_array_equal(labels.read(1, start, size), stored.read(1, start, size))


def test_labels_are_the_same_in_other_processes(tmp_path):
    labels = open_annotations(write(tmp_path / "a.geojson", *blobs()), IMAGE)
    expected = whole(labels, 4)
    np.testing.assert_array_equal(whole(pickle.loads(pickle.dumps(labels)), 4), expected)
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            np.testing.assert_array_equal(pool.apply(whole, (labels, 4)), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": {"a": 1}}, r"a.geojson: expected classes with a value \(a\), got 'b'. Give each a value"),
        ({"classes": {"a": -1, "b": 2}}, "value of the class 'a': expected a whole number from 0 to 65534"),
        ({"classes": {"a": True, "b": 2}}, "value of the class 'a': expected a whole number from 0 to 65534"),
        ({"classes": {"a": 1, "b": "no"}}, "value of the class 'b'"),
        ({"classes": {"Region*": 1}}, r"classes: expected no value for the region_class, got 'Region\*'"),
        ({"unannotated": "x"}, "unannotated: expected background or ignore, got 'x'"),
        ({"overlap": "x"}, "overlap: expected area or classes or file, got 'x'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message):
    file = write(tmp_path / "a.geojson", ("a", (0, 0, 1, 1)), ("b", (0, 0, 1, 1)))
    with pytest.raises(InputError, match=message):
        open_annotations(file, IMAGE, AnnotationConfig(**settings))


def test_volumes_have_no_annotations(tmp_path):
    with pytest.raises(InputError, match="expected the annotations of a 2D image, got labels with axes zyx"):
        open_annotations(write(tmp_path / "a.geojson", ("a", (0, 0, 1, 1))), ArraySlide(np.zeros((1, 4, 4, 4))))
