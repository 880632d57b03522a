import uuid

import numpy as np
import orjson
import pytest
import shapely
from array_slide import ArraySlide
from shapely.geometry import shape

from muvit.errors import ExistsError, InputError, ReadError
from muvit.inference.export.geojson import GeoJsonConfig, write_geojson
from muvit.inference.export.labelled import LabelledImage
from muvit.pictures import class_colors

EXACT = GeoJsonConfig(simplify_px=0)

LABELS = np.zeros((20, 30), np.uint8)
LABELS[2:9, 3:12] = 1
LABELS[4:6, 5:7] = 0
LABELS[10:18, 20:30] = 2


def written(folder, source=None, config=EXACT):
    count = write_geojson(source or LabelledImage(labels=ArraySlide(LABELS)), folder / "a.geojson", config)
    features = orjson.loads((folder / "a.geojson").read_bytes())
    assert features["type"] == "FeatureCollection" and set(features) == {"type", "features"}
    assert count == len(features["features"])
    for feature in features["features"]:
        check_feature(feature)
    return features["features"]


def check_feature(feature):
    """What QuPath asks for."""
    assert set(feature) == {"type", "id", "geometry", "properties"} and feature["type"] == "Feature"
    assert str(uuid.UUID(feature["id"])) == feature["id"]
    assert set(feature["geometry"]) == {"type", "coordinates"} and feature["geometry"]["type"] == "Polygon"
    for ring in feature["geometry"]["coordinates"]:
        assert len(ring) >= 4 and ring[0] == ring[-1]
        assert all(len(point) == 2 and all(isinstance(v, int | float) for v in point) for point in ring)
    assert shape(feature["geometry"]).is_valid
    properties = feature["properties"]
    assert set(properties) == {"objectType", "classification", "isLocked", "measurements"}
    assert properties["objectType"] in ("annotation", "detection")
    assert properties["isLocked"] is False
    assert set(properties["classification"]) == {"name", "color"}
    color = properties["classification"]["color"]
    assert len(color) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in color)
    assert all(isinstance(v, int | float) for v in properties["measurements"].values())


def test_every_object_is_a_feature_with_class_colour_and_area(tmp_path):
    one, two = written(tmp_path)
    assert shape(one["geometry"]).equals(shapely.box(3, 2, 12, 9) - shapely.box(5, 4, 7, 6))
    assert shape(two["geometry"]).equals(shapely.box(20, 10, 30, 18))
    assert [f["properties"]["classification"]["name"] for f in (one, two)] == ["class 1", "class 2"]
    assert [tuple(f["properties"]["classification"]["color"]) for f in (one, two)] == list(class_colors(3)[1:])
    measured = [f["properties"]["measurements"] for f in (one, two)]
    assert measured[0] == {
        "Area px^2": 59,
        "Perimeter px": 32,
        "Circularity": pytest.approx(4 * np.pi * 63 / 32**2),  # of the outer outline
    }
    assert measured[1] == {
        "Area px^2": 80,
        "Perimeter px": 36,
        "Circularity": pytest.approx(4 * np.pi * 80 / 36**2),
    }


def test_class_0_is_an_object_where_nothing_is_background(tmp_path):
    labels = ArraySlide(LABELS)
    labels.has_background = False
    areas = {}
    for feature in written(tmp_path, LabelledImage(labels=labels)):
        name = feature["properties"]["classification"]["name"]
        areas[name] = areas.get(name, 0) + shape(feature["geometry"]).area
    assert areas == {f"class {value}": count for value, count in enumerate(np.bincount(LABELS.ravel()))}


