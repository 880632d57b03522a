"""Region of interest of a prediction: from GeoJSON or a box to the tiles that intersect it, and to GeoJSON."""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.errors import ShapelyError
from shapely.geometry import shape as geometry_of

from muvit.data.annotations.objects import read_bytes
from muvit.data.slides.slide import Slide
from muvit.durable import write_whole
from muvit.errors import ExistsError, InputError, ReadError
from muvit.inference.tiling.tiles import TilePlan
from muvit.levels import level_factors

_MAX_BYTES = 2**24
_BOX = re.compile(r"\s*,\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4))


def read_region(source: str, slide: Slide) -> str:
    """A region of interest as well-known text, in pixels of the slide as stored, x before y.

    Args:
        source: a box ``y0,x0,y1,x1`` in these pixels, or a GeoJSON file with polygons in pixels of the finest level, as
            QuPath exports them (relative to the scanned part of a slide, where a file states one); or a folder of such
            files, ``<slide>.geojson``.
        slide: the image as it was opened.

    Raises:
        ReadError: the file is missing or not GeoJSON.
        InputError: its area is 0.
    """
    box = _BOX.fullmatch(source.strip())
    if box:
        y0, x0, y1, x1 = map(float, box.groups())
        if not (y0 < y1 and x0 < x1):
            raise InputError(
                f"region {source}", expected="a box y0,x0,y1,x1 with y0 < y1 and x0 < x1", got="no such box"
            )
        area = shapely.box(x0, y0, x1, y1)
    else:
        file = Path(source)
        area = _read_geojson(file / f"{slide.name}.geojson" if file.is_dir() else file)
        area = shapely.transform(area, lambda points: points + _origin(slide))
    if not area.area > 0:
        raise InputError(f"region {source}", expected="polygons or a box with an area", got=area.geom_type)
    return _as_text(area)


def _as_text(area: Any) -> str:
    return str(shapely.to_wkt(area.normalize(), rounding_precision=3, trim=True))


def join_regions(regions: Sequence[str]) -> str | None:
    """The region, as `read_region` gives it, that lies in all of these; None of none.

    Raises:
        InputError: they share no area.
    """
    if len(regions) < 2:
        return next(iter(regions), None)
    area = shapely.intersection_all(shapely.from_wkt(regions))
    if not area.area > 0:
        raise InputError("region and tissue", expected="polygons that overlap", got="none that do")
    return _as_text(area)


def write_region(
    polygons: Sequence[shapely.Polygon],
    slide: Slide,
    file: Path,
    *,
    name: str = "Tissue",
    color: tuple[int, int, int] = (0, 158, 115),
    measurements: Sequence[Mapping[str, float]] = (),
    overwrite: bool = False,
) -> None:
    """Write polygons as annotations of QuPath, which `read_region` reads again.

    Args:
        polygons: pixels of the slide as stored, (x, y).
        slide: the image as it was opened.
        file: GeoJSON to write.
        name: class of the annotations.
        color: red, green and blue of the class.
        measurements: of each polygon, by name; none by default.
        overwrite: replace the file.

    Raises:
        ExistsError: the file exists and ``overwrite`` is false.
    """
    if file.exists() and not overwrite:
        raise ExistsError(file)
    features = [
        {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{slide.name}/{name}/{number}")),
            "geometry": shapely.geometry.mapping(shapely.transform(polygon, lambda points: points - _origin(slide))),
            "properties": {
                "objectType": "annotation",
                # an object without a colour makes QuPath fail
                "classification": {"name": name, "color": list(color)},
                "isLocked": False,
                **({"measurements": dict(measurements[number])} if measurements else {}),
            },
        }
        for number, polygon in enumerate(polygons)
    ]
    write_whole(file, json.dumps({"type": "FeatureCollection", "features": features}).encode())


def _origin(slide: Slide) -> NDArray[np.float64]:
    """Origin of the coordinates of GeoJSON, (x, y) in world pixels: at the scanned part, where a file states one."""
    bounds = getattr(slide, "bounds", None)
    return np.zeros(2) if bounds is None else np.array(bounds[0][::-1], np.float64)


def tiles_in_region(plan: TilePlan, region: str, pixel_scale: Sequence[float] | None = None) -> NDArray[np.bool_]:
    """Whether the pixel centres that each tile of the grid writes span a box that intersects the region, ``(*grid)``.

    Args:
        plan: the tiles.
        region: well-known text, pixels of the slide as stored, along the last two axes; it applies to every plane of a
            stack.
        pixel_scale: those pixels along each axis of a world pixel, see `Slide.pixel_scale`; unset, 1.

    Raises:
        InputError: it is not well-known text, or no tile intersects it.
    """
    try:
        area = shapely.from_wkt(region)
    except ShapelyError as error:
        raise InputError("region", expected="well-known text", got=str(error)) from error
    shapely.prepare(area)
    factors = level_factors(plan.levels[0], len(plan.shape))
    scale = (1.0,) * len(factors) if pixel_scale is None else pixel_scale
    (top, bottom), (left, right) = (
        (np.array([plan.written(axis, i) for i in range(plan.grid[axis])]).T * factors[axis] + [[0.5], [-0.5]])
        * scale[axis]
        for axis in (len(plan.grid) - 2, len(plan.grid) - 1)
    )
    boxes = shapely.box(left[None], top[:, None], right[None], bottom[:, None])
    is_inside: NDArray[np.bool_] = shapely.intersects(area, boxes)
    if not is_inside.any():
        x0, y0, x1, y1 = area.bounds
        raise InputError(
            "region",
            expected=f"one that intersects the image, {plan.shape} pixels",
            got=f"y {y0} to {y1}, x {x0} to {x1}",
        )
    return np.broadcast_to(is_inside, plan.grid)


def _read_geojson(file: Path) -> Any:
    try:
        content = json.loads(read_bytes(file, limit=_MAX_BYTES))
        return shapely.make_valid(shapely.union_all([geometry_of(part) for part in _geometries(content)]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ShapelyError) as error:
        raise ReadError(file, expected="a GeoJSON file with polygons, or a box y0,x0,y1,x1", got=str(error)) from error


def _geometries(content: Any) -> list[Any]:
    """The polygons of a geometry, a feature, a collection or a plain list of features."""
    if isinstance(content, list):
        return [part for entry in content for part in _geometries(entry)]
    if content["type"] == "FeatureCollection":
        return _geometries(content["features"])
    if content["type"] == "Feature":
        return _geometries(content["geometry"])
    if content["type"] == "GeometryCollection":
        return _geometries(content["geometries"])
    return [content] if content["type"] in ("Polygon", "MultiPolygon") else []
