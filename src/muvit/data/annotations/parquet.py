"""Readers of annotations in Parquet: GeoParquet, and shapes of SpatialData stores."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import shapely

from muvit.data.annotations.formats import TMA_CORE, read_classification
from muvit.data.annotations.objects import Annotations, Array, Color, as_annotations
from muvit.data.pyramids.ngff import read_json
from muvit.data.slides.slide import Slide
from muvit.data.tables import read_parquet
from muvit.errors import InputError, ReadError, first_line

PARQUET_SUFFIXES = (".parquet", ".geoparquet")
_SHAPES, _TABLE = "shapes", "shapes.parquet"
_CLASS_COLUMNS = ("classification", "class")
_RADIUS, _TYPE = "radius", "objectType"
_SYSTEM = "global"
_PLANE = ("x", "y")


def is_spatialdata(path: Path) -> bool:
    """Whether a folder is a store of SpatialData with shapes, or one element of them."""
    return path.is_dir() and bool(_elements(path))


def geoparquet_objects(file: Path, class_column: str | None = None) -> Annotations:
    """The objects of GeoParquet, in pixels of the image; the coordinate reference system that it states is left aside.

    Needs the extra ``muvit[parquet]``.

    Args:
        file: the file.
        class_column: column of the classes; unset, ``classification``, or else ``class``.

    Raises:
        InputError: the package pyarrow is missing, or there is no such column.
        ReadError: it is no GeoParquet, or holds no polygon.
    """
    polygons, names, colors = _read(file, class_column, default=None)
    return as_annotations(file, polygons, names, colors)


def spatialdata_objects(path: Path, image: Slide, class_column: str | None = None) -> Annotations:
    """The objects of the shapes of SpatialData, in pixels of the image. Circles are polygons of 64 corners.

    Shapes are moved to the coordinate system ``global``, or the only one that they have. From there to the pixels of an
    image of the same store, its own transformation leads back; those of any other image are the coordinates.

    Args:
        path: the store, or one element in its folder ``shapes``.
        image: the image as it is stored.
        class_column: as of `geoparquet_objects`; where no column is, the class is the name of the element.

    Raises:
        InputError: as `geoparquet_objects`.
        ReadError: it is no such store, or shapes or image are placed by a transformation that is not affine.
    """
    found, names, colors = [], [], dict[str, Color]()
    for element in _elements(path):
        polygons, own_names, own_colors = _read(element / _TABLE, class_column, default=element.name)
        matrix = _matrix_to_pixels(element, image)
        # columns of the matrix belong to x, y and 1
        found.append(shapely.transform(polygons, lambda points, m=matrix: points @ m[:2, :2].T + m[:2, 2]))
        names += own_names
        colors = own_colors | colors
    return as_annotations(path, np.concatenate(found), names, colors)


def _elements(path: Path) -> list[Path]:
    """Folders of shapes."""
    if (path / _TABLE).is_file():
        return [path]
    return sorted(file.parent for file in (path / _SHAPES).glob(f"*/{_TABLE}"))


def _read(
    file: Path, class_column: str | None, default: str | None
) -> tuple[Array, list[str | None], dict[str, Color]]:
    """Geometries, of which points with a radius are made circles; class of each; colours of classes."""
    wanted = [class_column] if class_column else list(_CLASS_COLUMNS)
    geometry = _geometry_column(file)
    table = read_parquet(file, [geometry, *wanted, _RADIUS, _TYPE])
    there = [name for name in wanted if name in table.column_names]
    if class_column and not there and default is None:
        raise InputError(file, expected=f"a column {class_column!r} of classes", got="none")
    try:
        shapes = shapely.from_wkb(table.column(geometry).to_numpy(zero_copy_only=False))
    except (shapely.errors.GEOSException, TypeError, ValueError) as error:
        raise ReadError(file, expected="geometries as well-known binary", got=first_line(error)) from error
    kinds = shapely.get_type_id(shapes)
    is_mixed = kinds == shapely.GeometryType.GEOMETRYCOLLECTION
    shapes[is_mixed] = shapely.buffer(shapes[is_mixed], 0)  # of which the polygons remain
    if _RADIUS in table.column_names:
        is_point = kinds == shapely.GeometryType.POINT
        radius = np.asarray(table.column(_RADIUS).to_numpy(zero_copy_only=False), np.float64)
        shapes[is_point] = shapely.buffer(shapes[is_point], radius[is_point], quad_segs=16)
    values = table.column(there[0]).to_pylist() if there else [default] * len(shapes)
    classes = list(_classes(file, values))
    colors = {name: color for name, color in reversed(classes) if name is not None and color is not None}
    types = table.column(_TYPE).to_pylist() if _TYPE in table.column_names else ()
    shapes[[kind == TMA_CORE for kind in types] or slice(0)] = None
    return shapes, [name for name, _ in classes], colors


def _geometry_column(file: Path) -> str:
    schema = read_parquet(file, ()).schema
    try:
        stated = orjson.loads((schema.metadata or {})[b"geo"])
        name = str(stated["primary_column"])
        encoding = stated["columns"][name]["encoding"]
    except (KeyError, TypeError, orjson.JSONDecodeError) as error:
        got = f"no such metadata ({type(error).__name__}: {error})"
        raise ReadError(file, expected="GeoParquet", got=got, hint="Write it with geopandas.") from error
    if encoding != "WKB":
        raise ReadError(file, expected="geometries of encoding WKB", got=repr(encoding))
    return name


def _classes(file: Path, values: Sequence[Any]) -> Iterator[tuple[str | None, Color | None]]:
    """Name and colour of classes: texts, numbers, or objects of QuPath, also as JSON."""
    known: dict[str, tuple[str | None, Color | None]] = {}
    for value in values:
        key = repr(value)
        if key not in known:
            try:
                is_json = isinstance(value, str) and value.startswith("{")
                read = orjson.loads(value) if is_json else value
                known[key] = read_classification(read if isinstance(read, dict | None) else str(read))
            except (AttributeError, TypeError, ValueError) as error:
                raise ReadError(file, expected="names of classes", got=first_line(error)) from error
        yield known[key]


def _matrix_to_pixels(element: Path, image: Slide) -> Array:
    """Matrix ``(3, 3)`` from the coordinates (x, y, 1) of an element to pixels of an image."""
    own = _systems(element, _attributes(element).get("coordinateTransformations"), _PLANE)
    system = _SYSTEM if _SYSTEM in own or len(own) != 1 else next(iter(own))
    if system not in own:
        raise ReadError(element, expected=f"a coordinate system {_SYSTEM!r}", got=", ".join(own) or "none")
    matrix = own[system]
    store = element.resolve().parents[1]
    if image.path.resolve().parent != store / "images":
        return matrix
    attributes = _attributes(image.path)
    entry = attributes.get("ome", attributes)["multiscales"][0]
    axes = [axis if isinstance(axis, str) else axis["name"] for axis in entry.get("axes", _PLANE)]
    of_image = _systems(image.path, entry.get("coordinateTransformations"), axes)
    if system not in of_image:
        raise ReadError(image.path, expected=f"the coordinate system {system!r} of {element}", got=", ".join(of_image))
    return np.asarray(np.linalg.inv(of_image[system]) @ matrix)


def _attributes(folder: Path) -> Mapping[str, Any]:
    if (folder / "zarr.json").is_file():
        attributes = read_json(folder / "zarr.json").get("attributes")
        return attributes if isinstance(attributes, dict) else {}
    return read_json(folder / ".zattrs")


def _systems(subject: Path, transforms: Any, axes: Sequence[str]) -> dict[str, Array]:
    """Matrix ``(3, 3)`` to each coordinate system, by its name."""
    try:
        return {str(t["output"]["name"]): _matrix(t, axes) for t in transforms or ()}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ReadError(
            subject,
            expected="coordinateTransformations that are affine (identity, scale, translation, affine, or a sequence "
            "of these)",
            got=f"{type(error).__name__}: {error}",
            hint="Store it in pixels of the image: spatialdata.transform, and write it again.",
        ) from error


def _matrix(transform: Mapping[str, Any], axes: Sequence[str]) -> Array:
    """Matrix ``(3, 3)`` of a transformation, of the axes x and y."""
    kind, source = transform["type"], _axes(transform, "input", axes)
    target = _axes(transform, "output", source)
    columns, rows = [source.index(axis) for axis in _PLANE], [target.index(axis) for axis in _PLANE]
    matrix = np.eye(3)
    if kind == "scale":
        matrix[[0, 1], [0, 1]] = [float(transform["scale"][i]) for i in columns]
    elif kind == "translation":
        matrix[:2, 2] = [float(transform["translation"][i]) for i in columns]
    elif kind == "affine":
        stored = np.array(transform["affine"], np.float64)[: len(target)]
        if stored.shape != (len(target), len(source) + 1) or not np.isfinite(stored).all():
            raise ValueError(f"an affine matrix of shape {stored.shape}")
        others = [i for i in range(len(source)) if i not in columns]
        if stored[np.ix_(rows, others)].any():
            raise ValueError("an affine matrix that mixes x and y with other axes")
        matrix[:2] = stored[np.ix_(rows, [*columns, len(source)])]
    elif kind == "sequence":
        for step in transform["transformations"]:
            matrix = _matrix(step, source) @ matrix
            source = _axes(step, "output", _axes(step, "input", source))
    elif kind != "identity":
        raise ValueError(f"a transformation of type {kind!r}")
    return matrix


def _axes(transform: Mapping[str, Any], side: str, default: Sequence[str]) -> list[str]:
    system = transform.get(side)
    return [axis["name"] for axis in system["axes"]] if isinstance(system, dict) and "axes" in system else list(default)