def test_coordinates_and_areas_are_those_of_the_image(tmp_path):
    # 4 times the labels, but for a ragged border
    image = ArraySlide(np.zeros((3, 79, 120), np.uint8), pixel_size_um=(0.25, 0.5))
    source = LabelledImage(labels=ArraySlide(LABELS), image=image)
    assert (source.scale, source.pixel_um) == ((4.0, 4.0), (1.0, 2.0))
    one, two = written(tmp_path, source)
    assert shape(two["geometry"]).equals(shapely.box(80, 40, 120, 72))
    assert all(isinstance(v, int) for point in two["geometry"]["coordinates"][0] for v in point)
    measured = one["properties"]["measurements"]
    assert (measured["Area px^2"], measured["Area µm^2"]) == (59 * 16, 59 * 2.0)
    assert measured["Perimeter µm"] == 2 * (9 * 2.0 + 7 * 1.0)  # 9 x 7 pixels of 2 x 1 um


def test_probabilities_are_the_means_over_each_object(tmp_path):
    y, x = np.indices(LABELS.shape)
    values = np.stack([y, x, y + x]).astype(np.uint8)
    probabilities = ArraySlide(values)
    probabilities.channel_names = ("glass", "one", "two")
    source = LabelledImage(labels=ArraySlide(LABELS), probabilities=probabilities)
    for feature, value in zip(written(tmp_path / "a", source), (1, 2), strict=True):
        inside = value == LABELS
        for name, channel in zip(probabilities.channel_names, values / 255, strict=True):
            assert feature["properties"]["measurements"][f"Probability {name}"] == pytest.approx(channel[inside].mean())
    half = LabelledImage(labels=ArraySlide(LABELS), probabilities=ArraySlide((values / 255).astype(np.float16)))
    (one, _) = written(tmp_path / "b", half)
    assert one["properties"]["measurements"]["Probability channel 0"] == pytest.approx(
        values[0][LABELS == 1].mean() / 255, rel=1e-3
    )
    with pytest.raises(InputError, match="expected probabilities of the"):
        LabelledImage(labels=ArraySlide(LABELS), probabilities=ArraySlide(values[:, 1:]))


def test_touching_objects_are_split_before_they_are_measured(tmp_path):
    y, x = np.mgrid[:40, :60]
    cells = ((np.hypot(y - 20, x - 18) < 11) | (np.hypot(y - 20, x - 38) < 11)).astype(np.uint8)
    source = LabelledImage(labels=ArraySlide(cells), pixel_size_um=0.5)
    (both,) = written(tmp_path / "both", source)
    parts = written(tmp_path / "parts", source, GeoJsonConfig(split_um=6.0))
    assert len(parts) == 2 and len({part["id"] for part in parts}) == 2
    measured = [f["properties"]["measurements"] for f in (both, *parts)]
    assert measured[0]["Area µm^2"] == measured[1]["Area µm^2"] + measured[2]["Area µm^2"]
    assert measured[0]["Circularity"] < 0.8 < 0.9 < min(one["Circularity"] for one in measured[1:])
    large = GeoJsonConfig(split_um=6.0, min_area_um2=max(one["Area µm^2"] for one in measured[1:]) + 1)
    assert len(written(tmp_path / "large", source, large)) == 0
    with pytest.raises(InputError, match="split_um: expected labels with a pixel size"):
        write_geojson(LabelledImage(labels=ArraySlide(cells)), tmp_path / "b", GeoJsonConfig(split_um=6.0))


def test_the_corner_of_the_scanned_part_is_the_origin(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "muvit.inference.export.labelled.WholeSlide", ArraySlide
    )  # OpenSlide's test files state no bounds
    image = ArraySlide(np.zeros((3, 40, 60), np.uint8), bounds=((4, 10), (36, 50)))
    _, two = written(tmp_path, LabelledImage(labels=ArraySlide(LABELS), image=image))
    assert shape(two["geometry"]).bounds == (40 - 10, 20 - 4, 60 - 10, 36 - 4)


