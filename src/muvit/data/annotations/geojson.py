"""Annotations as QuPath writes them (GeoJSON), and those of COCO (JSON)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from muvit.data.annotations.objects import Annotations, Color, ObjectBuilder, read_bytes
from muvit.data.slides.formats import slide_name
from muvit.errors import InputError, ReadError

_POLYGONS = ("Polygon", "MultiPolygon", "GeometryCollection")
_CORE = "tma_core"
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
            name, color = _classification(properties.get("classification"))
            if geometry is not None:
                is_core = properties.get("objectType") == _CORE
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


def _classification(value: Any) -> tuple[str | None, Color | None]:
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
