"""Readers of annotation files: GeoJSON (QuPath, COCO), ASAP and ImageScope XML, ImageJ regions."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
import orjson
import shapely

from muvit.data.annotations.objects import Annotations, Color, ObjectBuilder, ellipse, read_bytes
from muvit.data.slides.formats import slide_name
from muvit.errors import InputError, ReadError, first_line

_POLYGONS = ("Polygon", "MultiPolygon", "GeometryCollection")
TMA_CORE = "tma_core"
"""Type of the objects of QuPath that are cores of tissue microarrays, and no annotations."""
_EXPECTED = "GeoJSON of polygons, or COCO"
_MAX_DEPTH = 8


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ReadError: it is none, or is nested too deeply.
    """
    try:
        return orjson.loads(read_bytes(file))
    except orjson.JSONDecodeError as error:
        raise ReadError(file, expected=_EXPECTED, got=f"other text ({error})", hint="Export it again.") from error


def is_coco(content: Any) -> bool:
    """Whether JSON is that of COCO."""
    return isinstance(content, dict) and isinstance(content.get("images"), list) and "annotations" in content


def geojson_objects(file: Path, content: Any) -> Annotations:
    """The objects of GeoJSON, in pixels of what QuPath shows of the image.

    A FeatureCollection, a list of features, one feature or a bare geometry. Cells count with their outer outline. Cores
    of tissue microarrays, points and lines have no labels.

    Args:
        file: what errors name.
        content: of the file.

    Raises:
        ReadError: it is no such GeoJSON.
    """
    builder = ObjectBuilder(file)
    for number, feature in enumerate(_features(file, content), start=1):
        try:
            properties = feature.get("properties") or {}
            geometry = feature.get("geometry")
            name, color = read_classification(properties.get("classification"))
            if geometry is not None:
                is_core = properties.get("objectType") == TMA_CORE
                builder.add(name, () if is_core else _polygons(geometry), color)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            got = f"another feature {number} ({type(error).__name__}: {error})"
            raise ReadError(file, expected="features with geometry and properties", got=got) from error
    return builder.build()


def coco_images(content: Any) -> list[str]:
    """Names, without suffix, of the images that JSON of COCO is about."""
    return [slide_name(Path(str(image.get("file_name")))) for image in content["images"] if isinstance(image, dict)]


def coco_objects(file: Path, content: Any, image_name: str, shape: tuple[int, ...]) -> Annotations:
    """The objects of one image of COCO; each category is a class.

    Args:
        file: what errors name.
        content: of the file.
        image_name: the image, without suffix; the only image of a file may have another name.
        shape: pixels (y, x) of the image.

    Raises:
        ReadError: it is no such JSON, the image is not in it or has another shape, or an object is a run-length mask.
    """
    builder = ObjectBuilder(file)
    try:
        names = coco_images(content)
        if image_name not in names and len(names) != 1:
            raise ReadError(file, expected=f"an image named {image_name!r}", got=f"{len(names)} others")
        entry = content["images"][names.index(image_name) if image_name in names else 0]
        size = (entry.get("height", shape[0]), entry.get("width", shape[1]))
        if size != tuple(shape):
            raise ReadError(file, expected=f"an image of {shape} pixels (y, x), as {image_name} has", got=size)
        categories = {category["id"]: str(category["name"]) for category in content.get("categories", [])}
        for found in content["annotations"]:
            if found["image_id"] != entry["id"]:
                continue
            if not isinstance(found["segmentation"], list):
                raise ReadError(
                    file,
                    expected="objects with polygons",
                    got=f"the run-length mask of object {found.get('id')}",
                    hint="Export polygons, or the masks as a label image.",
                )
            rings = [list(zip(flat[::2], flat[1::2], strict=True)) for flat in found["segmentation"]]
            builder.add(categories[found["category_id"]], [[ring] for ring in rings])
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        got = f"another structure ({type(error).__name__}: {error})"
        raise ReadError(file, expected="JSON of COCO", got=got) from error
    return builder.build()


