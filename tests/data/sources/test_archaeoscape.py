import sqlite3
import struct
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import shapely
from rasterio.transform import Affine

from muvit.data.slides.open import open_slide
from muvit.data.sources import derived
from muvit.data.sources.archaeoscape import PARCELS, find_archaeoscape, read_geopackage
from muvit.data.sources.prepare import prepare
from muvit.data.sources.source import check_source
from muvit.errors import InputError, ReadError
from muvit.labels import IGNORED

NAMES = [name for names in PARCELS.values() for name in names]
HEIGHT, WIDTH = 40, 60
LEFT, TOP = 1000.0, 500.0
"""Of every raster, in metres; a pixel is half a metre."""
NODATA = -9999.0


def write_geopackage(file, columns, features):
    """A GeoPackage of one layer, with the envelope that writers put before polygons, or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE gpkg_geometry_columns (table_name TEXT, column_name TEXT)")
        database.execute("INSERT INTO gpkg_geometry_columns VALUES ('a layer', 'geom')")
        names = ", ".join(f'"{name}" TEXT' for name in columns)
        database.execute(f'CREATE TABLE "a layer" (fid INTEGER PRIMARY KEY, geom BLOB, {names})')
        for index, (*values, geometry) in enumerate(features):
            envelope = b"" if index % 2 else struct.pack("<4d", *np.array(geometry.bounds)[[0, 2, 1, 3]])
            header = b"GP" + struct.pack("<BBi", 0, 0b1 if index % 2 else 0b11, 0)
            row = (header + envelope + shapely.to_wkb(geometry), *values)
            marks = ", ".join("?" for _ in row)
            database.execute(f'INSERT INTO "a layer" (geom, {", ".join(map(repr, columns))}) VALUES ({marks})', row)


def ground(top, left, bottom, right):
    """Polygon of the pixels in these rows and columns, in metres."""
    return shapely.box(LEFT + left / 2, TOP - bottom / 2, LEFT + right / 2, TOP - top / 2)


def write_raster(file, pixels, nodata=None, pixel=0.5):
    file.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    with rasterio.open(
        file, "w", "GTiff", width, height, count, transform=Affine(pixel, 0, LEFT, 0, -pixel, TOP), dtype=pixels.dtype,
        nodata=nodata, compress="lzw", tiled=True, blockxsize=16, blockysize=16,
    ) as raster:  # fmt: skip
        raster.write(pixels)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in NAMES:
        write_raster(tmp_path / "rasters/rgb" / f"{name}.tif", rng.integers(0, 256, (3, HEIGHT, WIDTH), dtype=np.uint8))
        elevation = rng.normal(30, 1, (1, HEIGHT, WIDTH)).astype(np.float32)
        elevation[:, :3] = NODATA
        write_raster(tmp_path / "rasters/dtm" / f"{name}.tif", elevation, NODATA)
    whole, part = ground(0, 0, HEIGHT, WIDTH), ground(0, 0, HEIGHT, 50)
    write_geopackage(
        tmp_path / "data/parcels.gpkg", ["index"], [(name, part if name == NAMES[0] else whole) for name in NAMES]
    )
    features = [
        ("mound", ground(5, 10, 25, 30)),
        ("temple", ground(10, 15, 15, 20)),  # on the mound
        ("hydrology", ground(30, 40, 38, 60)),  # leaves the first parcel
        ("void", ground(0, 0, 4, 4)),
        ("mound", ground(100, 100, 120, 120)),  # elsewhere
    ]
    write_geopackage(tmp_path / "data/features.gpkg", ["type"], features)
    return tmp_path


def expected_labels(width):
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[5:25, 10:30] = 1
    labels[10:15, 15:20] = 3
    labels[30:38, 40:60] = 2
    labels[:4, :4] = IGNORED
    labels[:, width:] = IGNORED
    return labels


def test_parcels_become_four_channels_and_painted_polygons(folder, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(derived, "_ROWS", 7)
    source = find_archaeoscape(folder)
    assert [sum(item.split == split for item in source.items) for split in ("train", "val", "test")] == [16, 3, 4]
    source = replace(source, items=(source.items[0], source.items[-1]))
    output = prepare(source, tmp_path_factory.mktemp("out") / "archaeoscape")
    for name, split, width in ((NAMES[0], "train", 50), (NAMES[-1], "test", WIDTH)):
        image, labels = (open_slide(output / split / kind / f"{name}.ome.zarr") for kind in ("images", "labels"))
        np.testing.assert_array_equal(labels.read(1, (0, 0), labels.shape)[0], expected_labels(width))
        with (
            rasterio.open(folder / f"rasters/rgb/{name}.tif") as rgb,
            rasterio.open(folder / f"rasters/dtm/{name}.tif") as dtm,
        ):
            colors, elevation = rgb.read(), dtm.read()
        pixels = image.read(1, (0, 0), image.shape)
        np.testing.assert_array_equal(pixels[:3], colors)
        np.testing.assert_array_equal(pixels[3, 3:], elevation[0, 3:])
        np.testing.assert_allclose(pixels[3, :3], elevation[0, 3:].mean(), rtol=1e-5)
        assert image.channel_names == ("red", "green", "blue", "elevation")
        assert image.pixel_size_um == labels.pixel_size_um == (0.5e6, 0.5e6)
        assert labels.label_names == {0: "background", 1: "mound", 2: "hydrology", 3: "temple"}


def test_what_is_missing_is_listed_together(folder):
    (folder / "rasters/rgb/20_hali.tif").unlink()
    (folder / "rasters/dtm/01_olinda.tif").unlink()
    (folder / "data/parcels.gpkg").unlink()
    with pytest.raises(InputError, match="3 problems") as caught:
        check_source(find_archaeoscape(folder))
    for file in ("rasters/rgb/20_hali.tif", "rasters/dtm/01_olinda.tif", "data/parcels.gpkg"):
        assert f"no {file}" in str(caught.value)


def test_unknown_types_and_parcels_are_refused(folder):
    for name in ("features", "parcels"):
        (folder / "data" / f"{name}.gpkg").unlink()
    write_geopackage(folder / "data/features.gpkg", ["type"], [("castle", ground(0, 0, 1, 1))])
    write_geopackage(folder / "data/parcels.gpkg", ["index"], [(name, ground(0, 0, 1, 1)) for name in NAMES[1:]])
    with pytest.raises(InputError, match="features of the type 'castle'") as caught:
        check_source(find_archaeoscape(folder))
    assert "no parcel 01_olinda" in str(caught.value)


def test_rasters_of_different_ground_are_refused(folder):
    write_raster(folder / "rasters/dtm/17_fusang.tif", np.zeros((1, HEIGHT, WIDTH), np.float32), pixel=1.0)
    write_raster(folder / "rasters/dtm/18_yaochi.tif", np.zeros((2, HEIGHT, WIDTH), np.float32))
    with pytest.raises(InputError, match="2 problems") as caught:
        check_source(find_archaeoscape(folder))
    assert "17_fusang.tif: expected the same ground as" in str(caught.value)
    assert "18_yaochi.tif: expected 3 channels of colour and 1 of elevation, got 3 and 2" in str(caught.value)


def test_files_that_are_no_geopackages_are_refused(tmp_path):
    (tmp_path / "a.gpkg").write_bytes(b"not a database at all, whatever its name")
    with closing(sqlite3.connect(tmp_path / "b.gpkg")) as database, database:
        database.execute("CREATE TABLE gpkg_geometry_columns (table_name TEXT, column_name TEXT)")
    write_geopackage(tmp_path / "c.gpkg", ["type"], [])
    with closing(sqlite3.connect(tmp_path / "c.gpkg")) as database, database:
        database.execute('INSERT INTO "a layer" (geom) VALUES (?)', (b"nothing",))
    for name in "abc":
        with pytest.raises(ReadError, match=rf"{name}\.gpkg: expected"):
            read_geopackage(tmp_path / f"{name}.gpkg")


def header(wkb):
    return b"GP" + struct.pack("<BBi", 0, 1, 0) + wkb


@pytest.mark.parametrize("order", [0, 1])
def test_polygons_of_every_kind_are_read(tmp_path, order):
    hole = shapely.Polygon([(0, 0), (9, 0), (9, 9)], [[(5, 1), (6, 1), (6, 2)]])
    several = shapely.multipolygons([hole, shapely.box(10, 10, 11, 12)])
    given = [hole, several, shapely.force_3d(several, 5.0), shapely.Polygon(), shapely.MultiPolygon()]
    write_geopackage(tmp_path / "a.gpkg", ["type"], [])
    with closing(sqlite3.connect(tmp_path / "a.gpkg")) as database, database:
        for one in given:
            wkb = shapely.to_wkb(one, byte_order=order, flavor="iso")
            database.execute('INSERT INTO "a layer" (geom) VALUES (?)', (header(wkb),))
    for one, found in zip(given, read_geopackage(tmp_path / "a.gpkg"), strict=True):
        assert found.geometry.equals(shapely.force_2d(one)) or (one.is_empty and found.geometry.is_empty)


HOSTILE_GEOMETRIES = {
    "collections in collections": b"".join(struct.pack("<BII", 1, 7, 1) for _ in range(100_000)),
    "multipolygons in multipolygons": b"".join(struct.pack("<BII", 1, 6, 1) for _ in range(100_000)),
    "rings": struct.pack("<BII", 1, 3, 2**32 - 1),
    "points": struct.pack("<BIII", 1, 3, 1, 2**32 - 1),
    "empty parts": struct.pack("<BII", 1, 6, 2**32 - 1) + struct.pack("<BII", 1, 3, 0),
    "one point": struct.pack("<BIIIdd", 1, 3, 1, 1, 1.0, 2.0),
    "nan": struct.pack("<BIII6d", 1, 3, 1, 3, 0.0, 0.0, float("nan"), 1.0, 2.0, 2.0),
    "no polygon": shapely.to_wkb(shapely.Point(1, 2)),
    "a number": 5,
    "a text": "GP",
}


@pytest.mark.parametrize("name", HOSTILE_GEOMETRIES)
def test_hostile_geometries_are_one_sentence(tmp_path, name):
    write_geopackage(tmp_path / "a.gpkg", ["type"], [])
    wkb = HOSTILE_GEOMETRIES[name]
    with closing(sqlite3.connect(tmp_path / "a.gpkg")) as database, database:
        blob = header(wkb) if isinstance(wkb, bytes) else wkb
        database.execute('INSERT INTO "a layer" (geom) VALUES (?)', (blob,))
    with pytest.raises(ReadError, match=r"a\.gpkg: expected a GeoPackage of polygons, got [^\n]*\.$"):
        read_geopackage(tmp_path / "a.gpkg")


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS fid, x'00' AS geom FROM n"
HOSTILE_TABLES = {
    "an endless view": f'DROP TABLE "a layer"; CREATE VIEW "a layer" AS {ENDLESS}',
    "an endless list of layers": "DROP TABLE gpkg_geometry_columns; "
    f"CREATE VIEW gpkg_geometry_columns AS SELECT 'x' AS table_name, geom AS column_name FROM ({ENDLESS}) WHERE 0",
    "a virtual table": 'DROP TABLE "a layer"; CREATE VIRTUAL TABLE "a layer" USING rtree(fid, a, b)',
    "no column": "UPDATE gpkg_geometry_columns SET column_name = 'other'",
    "no name": "UPDATE gpkg_geometry_columns SET table_name = NULL",
    "a number for a name": "UPDATE gpkg_geometry_columns SET table_name = 5",
    "a name that is a statement": """UPDATE gpkg_geometry_columns SET table_name = 'x"; DROP TABLE y; --'""",
}


@pytest.mark.parametrize("name", HOSTILE_TABLES)
def test_tables_that_compute_or_lack_something_are_one_sentence(tmp_path, name):
    write_geopackage(tmp_path / "a.gpkg", ["type"], [("mound", ground(0, 0, 1, 1))])
    with closing(sqlite3.connect(tmp_path / "a.gpkg")) as database:
        database.executescript(HOSTILE_TABLES[name])
    before = (tmp_path / "a.gpkg").read_bytes()
    with pytest.raises(ReadError, match=r"a\.gpkg: expected a GeoPackage of polygons, got [^\n]*\.$"):
        read_geopackage(tmp_path / "a.gpkg")
    assert (tmp_path / "a.gpkg").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_computed_columns_are_not_read(tmp_path):
    """This one would have a gigabyte."""
    write_geopackage(tmp_path / "a.gpkg", ["type"], [("mound", ground(0, 0, 1, 1))])
    with closing(sqlite3.connect(tmp_path / "a.gpkg")) as database, database:
        database.execute('ALTER TABLE "a layer" ADD COLUMN bomb BLOB AS (zeroblob(1000000000))')
    (found,) = read_geopackage(tmp_path / "a.gpkg")
    assert found.properties == {"fid": 1, "type": "mound"}
