import json

import numpy as np
import pytest
import shapely
from array_slide import ArraySlide

from muvit.errors import InputError, ReadError
from muvit.inference.tiling.region import read_region, tiles_in_region
from muvit.inference.tiling.tiles import TilePlan

SLIDE = ArraySlide(np.zeros((1, 100, 200), np.uint8))
SQUARE = {"type": "Polygon", "coordinates": [[[20, 10], [60, 10], [60, 30], [20, 30], [20, 10]]]}
FAR = {"type": "MultiPolygon", "coordinates": [[[[150, 80], [160, 80], [160, 90], [150, 80]]]]}


def plan(levels=(1,), shape=(100, 200)):
    shapes = tuple(tuple(n // int(level) for n in shape) for level in levels)
    return TilePlan(shapes=shapes, levels=levels, crop_size=(10, 10), block_size=(40, 40))


def feature(geometry):
    return {"type": "Feature", "geometry": geometry, "properties": {"objectType": "annotation"}}


@pytest.mark.parametrize(
    "content",
    [
        feature(SQUARE),
        {"type": "FeatureCollection", "features": [feature(SQUARE)]},
        [feature(SQUARE), feature({"type": "Point", "coordinates": [0, 0]})],
        {"type": "GeometryCollection", "geometries": [SQUARE]},
    ],
)
def test_polygons_of_geojson_files_count_together(tmp_path, content):
    file = tmp_path / "region.geojson"
    file.write_text(json.dumps(content))
    area = shapely.from_wkt(read_region(str(file), SLIDE))
    assert area.equals(shapely.box(20, 10, 60, 30))
    file.write_text(json.dumps([feature(SQUARE), feature(FAR)]))
    assert shapely.from_wkt(read_region(str(file), SLIDE)).area == 800 + 50


def test_a_box_is_given_as_y_before_x():
    assert shapely.from_wkt(read_region("10, 20,30,60", SLIDE)).equals(shapely.box(20, 10, 60, 30))


def test_geojson_counts_from_the_scanned_part(tmp_path):
    file = tmp_path / "region.geojson"
    file.write_text(json.dumps(SQUARE))
    slide = ArraySlide(np.zeros((1, 100, 200), np.uint8), bounds=((5, 7), (80, 80)))
    assert shapely.from_wkt(read_region(str(file), slide)).bounds == (27, 15, 67, 35)
    assert shapely.from_wkt(read_region("10,20,30,60", slide)).bounds == (20, 10, 60, 30)


def test_tiles_that_show_a_pixel_of_the_region_are_computed():
    mask = tiles_in_region(plan(), read_region("10,20,30,60", SLIDE))
    expected = np.zeros((10, 20), bool)
    expected[1:3, 2:6] = True
    assert (mask == expected).all()
    mask = tiles_in_region(plan(), read_region("10,20,31,60", SLIDE))
    assert mask[3, 2:6].all()


def test_world_pixels_count_also_where_the_finest_level_is_coarse():
    mask = tiles_in_region(plan((2, 4)), read_region("40,80,60,120", SLIDE))
    assert np.argwhere(mask).tolist() == [[2, 4], [2, 5]]


def test_a_region_holds_for_every_plane():
    stack = TilePlan(shapes=((4, 20, 20),), levels=(1,), crop_size=(2, 10, 10), block_size=(4, 20, 20))
    assert tiles_in_region(stack, read_region("0,0,5,5", SLIDE))[:, 0, 0].all()
    assert tiles_in_region(stack, read_region("0,0,5,5", SLIDE)).sum() == 2


def test_what_is_no_region_is_refused(tmp_path):
    (tmp_path / "point.geojson").write_text(json.dumps(feature({"type": "Point", "coordinates": [0, 0]})))
    (tmp_path / "text.geojson").write_text("some text")
    with pytest.raises(InputError, match=r"point\.geojson: expected polygons or a box with an area"):
        read_region(str(tmp_path / "point.geojson"), SLIDE)
    for name in ("text.geojson", "none.geojson"):
        with pytest.raises(ReadError, match="expected a GeoJSON file with polygons, or a box y0,x0,y1,x1"):
            read_region(str(tmp_path / name), SLIDE)
    (tmp_path / "deep.geojson").write_text("[" * 100_000)
    with pytest.raises(ReadError, match="expected a GeoJSON file with polygons"):
        read_region(str(tmp_path / "deep.geojson"), SLIDE)
    for box in ("5,5,5,9", "100,100,10,10", "10,100,100,10"):
        with pytest.raises(InputError, match="expected a box y0,x0,y1,x1 with y0 < y1 and x0 < x1, got no such box"):
            read_region(box, SLIDE)
    with pytest.raises(InputError, match=r"region: expected one that meets the image"):
        tiles_in_region(plan(), read_region("500,500,600,600", SLIDE))