def _features(file: Path, content: Any) -> Iterator[Any]:
    kind = content.get("type") if isinstance(content, dict) else None
    if isinstance(content, list):
        yield from content
    elif kind == "FeatureCollection" and isinstance(content.get("features"), list):
        yield from content["features"]
    elif kind == "Feature":
        yield content
    elif kind in _POLYGONS:
        yield {"geometry": content}
    else:
        got = f"an object of type {kind!r}" if isinstance(content, dict) else type(content).__name__
        raise ReadError(file, expected=_EXPECTED, got=got, hint="In QuPath: File, Export objects as GeoJSON.")


def _polygons(geometry: Any, depth: int = 0) -> list[Any]:
    """Rings of each polygon of a geometry; none of points and lines."""
    kind = geometry["type"]
    if kind == "Polygon":
        return [geometry["coordinates"]]
    if kind == "MultiPolygon":
        return list(geometry["coordinates"])
    if kind != "GeometryCollection":
        return []
    if depth > _MAX_DEPTH:
        raise ValueError(f"more than {_MAX_DEPTH} collections inside each other")
    return [polygon for part in geometry["geometries"] for polygon in _polygons(part, depth + 1)]


def read_classification(value: Any) -> tuple[str | None, Color | None]:
    """Name and colour of a QuPath class: ``color`` as [r, g, b], or ``colorRGB`` as a number, as it was until 0.3."""
    if value is None:
        return None, None
    if isinstance(value, str):
        return value, None
    names = value.get("names")
    name = ": ".join(map(str, names)) if names else value.get("name")
    color, packed = value.get("color"), value.get("colorRGB")
    if color is not None:
        red, green, blue = (int(v) for v in color[:3])
        return name, (red, green, blue)
    if packed is not None:
        return name, (packed >> 16 & 255, packed >> 8 & 255, packed & 255)
    return name, None


_ASAP_AREAS = ("polygon", "spline", "rectangle")
_ELLIPSE = "2"
_AREAS = ("0", "1", _ELLIPSE)


def xml_objects(file: Path) -> Annotations:
    """The objects of XML, in pixels of the whole image.

    ASAP: the class is the group; splines are taken for the polygons of their points. ImageScope: the class is the name
    of the layer, or ``layer <id>``; negative regions are cut out of the others of their layer.

    Raises:
        ReadError: it is no XML of these programs, or XML that declares entities.
    """
    content = read_bytes(file)
    try:
        _refuse_declarations(file, content)
        root = ElementTree.fromstring(content)
        builder = ObjectBuilder(file)
        if root.tag == "ASAP_Annotations":
            _read_asap(root, builder)
        elif root.tag == "Annotations":
            _read_imagescope(root, builder)
        else:
            raise ReadError(file, expected="XML of ASAP or ImageScope", got=f"a document <{root.tag[:80]}>")
    except (expat.ExpatError, ElementTree.ParseError) as error:
        raise ReadError(file, expected="XML", got=f"other text ({error})", hint="Export it again.") from error
    except (KeyError, ValueError) as error:
        if isinstance(error, ReadError):
            raise
        got = f"another structure ({type(error).__name__}: {error})"
        raise ReadError(file, expected="XML of ASAP or ImageScope", got=got) from error
    return builder.build()


def _refuse_declarations(file: Path, content: bytes) -> None:
    """Refuse a document type: no program writes one, and the entities in it can expand without bound."""

    def refuse(*_: Any) -> None:
        raise ReadError(
            file,
            expected="XML without a document type",
            got="a DOCTYPE",
            hint="Remove it: the entities that it may declare are a danger.",
        )

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(content, True)


def _read_asap(root: ElementTree.Element, builder: ObjectBuilder) -> None:
    colors = {group.get("Name"): _hex_color(group.get("Color")) for group in root.iterfind("AnnotationGroups/Group")}
    for found in root.iterfind("Annotations/Annotation"):
        name = found.get("PartOfGroup")
        name = None if name in ("None", "") else name
        points = [(float(p.attrib["X"]), float(p.attrib["Y"])) for p in found.iterfind("Coordinates/Coordinate")]
        is_area = found.get("Type", "").lower() in _ASAP_AREAS
        builder.add(name, [[points]] if is_area else (), colors.get(name) or _hex_color(found.get("Color")))


