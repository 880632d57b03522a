"""Files of each program, with what each can say."""

import io
import zipfile

import numpy as np
import orjson
import pytest
import roifile
import shapely
from array_slide import ArraySlide

from muvit.data.annotations.open import annotated_images, read_annotations
from muvit.errors import InputError, ReadError

IMAGE = ArraySlide(np.zeros((100, 120), np.uint8), name="a.png")
SQUARE = [[10, 20], [40, 20], [40, 50], [10, 50], [10, 20]]
HOLE = [[20, 30], [30, 30], [30, 40], [20, 40], [20, 30]]


def read(file, content, image=IMAGE):
    file.write_bytes(content if isinstance(content, bytes) else orjson.dumps(content))
    return read_annotations(file, image)


def feature(coordinates=(SQUARE,), kind="Polygon", **properties):
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


def classified(name, **color):
    return {"objectType": "annotation", "classification": {"name": name} | color}


def test_qupath_objects_of_every_kind(tmp_path, caplog):
    features = [
        feature((SQUARE, HOLE), **classified("Tumour", color=[200, 0, 0]), isLocked=True),
        feature(
            [[SQUARE], [[[60, 60], [70, 60], [70, 70]]]], "MultiPolygon", **classified("Stroma", colorRGB=-3670016)
        ),
        feature(isLocked=False),
        feature([1, 2], "Point", **classified("Tumour")),
        feature(objectType="tma_core", name="A-1"),
        feature(**{"classification": {"names": ["Tumour", "Positive"], "color": [1, 2, 3]}}),
        feature(**classified(None)),
    ]
    found = read(tmp_path / "a.geojson", {"type": "FeatureCollection", "features": features})
    assert found.class_names == ("Tumour", "Stroma", "unclassified", "Tumour: Positive", "unclassified")
    assert found.colors == {"Tumour": (200, 0, 0), "Stroma": (200, 0, 0), "Tumour: Positive": (1, 2, 3)}
    assert shapely.area(found.polygons).tolist() == [800, 950, 900, 900, 900]
    assert caplog.messages == [f"{tmp_path}/a.geojson: 2 objects without an area (points, lines) were left out"]


@pytest.mark.parametrize("wrap", [lambda f: [f], lambda f: f, lambda f: f["geometry"]])
def test_lists_single_features_and_bare_geometries_are_geojson_too(tmp_path, wrap):
    found = read(tmp_path / "a.json", wrap(feature()))
    assert shapely.area(found.polygons).tolist() == [900]


def test_points_may_have_a_third_coordinate(tmp_path):
    found = read(tmp_path / "a.geojson", feature([[[x, y, 5] for x, y in SQUARE]]))
    assert shapely.area(found.polygons).tolist() == [900]


def test_outlines_that_cross_themselves_are_repaired_and_counted(tmp_path, caplog):
    bow_tie = [[0, 0], [20, 20], [20, 0], [0, 20], [0, 0]]
    found = read(tmp_path / "a.geojson", [feature([bow_tie]), feature()])
    assert shapely.area(found.polygons).tolist() == [200, 900]
    assert shapely.is_valid(found.polygons).all()
    assert caplog.messages == [
        f"{tmp_path}/a.geojson: 1 outlines crossed themselves and were repaired: what they enclose is kept"
    ]


def test_objects_off_the_image_are_counted_and_refused_if_they_are_all(tmp_path, caplog):
    outside = feature([[[x + 500, y] for x, y in SQUARE]])
    found = read(tmp_path / "a.geojson", [feature(), outside])
    assert len(found.polygons) == 2
    assert caplog.messages == [f"{tmp_path}/a.geojson: 1 of 2 objects lie outside of the image"]
    with pytest.raises(InputError, match=r"a.geojson: expected polygons in the 100 x 120 pixels of a.png, got none"):
        read(tmp_path / "a.geojson", outside)


def test_asap(tmp_path):
    points = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(SQUARE[:-1]))
    objects = "".join(
        f'<Annotation Name="n" Type="{kind}" PartOfGroup="{group}" Color="#00ff00"><Coordinates>{points}</Coordinates>'
        "</Annotation>"
        for kind, group in (("Polygon", "Tumour"), ("Spline", "None"), ("Dot", "Tumour"), ("Rectangle", "Tumour"))
    )
    groups = '<AnnotationGroups><Group Name="Tumour" PartOfGroup="None" Color="#ff0080"/></AnnotationGroups>'
    text = f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{objects}</Annotations>{groups}</ASAP_Annotations>'
    found = read(tmp_path / "a.xml", text.encode())
    assert found.class_names == ("Tumour", "unclassified", "Tumour")
    assert found.colors == {"Tumour": (255, 0, 128), "unclassified": (0, 255, 0)}
    assert shapely.area(found.polygons).tolist() == [900] * 3


def test_imagescope(tmp_path):
    def region(points, kind=0, negative=0):
        vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in points)
        return f'<Region Id="1" Type="{kind}" NegativeROA="{negative}"><Vertices>{vertices}</Vertices></Region>'

    far = [[x + 50, y] for x, y in SQUARE]
    text = (
        '<Annotations MicronsPerPixel="0.5">'
        f'<Annotation Id="1" Name="Tumour" LineColor="65280"><Regions>{region(SQUARE)}{region(far)}'
        f"{region(HOLE, negative=1)}</Regions></Annotation>"
        f'<Annotation Id="2" Name="" LineColor="255"><Regions>{region([[0, 0], [40, 20]], kind=2)}'
        f"{region([[0, 0], [4, 4]], kind=4)}</Regions></Annotation></Annotations>"
    )
    found = read(tmp_path / "a.xml", text.encode())
    assert found.class_names == ("Tumour", "Tumour", "layer 2")
    assert found.colors == {"Tumour": (0, 255, 0), "layer 2": (255, 0, 0)}
    assert shapely.area(found.polygons) == pytest.approx([800, 900, np.pi * 20 * 10], rel=1e-3)


