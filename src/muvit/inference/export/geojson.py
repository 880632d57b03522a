"""Labels as GeoJSON of polygons, as QuPath reads it."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, pi
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import shapely
from shapely import Polygon

from muvit.checks import NonNegative, check_fields
from muvit.durable import whole_file
from muvit.errors import ExistsError
from muvit.inference.export.labelled import LabelledImage
from muvit.inference.export.objects import LabelObject, simplify, split_object, trace_objects
from muvit.progress import Progress

ObjectType = Literal["annotation", "detection"]

_OBJECTS = uuid.UUID("0a88359a-935c-425b-a285-490af278a8f0")
"""Name space of the objects' ids."""


@dataclass(frozen=True, kw_only=True)
class GeoJsonConfig:
    """Selection and form of the objects."""

    object_type: ObjectType = "annotation"
    """Type in QuPath: annotations, which can be edited, or detections, of which it can show millions."""
    simplify_px: NonNegative | None = None
    """Tolerance of the simplification of outlines, in label pixels; 0 keeps every corner. Unset, they are simplified
    as far as each pixel's centre stays on its side: read as labels, the polygons are the label image again."""
    min_area_um2: NonNegative | None = None
    """Leave out objects smaller than this."""
    split_um: NonNegative = 0.0
    """Split touching objects of one class, such as cells, at their narrow places, into parts whose middles are at least
    this far apart; 0 splits none. Objects wider than 4096 label pixels stay whole."""

    def __post_init__(self) -> None:
        check_fields(self)

    def min_pixels(self, source: LabelledImage) -> int:
        """Pixels of the smallest object that is written.

        Raises:
            InputError: a minimum area is given, but no pixel size is known.
        """
        if self.min_area_um2 is None:
            return 1
        return max(1, ceil(self.min_area_um2 / source.need_pixel_area_um2("min_area_um2")))

    def check(self, source: LabelledImage) -> None:
        """Refuse labels without a pixel size where a setting needs one.

        Raises:
            InputError: names the setting.
        """
        self.min_pixels(source)
        if self.split_um:
            source.in_pixels("split_um", self.split_um)


def find_objects(
    source: LabelledImage, config: GeoJsonConfig, progress: Progress | None = None
) -> Iterator[LabelObject]:
    """Trace the objects of a label slide, split as the settings say, with the sums of its probabilities."""
    min_pixels = config.min_pixels(source)
    found = trace_objects(source.labels, measured=source.probabilities, min_pixels=min_pixels, progress=progress)
    if not config.split_um:
        return found
    distance = source.in_pixels("split_um", config.split_um)
    parts = (part for one in found for part in split_object(one, distance, source.probabilities))
    return (part for part in parts if part.num_pixels >= min_pixels)


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
        InputError: a setting is in micrometers, and the pixel size is unknown.
    """
    config, file = config or GeoJsonConfig(), Path(file)
    if file.exists() and not overwrite:
        raise ExistsError(file)
    config.check(source)
    count = 0
    objects = find_objects(source, config, progress)
    with whole_file(file) as stream:
        stream.write(b'{"type":"FeatureCollection","features":[')
        for count, found in enumerate(objects, start=1):
            stream.write(b"\n" if count == 1 else b",\n")
            stream.write(orjson.dumps(_feature(found, source, config), option=orjson.OPT_SERIALIZE_NUMPY))
        stream.write(b"\n]}\n")
    return count


def _feature(found: LabelObject, source: LabelledImage, config: GeoJsonConfig) -> dict[str, Any]:
    polygon = found.polygon if config.simplify_px == 0 else simplify(found.polygon, config.simplify_px)
    first = ",".join(map(str, found.first_pixel))
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
            "measurements": measure_object(found, polygon, source),
        },
    }


def measure_object(found: LabelObject, polygon: Polygon, source: LabelledImage) -> dict[str, float]:
    """Measurements of an object by the names that QuPath shows.

    ``Area``: of its pixels. ``Perimeter``: length of the outer outline of ``polygon``, as it is written.
    ``Circularity``: 4 pi times the area inside that outline, over the square of its length; 1 for a disc.
    ``Probability``: mean over the pixels, for each class, where probabilities are known.
    """
    unit, (y, x) = "px", source.scale
    measured = {"Area px^2": found.num_pixels * y * x}
    if source.pixel_um is not None and source.pixel_area_um2 is not None:
        unit, (y, x) = "µm", source.pixel_um
        measured["Area µm^2"] = found.num_pixels * source.pixel_area_um2
    outline = Polygon(shapely.get_coordinates(polygon.exterior) * (x, y))
    measured[f"Perimeter {unit}"] = outline.length
    measured["Circularity"] = 4 * pi * outline.area / outline.length**2
    if source.probabilities is not None:
        whole = 255 if source.probabilities.dtype == np.uint8 else 1
        for name, total in zip(source.probabilities.channel_names, found.sums, strict=True):
            measured[f"Probability {name}"] = total / found.num_pixels / whole
    return measured


def _coordinates(ring: shapely.LinearRing, source: LabelledImage) -> np.ndarray[Any, Any]:
    """Points ``(N, 2)`` of a closed ring, (x, y) in image pixels; whole numbers where they are."""
    points = shapely.get_coordinates(ring) * source.scale[::-1] - source.origin[::-1]
    whole = points.astype(np.int64)
    return np.ascontiguousarray(whole if (whole == points).all() else points)
