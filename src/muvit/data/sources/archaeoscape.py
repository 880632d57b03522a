"""Polygons of a GeoPackage: an SQLite database whose geometries are WKB behind a short header (OGC 12-128)."""

import sqlite3
import struct
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import shapely

from muvit.data.annotations.slide import AnnotationSlide, LabelPolygons
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.data.sources.derived import DerivedSlide, joined
from muvit.data.sources.source import Item, Source, Split
from muvit.errors import InputError, ReadError, first_line
from muvit.labels import IGNORED

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

# bytes of the bounding box by its kind: none, xy, xyz, xym, xyzm
_ENVELOPE_BYTES = {0: 0, 1: 32, 2: 48, 3: 48, 4: 64}
_HEADER_BYTES = 8
_POLYGON, _MULTIPOLYGON = 3, 6
_HEAD_BYTES = 9
_NUMBERS = {0: 2, 1: 3, 2: 3, 3: 4}
"""Numbers of a point by the thousands of the kind: xy, xyz, xym, xyzm."""


class Feature(NamedTuple):
    """One row of a layer."""

    properties: dict[str, Any]
    """Its columns, the geometry left out."""
    geometry: "BaseGeometry"
    """In the layer's coordinates (x, y)."""


def read_geopackage(file: Path) -> list[Feature]:
    """All polygons of the first layer, in the order they are stored; rows without a geometry left out.

    Only stored rows are read, no views and computed columns, so that a small file stays small in memory.

    Raises:
        ReadError: it is no GeoPackage, or a geometry is damaged or no polygon.
    """
    try:
        # opened without locks or a journal, so that a read-only disk will do
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, file.stat().st_size)
            layers = _stored_rows(database, "gpkg_geometry_columns", 1)
            if not layers:
                raise ReadError(file, expected="a layer with geometries", got="none")
            column = layers[0]["column_name"]
            records = _stored_rows(database, layers[0]["table_name"])
        geometries = [(record, record.pop(column)) for record in records]
        return [Feature(record, _polygons(blob)) for record, blob in geometries if blob is not None]
    except (sqlite3.Error, shapely.errors.ShapelyError, struct.error, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(file, expected="a GeoPackage of polygons", got=first_line(error)) from error


def _stored_rows(database: sqlite3.Connection, table: str, number: int = -1) -> list[dict[str, Any]]:
    """The first rows of a table, by column; one that would be computed rather than read counts as missing."""
    made = database.execute("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)).fetchone()
    if made is None or str(made[0]).upper().split()[:2] != ["CREATE", "TABLE"]:
        raise LookupError(f"no table {table!r}")
    name = '"{}"'.format(table.replace('"', '""'))
    # table_info lists what is stored, table_xinfo also what is computed
    columns = [row[1] for row in database.execute(f"PRAGMA table_info({name})")]
    chosen = ", ".join('"{}"'.format(column.replace('"', '""')) for column in columns)
    rows = database.execute(f"SELECT {chosen} FROM {name} ORDER BY rowid LIMIT {number}")
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _polygons(blob: bytes) -> "BaseGeometry":
    """The polygon or multipolygon of a geometry, in x and y.

    It is taken apart here, since GEOS follows collections in collections until its stack overflows.
    """
    if blob[:2] != b"GP":
        raise ValueError("a geometry without its header")
    wkb = blob[_HEADER_BYTES + _ENVELOPE_BYTES[blob[3] >> 1 & 0b111] :]
    _, kind, count = _wkb_head(wkb, 0)
    if kind % 1000 == _POLYGON:
        return _polygon(wkb, 0)[0]
    if kind % 1000 != _MULTIPOLYGON:
        raise ValueError(f"a geometry of kind {kind}, no polygon")
    polygons, place = [], _HEAD_BYTES
    for _ in range(count):
        polygon, place = _polygon(wkb, place)
        polygons.append(polygon)
    return shapely.MultiPolygon(polygons)


def _polygon(wkb: bytes, start: int) -> tuple["BaseGeometry", int]:
    """A polygon that begins at a byte, and the byte behind it."""
    order, kind, count = _wkb_head(wkb, start)
    if kind % 1000 != _POLYGON:
        raise ValueError(f"a part of kind {kind}, no polygon")
    num_numbers = _NUMBERS[kind // 1000]
    rings, place = [], start + _HEAD_BYTES
    for _ in range(count):
        (num_points,) = struct.unpack_from(f"{order}I", wkb, place)
        points = np.frombuffer(wkb, f"{order}f8", num_points * num_numbers, place + 4).reshape(-1, num_numbers)[:, :2]
        if not np.isfinite(points).all():
            raise ValueError("coordinates that are NaN or infinite")
        rings.append(shapely.linearrings(points))
        place += 4 + points.shape[0] * num_numbers * 8
    return shapely.Polygon(*([rings[0], rings[1:]] if rings else [])), place


def _wkb_head(wkb: bytes, start: int) -> tuple[str, int, int]:
    """Byte order, kind, and number of parts of the geometry that begins at a byte."""
    order = "<" if wkb[start] else ">"
    return (order, *struct.unpack_from(f"{order}II", wkb, start + 1))


CLASSES = ("background", "mound", "hydrology", "temple")
CHANNELS = ("red", "green", "blue", "elevation")
PARCELS: dict[Split, tuple[str, ...]] = {
    "train": (
        "01_olinda", "02_irene", "03_diomira", "04_isidora", "05_tamara", "06_dorothea", "07_anastasia", "08_isaura",
        "09_zora", "10_gold_road", "11_silver_road", "12_ginger_road", "13_saffron_road", "14_lavender_road",
        "15_thyme_road", "16_cinnamon_road",
    ),
    "val": ("17_fusang", "18_yaochi", "19_penglai"),
    "test": ("20_hali", "21_carcosa", "22_ulthar", "23_kadath"),
}  # fmt: skip
"""The published split."""

_TYPES = {"mound": 1, "hydrology": 2, "temple": 3, "void": IGNORED}
_NAME_COLUMNS = ("index", "sblock", "aoi_name")
_UM_PER_METRE = 1e6
_SAMPLED_PX = 1024


def find_archaeoscape(folder: Path) -> Source:
    """The parcels below a folder, as 4 channels of float32 (colours 0 to 255, elevation in metres).

    Void areas and pixels outside a parcel's outline are ignored. Missing elevation is filled with
    the parcel's mean.
    """
    problems: list[str] = []
    files = {name: folder / "data" / f"{name}.gpkg" for name in ("features", "parcels")}
    rasters = {name: [folder / "rasters" / kind / f"{name}.tif" for kind in ("rgb", "dtm")] for name in _names()}
    missing = [f for f in (*files.values(), *(f for pair in rasters.values() for f in pair)) if not f.is_file()]
    problems += [f"no {file.relative_to(folder)}" for file in missing]
    layers: dict[str, list[Feature]] = {"features": [], "parcels": []}
    for name, file in files.items():
        try:
            layers[name] = read_geopackage(file) if file not in missing else []
        except InputError as error:
            problems.append(str(error).rstrip("."))
    types = {feature.properties.get("type") for feature in layers["features"]}
    problems += [f"{files['features']}: features of the type {kind!r}" for kind in types - set(_TYPES)]
    parcels = {
        str(feature.properties[column]): feature.geometry
        for feature in layers["parcels"]
        for column in _NAME_COLUMNS
        if column in feature.properties
    }
    problems += [
        f"{files['parcels']}: no parcel {name}" for name in _names() if layers["parcels"] and name not in parcels
    ]
    features = [
        (feature.geometry, _TYPES.get(str(feature.properties.get("type")), 0)) for feature in layers["features"]
    ]
    return Source(
        dataset="archaeoscape",
        folder=folder,
        items=tuple(
            Item(name=name, split=split, images=tuple(rasters[name]), labels=(files["features"], files["parcels"]))
            for split, names in PARCELS.items()
            for name in names
            if not problems
        ),
        class_names=CLASSES,
        open_image=_open_image,
        open_labels=partial(_open_labels, features, parcels),
        problems=tuple(problems),
    )


def _names() -> tuple[str, ...]:
    return tuple(name for names in PARCELS.values() for name in names)


def _open_image(item: Item) -> Slide:
    colors, elevation = (open_slide(file) for file in item.images)
    profiles = [_profile(file) for file in item.images]
    if not profiles[0]["transform"].almost_equals(profiles[1]["transform"]):
        raise InputError(item.images[1], expected=f"the same ground as {item.images[0]}", got="another place or scale")
    filled = DerivedSlide(
        elevation,
        partial(_filled_window, elevation, profiles[1]["nodata"]),
        num_channels=elevation.num_channels,
        dtype=np.float32,
        channel_names=elevation.channel_names,
    )
    if (colors.num_channels, elevation.num_channels) != (3, 1):
        got = f"{colors.num_channels} and {elevation.num_channels}"
        raise InputError(item.images[0], expected="3 channels of colour and 1 of elevation", got=got)
    transform = profiles[1]["transform"]
    pixel_size_um = (abs(transform.e) * _UM_PER_METRE, abs(transform.a) * _UM_PER_METRE)
    return joined([colors, filled], CHANNELS, pixel_size_um=pixel_size_um)


def _open_labels(features: Sequence[tuple[Any, int]], parcels: Mapping[str, Any], item: Item) -> Slide:
    raster = item.images[1]
    a, b, c, d, e, f = tuple(~_profile(raster)["transform"])[:6]
    on_ground = np.array([*(polygon for polygon, _ in features), parcels[item.name]], object)
    polygons = shapely.transform(on_ground, lambda points: points @ [[a, d], [b, e]] + [c, f])
    values = np.array([value for _, value in features], np.uint8)
    labels = LabelPolygons(polygons=polygons[:-1], values=values, regions=polygons[-1:])
    return AnnotationSlide(item.labels[0], open_slide(raster), labels)


def _profile(file: Path) -> dict[str, Any]:
    """Transform (pixel to ground) and nodata value of a GeoTIFF."""
    import rasterio

    with rasterio.open(file) as raster:
        return {"transform": raster.transform, "nodata": raster.nodata}


def _filled_window(
    slide: Slide, nodata: float | None, start: tuple[int, ...], size: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    pixels = slide.read(1, start, size).astype(np.float32)
    is_hole = ~np.isfinite(pixels)
    if nodata is not None:
        is_hole |= pixels == np.float32(nodata)
    if is_hole.any():
        pixels[is_hole] = _mean_elevation(slide.path)
    return pixels


@lru_cache(maxsize=32)
def _mean_elevation(file: Path) -> float:
    """Mean of the measured elevation, from a sample of the raster."""
    import rasterio

    with rasterio.open(file) as raster:
        sampled = raster.read(1, out_shape=tuple(min(n, _SAMPLED_PX) for n in raster.shape), masked=True)
    measured = sampled.compressed()[np.isfinite(sampled.compressed())]
    return float(measured.mean()) if measured.size else 0.0