def test_imagej(tmp_path):
    square = roifile.ImagejRoi.frompoints(np.array(SQUARE[:-1]), name="x")
    oval = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.OVAL, left=10, top=10, right=50, bottom=30)
    path = [0, 10, 20, 1, 40, 20, 1, 40, 50, 1, 10, 50, 4, 0, 20, 30, 1, 30, 30, 1, 30, 40, 1, 20, 40, 4]
    composite = roifile.ImagejRoi(
        roitype=roifile.ROI_TYPE.RECT,
        left=10,
        top=20,
        right=40,
        bottom=50,
        shape_roi_size=len(path),
        multi_coordinates=np.array(path, np.float32),
    )
    composite.group = 3
    point = roifile.ImagejRoi.frompoints(np.array([[5.0, 5.0]]))
    point.roitype = roifile.ROI_TYPE.POINT
    (tmp_path / "one.roi").write_bytes(square.tobytes())
    assert shapely.area(read_annotations(tmp_path / "one.roi", IMAGE).polygons).tolist() == [900]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as stream:
        for i, roi in enumerate((square, oval, composite, point)):
            stream.writestr(f"{i}.roi", roi.tobytes())
    found = read(tmp_path / "a.zip", archive.getvalue())
    assert found.class_names == ("unclassified", "unclassified", "group 3")
    assert shapely.area(found.polygons) == pytest.approx([900, np.pi * 20 * 10, 800], rel=1e-3)


def coco(**changes):
    flat = [v for point in SQUARE[:-1] for v in point]
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 100, "width": 120},
            {"id": 8, "file_name": "deep/b.tif", "height": 100, "width": 120},
        ],
        "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "debris"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "segmentation": [flat, [v + 50 for v in flat]]},
            {"id": 2, "image_id": 8, "category_id": 2, "segmentation": [flat]},
        ],
    }
    return content | changes


def test_coco_holds_the_objects_of_several_images(tmp_path):
    found = read(tmp_path / "instances.json", coco())
    assert (found.class_names, shapely.area(found.polygons).tolist()) == (("cell",), [1800])
    assert annotated_images(tmp_path / "instances.json") == ["a", "b"]
    other = ArraySlide(np.zeros((100, 120), np.uint8), name="b.tif")
    assert read_annotations(tmp_path / "instances.json", other).class_names == ("debris",)


@pytest.mark.parametrize("name", ["a.geojson", "a.svs.geojson", "a.xml", "a.zip", "a.ome.tif.geojson"])
def test_annotations_are_named_as_their_image(tmp_path, name):
    assert annotated_images(tmp_path / name) == ["a"]


LAUGHS = (
    b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]><ASAP_Annotations>&c;</ASAP_Annotations>'
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.geojson", b"[" * 100_000, "expected GeoJSON of polygons, or COCO, got other text"),
        ("a.geojson", b"{", "expected GeoJSON of polygons, or COCO, got other text"),
        ("a.geojson", b"3", "got int. In QuPath: File, Export objects as GeoJSON"),
        ("a.geojson", {"type": "FeatureCollection", "features": []}, "expected annotated areas, got no polygon"),
        ("a.geojson", [feature([1, 2], "Point")], "expected annotated areas, got no polygon"),
        ("a.geojson", [3], "expected features with geometry and properties, got another feature 1"),
        ("a.geojson", [feature(classification={"color": [1], "name": "x"})], "got another feature 1"),
        ("a.geojson", [feature([[[1, 2], [3, 4], [5, "x"]]])], "expected outlines of points"),
        ("a.geojson", [feature([[[1], [3], [5], [6]]])], "expected outlines of points"),
        ("a.geojson", [feature([[[1, 2, 3, 4]] * 4])], "expected outlines of points"),
        ("a.xml", LAUGHS, "expected XML without a document type, got a DOCTYPE. Remove it"),
        ("a.xml", b"<a>", "expected XML, got other text"),
        ("a.xml", b"<a/>", "expected XML of ASAP or ImageScope, got a document <a>"),
        ("a.xml", b"<a>" * 200_000 + b"</a>" * 200_000, "expected XML of ASAP or ImageScope, got a document <a>"),
        ("a.zip", b"no zip", "expected regions of ImageJ"),
        ("a.roi", b"Iout" + b"\0" * 10, "expected regions of ImageJ"),
        ("a.json", coco(annotations=[{"image_id": 7, "category_id": 1, "segmentation": {"counts": []}}]), "run-length"),
        ("a.json", coco(annotations=[{"image_id": 7}]), "expected JSON of COCO, got another structure"),
        ("a.json", coco(images=[{"id": 7, "file_name": "a.png", "height": 10, "width": 12}]), "an image of"),
        (
            "a.txt",
            b"",
            ".roi, .zip, .parquet, .geoparquet, got one ending in .txt",
        ),
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path, name, content, message):
    with pytest.raises(ReadError) as error:
        read(tmp_path / name, content)
    assert str(error.value).startswith(f"{tmp_path / name}: expected ") and message in str(error.value)


def test_huge_files_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("muvit.data.annotations.objects.MAX_BYTES", 100)
    with pytest.raises(ReadError, match="Export them as a label image instead"):
        read(tmp_path / "a.geojson", [feature()])
