"""Annotations of ASAP and of Aperio ImageScope (XML)."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import shapely

from muvit.data.annotations.objects import Annotations, Color, ObjectBuilder, ellipse, read_bytes
from muvit.errors import ReadError

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
