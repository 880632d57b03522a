"""GeoParquet and shapes of SpatialData."""

import json

import numpy as np
import pytest
import shapely
from array_slide import ArraySlide
from parquet_files import YX, transformation, write_geoparquet, write_shapes

from muvit.data.annotations.objects import AnnotationConfig
from muvit.data.annotations.open import open_annotations, read_annotations
from muvit.data.folders import open_labelled_folder
from muvit.data.slides.ome_zarr import OmeZarrSlide, PyramidWriter
from muvit.errors import InputError, ReadError

IMAGE = ArraySlide(np.zeros((100, 120), np.uint8), name="a.png")
SQUARE = shapely.box(10, 20, 40, 50)
TWO = shapely.MultiPolygon([shapely.box(60, 60, 70, 70), shapely.box(80, 60, 90, 70)])


def bounds(found):
    return [tuple(round(v, 6) for v in box) for box in shapely.bounds(found.polygons).tolist()]


def test_geoparquet_of_qupath_objects(tmp_path, caplog):
    mixed = shapely.GeometryCollection([TWO, shapely.Point(1, 1)])
    shapes = [SQUARE, mixed, shapely.Point(3, 3), shapely.force_3d(SQUARE), SQUARE]
    classes = ['{"name":"Tumour","color":[200,0,0]}', '{"name":"Stroma"}', None, None, "Tumour"]
    types = ["annotation"] * 4 + ["tma_core"]
    file = write_geoparquet(tmp_path / "a.parquet", shapes, classification=classes, objectType=types, size=[1.0] * 5)
    found = read_annotations(file, IMAGE)
    assert found.class_names == ("Tumour", "Stroma", "unclassified")
    assert found.colors == {"Tumour": (200, 0, 0)}
    assert shapely.area(found.polygons).tolist() == [900, 200, 900]
    assert caplog.messages == [f"{file}: 2 objects without an area (points, lines) were left out"]


def test_the_column_of_classes_can_be_named(tmp_path):
    columns = {"class": ["left", "right"], "cell_type": [4, 7], "classification_score": [0.5, 0.5]}
    file = write_geoparquet(tmp_path / "a.geoparquet", [SQUARE, TWO], **columns)
    assert read_annotations(file, IMAGE).class_names == ("left", "right")
    labels = open_annotations(file, IMAGE, AnnotationConfig(class_column="cell_type"))
    assert labels.label_names == {0: "background", 1: "4", 2: "7"}
    assert labels.read(1, (30, 20), (1, 1)) == 1 and labels.read(1, (65, 85), (1, 1)) == 2
    with pytest.raises(InputError, match=r"a\.geoparquet: expected a column 'tissue' of classes, got none"):
        read_annotations(file, IMAGE, "tissue")


def test_other_parquet_is_refused(tmp_path):
    file = write_geoparquet(tmp_path / "a.parquet", [SQUARE], encoding="polygon")
    with pytest.raises(ReadError, match="expected geometries of encoding WKB, got 'polygon'"):
        read_annotations(file, IMAGE)
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(ReadError, match=r"a\.parquet: expected a Parquet file, got "):
        read_annotations(file, IMAGE)
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"geometry": [1]}), file)
    with pytest.raises(ReadError, match="expected GeoParquet, got no such metadata"):
        read_annotations(file, IMAGE)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_shapes_of_spatialdata_are_moved_to_the_pixels_of_the_image(tmp_path, zarr_format):
    affine = transformation(type="affine", affine=[[0, 2, 5], [2, 0, 7], [0, 0, 1]])  # x = 2 y + 5, y = 2 x + 7
    steps = [{"type": "scale", "scale": [2, 3]}, {"type": "translation", "translation": [1, -1]}]
    store = write_shapes(tmp_path / "a.zarr", "islets", [shapely.box(10, 20, 20, 25)], affine, zarr_format=zarr_format)
    sequence = transformation(type="sequence", transformations=steps)
    write_shapes(store, "ducts", [shapely.box(0, 1, 10, 11)], sequence, zarr_format=zarr_format)
    circle = {"radius": [5.0]}
    identity = transformation(type="identity")
    write_shapes(store, "spots", [shapely.Point(60, 50)], identity, zarr_format=zarr_format, **circle)
    found = read_annotations(store, IMAGE)
    assert found.class_names == ("ducts", "islets", "spots")
    assert bounds(found) == [(1, 2, 21, 32), (45, 27, 55, 47), (55, 45, 65, 55)]
    assert shapely.area(found.polygons)[2] == pytest.approx(np.pi * 25, rel=2e-3)
    alone = read_annotations(store / "shapes" / "islets", IMAGE)
    assert bounds(alone) == [(45, 27, 55, 47)]


def test_an_image_of_the_store_has_a_place_of_its_own(tmp_path):
    shapes = transformation(type="scale", scale=[0.5, 0.5])
    store = write_shapes(tmp_path / "a.zarr", "cells", [SQUARE], shapes)
    image = store / "images" / "he"
    PyramidWriter.create(image, shape=(100, 120), num_channels=1, dtype=np.uint8, levels=(1,), kind="label").finish()
    content = json.loads((image / "zarr.json").read_text())
    placed = transformation(YX, type="translation", translation=[4, 2])
    content["attributes"]["ome"]["multiscales"][0]["coordinateTransformations"] = [placed]
    (image / "zarr.json").write_text(json.dumps(content))
    assert bounds(read_annotations(store, OmeZarrSlide(image))) == [(3, 6, 18, 21)]
    assert bounds(read_annotations(store, IMAGE)) == [(5, 10, 20, 25)]


@pytest.mark.parametrize(
    "stated, message",
    [
        ([transformation(type="mapAxis", mapAxis={"x": "y", "y": "x"})], "a transformation of type 'mapAxis'"),
        ([transformation(type="scale", scale=[2])], "expected coordinateTransformations that are affine"),
        ([transformation(system=name, type="identity") for name in ("um", "left")], "'global', got um, left"),
        ([], "expected a coordinate system 'global', got none"),
    ],
)
def test_other_places_are_refused(tmp_path, stated, message):
    store = write_shapes(tmp_path / "a.zarr", "cells", [SQUARE], *stated)
    with pytest.raises(ReadError, match=message):
        read_annotations(store, IMAGE)


def test_labels_of_a_folder_may_be_spatialdata(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((100, 120), np.uint8)).save(tmp_path / "images" / "a.png")
    write_shapes(tmp_path / "labels" / "a.zarr", "cells", [SQUARE], transformation(type="identity"))
    ((_, labels),) = open_labelled_folder(tmp_path)
    assert labels.read(1, (0, 0), labels.shape).sum() == 900 and labels.label_names[1] == "cells"