def test_ids_are_of_their_objects_and_the_same_in_every_run(tmp_path):
    ids = [f["id"] for f in written(tmp_path / "one")]
    assert ids == [f["id"] for f in written(tmp_path / "two", config=GeoJsonConfig(object_type="detection"))]
    other = LabelledImage(labels=ArraySlide(LABELS, name="other"))
    assert not set(ids) & {f["id"] for f in written(tmp_path / "other", other)}
    assert len(set(ids)) == 2


def test_areas_stay_exact_when_outlines_are_simplified(tmp_path):
    y, x = np.mgrid[:80, :80]
    disc = ((y - 40) ** 2 + (x - 40) ** 2 < 900).astype(np.uint8)
    source = LabelledImage(labels=ArraySlide(disc), pixel_size_um=0.5)
    (exact,) = written(tmp_path / "exact", source)
    (simple,) = written(tmp_path / "simple", source, GeoJsonConfig(simplify_px=1.0))
    areas = ("Area px^2", "Area µm^2")
    exact_areas, simple_areas = ([f["properties"]["measurements"][name] for name in areas] for f in (exact, simple))
    assert exact_areas == simple_areas
    assert exact["properties"]["measurements"]["Area µm^2"] == disc.sum() / 4
    assert shape(exact["geometry"]).area == disc.sum()
    corners = [shapely.get_num_coordinates(shape(f["geometry"])) for f in (exact, simple)]
    assert corners[1] < corners[0] / 3
    assert shape(simple["geometry"]).area == pytest.approx(disc.sum(), rel=0.03)


def test_objects_smaller_than_the_least_area_are_left_out(tmp_path):
    source = LabelledImage(labels=ArraySlide(LABELS), pixel_size_um=2.0)
    areas = {"all": None, "both": 59 * 4, "large": 59 * 4 + 0.1, "none": 1e6}
    counts = {
        name: len(written(tmp_path / name, source, GeoJsonConfig(simplify_px=0, min_area_um2=area)))
        for name, area in areas.items()
    }
    assert counts == {"all": 2, "both": 2, "large": 1, "none": 0}
    with pytest.raises(InputError, match="min_area_um2: expected labels with a pixel size"):
        write_geojson(LabelledImage(labels=ArraySlide(LABELS)), tmp_path / "b", GeoJsonConfig(min_area_um2=1.0))


def test_a_file_is_whole_or_not_there(tmp_path):
    labels, file = ArraySlide(LABELS), tmp_path / "new" / "a.geojson"

    def broken(*_):
        raise ReadError("memory", expected="readable pixels", got="a hole")

    labels._read_window = broken
    with pytest.raises(ReadError):
        write_geojson(LabelledImage(labels=labels), file)
    assert list(file.parent.iterdir()) == []
    write_geojson(LabelledImage(labels=ArraySlide(LABELS)), file)
    before = file.read_bytes()
    with pytest.raises(ExistsError):
        write_geojson(LabelledImage(labels=ArraySlide(LABELS)), file)
    with pytest.raises(ReadError):
        write_geojson(LabelledImage(labels=labels), file, overwrite=True)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": ArraySlide(np.zeros((1, 2, 3, 4), np.uint8))}, "labels: expected 2D labels.*axes zyx"),
        ({"labels": ArraySlide(np.zeros((2, 3, 4), np.uint8))}, "2 channels"),
        ({"labels": ArraySlide(np.zeros((3, 4)))}, "float64"),
        (
            {"image": ArraySlide(np.zeros((1, 50, 30), np.uint8), name="photo")},
            "expected labels of photo, which has yx",
        ),
        ({"pixel_size_um": 0.0}, "pixel_size_um: expected a positive number"),
    ],
)
def test_labels_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        LabelledImage(**{"labels": ArraySlide(LABELS)} | changes)


@pytest.mark.parametrize(
    "changes", [{"object_type": "cell"}, {"simplify_px": -1.0}, {"min_area_um2": float("nan")}, {"split_um": -1.0}]
)
def test_settings_that_do_not_fit_are_refused(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        GeoJsonConfig(**changes)
