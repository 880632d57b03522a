"""Labels as GeoJSON that QuPath opens (File, Import objects): polygons with class, colour and area.

Coordinates are pixels of the image's finest level, (x, y) from the upper-left corner of the image in QuPath.
"""

import uuid
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import shapely

from muvit.checks import NonNegative, check_fields
from muvit.durable import whole_file
from muvit.errors import ExistsError, InputError
from muvit.inference.export.labelled import LabelledImage
from muvit.inference.export.polygons import LabelObject, simplify, trace_objects
from muvit.progress import Progress

ObjectType = Literal["annotation", "detection"]

_OBJECTS = uuid.UUID("0a88359a-935c-425b-a285-490af278a8f0")
"""Name space of the objects' ids."""


@dataclass(frozen=True, kw_only=True)
class GeoJsonConfig:
    """Selection and form of the objects."""

    object_type: ObjectType = "annotation"
    """Type in QuPath: annotations, which can be edited, or detections, of which it can show millions."""
    simplify_px: NonNegative = 1.0
    """Tolerance of the simplification of outlines, in label pixels; 0 keeps every corner."""
    min_area_um2: NonNegative | None = None
    """Leave out objects smaller than this."""

    def __post_init__(self) -> None:
        check_fields(self)

    def min_pixels(self, source: LabelledImage) -> int:
        """Pixels of the smallest object that is written.

        Raises:
            InputError: a minimum area is given, but no pixel size is known.
        """
        if self.min_area_um2 is None:
            return 1
        if source.pixel_area_um2 is None:
            raise InputError(
                "min_area_um2",
                expected="labels with a pixel size",
                got=f"none in {source.labels.path}",
                hint="Give it by pixel_size_um (--pixel_size_um).",
            )
        return max(1, ceil(self.min_area_um2 / source.pixel_area_um2))


def write_geojson(
    source: LabelledImage,
    file: Path | str,
    config: GeoJsonConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the objects of a label slide as a GeoJSON FeatureCollection, one Feature each.

    The labels are read block by block and features written as they are found, so memory stays bounded. Areas are those
    of the pixels, before simplification. The ids are the same in every run.

    Args:
        source: the labels, with their image if its pixels or its origin differ.
        file: to write; it appears once it is complete.
        config: selection and form of the objects.
        overwrite: replace the file.
        progress: called with the number of blocks done and of all blocks.

    Returns:
        Number of objects.

    Raises:
        ExistsError: the file exists and ``overwrite`` is false.
        InputError: a minimum area is given, and the pixel size is unknown.
    """
    config, file = config or GeoJsonConfig(), Path(file)
    if file.exists() and not overwrite:
        raise ExistsError(file)
    count = 0
    objects = trace_objects(source.labels, min_pixels=config.min_pixels(source), progress=progress)
    with whole_file(file) as stream:
        stream.write(b'{"type":"FeatureCollection","features":[')
        for count, found in enumerate(objects, start=1):
            stream.write(b"\n" if count == 1 else b",\n")
            stream.write(orjson.dumps(_feature(found, source, config), option=orjson.OPT_SERIALIZE_NUMPY))
        stream.write(b"\n]}\n")
    return count


def _feature(found: LabelObject, source: LabelledImage, config: GeoJsonConfig) -> dict[str, Any]:
    polygon = simplify(found.polygon, config.simplify_px) if config.simplify_px else found.polygon
    first = ",".join(map(str, found.first_pixel))
    measurements = {"Area px^2": found.num_pixels * source.scale**2}
    if source.pixel_area_um2 is not None:
        measurements["Area µm^2"] = found.num_pixels * source.pixel_area_um2
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_OBJECTS, f"{source.labels.name}/{found.value}/{first}")),
        "geometry": {
            "type": "Polygon",
            "coordinates": [_coordinates(ring, source) for ring in (polygon.exterior, *polygon.interiors)],
        },
        "properties": {
            "objectType": config.object_type,
            # an object without a colour makes QuPath fail
            "classification": {
                "name": source.class_name(found.value),
                "color": list(source.class_color(found.value)),
            },
            "isLocked": False,
            "measurements": measurements,
        },
    }


def _coordinates(ring: shapely.LinearRing, source: LabelledImage) -> np.ndarray[Any, Any]:
    """Points ``(N, 2)`` of a closed ring, (x, y) in image pixels; whole numbers where they are."""
    points = shapely.get_coordinates(ring) * source.scale - source.origin[::-1]
    whole = points.astype(np.int64)
    return np.ascontiguousarray(whole if (whole == points).all() else points)
