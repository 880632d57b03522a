"""Polygons of a GeoPackage: an SQLite database whose geometries are WKB behind a short header (OGC 12-128)."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from muvit.errors import ReadError

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

# bytes of the bounding box by its kind: none, xy, xyz, xym, xyzm
_ENVELOPE_BYTES = {0: 0, 1: 32, 2: 48, 3: 48, 4: 64}
_HEADER_BYTES = 8


class Feature(NamedTuple):
    """One row of a layer."""

    properties: dict[str, Any]
    """Its columns, the geometry left out."""
    geometry: "BaseGeometry"
    """In the layer's coordinates (x, y)."""


def read_geopackage(file: Path) -> list[Feature]:
    """All features of the first layer, in the order they are stored; those without a geometry left out.

    Raises:
        ReadError: it is no GeoPackage, or a geometry is damaged.
    """
    import shapely

    try:
        # opened without locks or a journal, so that a read-only disk will do
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            layer = database.execute("SELECT table_name, column_name FROM gpkg_geometry_columns").fetchone()
            if layer is None:
                raise ReadError(file, expected="a layer with geometries", got="none")
            table, column = layer
            rows = database.execute('SELECT * FROM "{}" ORDER BY rowid'.format(table.replace('"', '""')))
            names = [description[0] for description in rows.description]
            records = [dict(zip(names, row, strict=True)) for row in rows]
        geometries = [(record, record.pop(column)) for record in records]
        return [Feature(record, shapely.from_wkb(_wkb(blob))) for record, blob in geometries if blob is not None]
    except (sqlite3.Error, shapely.errors.ShapelyError, LookupError, ValueError) as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(file, expected="a GeoPackage", got=error) from error


def _wkb(blob: bytes) -> bytes:
    if blob[:2] != b"GP":
        raise ValueError("a geometry without its header")
    return blob[_HEADER_BYTES + _ENVELOPE_BYTES[blob[3] >> 1 & 0b111] :]