def _read_imagescope(root: ElementTree.Element, builder: ObjectBuilder) -> None:
    for layer in root.iterfind("Annotation"):
        name = layer.get("Name") or f"layer {layer.get('Id')}"
        packed = int(layer.get("LineColor", "0"))
        color = (packed & 255, packed >> 8 & 255, packed >> 16 & 255)
        holes: list[Any] = []
        regions: list[Any] = []
        for region in layer.iterfind("Regions/Region"):
            points = [(float(p.attrib["X"]), float(p.attrib["Y"])) for p in region.iterfind("Vertices/Vertex")]
            kind = region.get("Type", "0")
            if kind not in _AREAS:
                points = []
            elif kind == _ELLIPSE and points:
                points = ellipse(points).tolist()
            (holes if region.get("NegativeROA") == "1" else regions).append(points)
        _add_layer(builder, name, regions, holes, color)


def _add_layer(builder: ObjectBuilder, name: str, regions: list[Any], holes: list[Any], color: Color) -> None:
    """Add the regions of a layer, each with the negative ones that begin inside it as its holes."""
    for points in regions:
        inner = []
        if holes and len(points) > 2:
            outline = shapely.make_valid(shapely.Polygon(points))
            inner = [hole for hole in holes if hole and outline.covers(shapely.Point(hole[0]))]
        builder.add(name, [[points, *inner]] if points else (), color)


def _hex_color(text: str | None) -> Color | None:
    """``#ff0000``, or None."""
    if not text or len(text) != 7:
        return None
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


_SUFFIX = ".roi"
_MAX_RATIO = 50
"""Bytes of regions for one byte of their archive: coordinates compress to a half or a quarter."""
_SMALL_BYTES = 2**24
"""Bytes of regions that are read whatever their archive has."""
_NOT_ROI = (ValueError, RuntimeError, LookupError, TypeError, NotImplementedError, zipfile.BadZipFile, OSError)


def imagej_objects(file: Path) -> Annotations:
    """The objects of ImageJ, in pixels of the image; the class of an object is ``group <n>``, if it is in one.

    Needs the extra ``muvit[annotations]``.

    Raises:
        InputError: the package roifile is missing.
        ReadError: it is no file of ImageJ.
    """
    try:
        from roifile import ROI_TYPE, ImagejRoi
    except ImportError as error:
        raise InputError(
            file, expected="the package roifile", got="an environment without it", hint="pip install muvit[annotations]"
        ) from error
    areas = (ROI_TYPE.POLYGON, ROI_TYPE.RECT, ROI_TYPE.OVAL, ROI_TYPE.FREEHAND, ROI_TYPE.TRACED)
    builder = ObjectBuilder(file)
    try:
        for content in _contents(file):
            roi = ImagejRoi.frombytes(content)
            rings = list(roi.coordinates(multi=True)) if roi.roitype in areas else []
            if roi.roitype == ROI_TYPE.OVAL:
                rings = [ellipse([(roi.left, roi.top), (roi.right, roi.bottom)])]
            builder.add(f"group {roi.group}" if roi.group else None, _outlines(rings))
    except InputError:
        raise
    except _NOT_ROI as error:
        raise ReadError(file, expected="regions of ImageJ", got=first_line(error), hint="Save them again.") from error
    return builder.build()


def _contents(file: Path) -> Iterator[bytes]:
    content = read_bytes(file)
    if file.suffix.lower() == _SUFFIX:
        yield content
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.lower().endswith(_SUFFIX)]
        size, limit = sum(entry.file_size for entry in entries), max(_MAX_RATIO * len(content), _SMALL_BYTES)
        if size > limit:
            got = f"{size / 2**20:.0f} MiB"
            raise ReadError(file, expected=f"an archive that unpacks to at most {limit >> 20} MiB", got=got)
        for entry in entries:
            yield archive.read(entry)


def _outlines(rings: list[Any]) -> list[list[Any]]:
    """Rings of the polygons of a region; of several paths, what lies inside an odd number of them is inside."""
    rings = [ring for ring in rings if len(ring) > 2]
    if len(rings) < 2:
        return [[ring] for ring in rings]
    closed = [shapely.LinearRing(np.asarray(ring, np.float64)) for ring in rings]
    area = shapely.build_area(shapely.GeometryCollection(closed))
    return [
        [shapely.get_coordinates(ring) for ring in shapely.get_rings(polygon)] for polygon in shapely.get_parts(area)
    ]
