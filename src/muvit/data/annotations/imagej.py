"""Regions of interest of ImageJ (``.roi``, and ``.zip`` of its ROI manager)."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from muvit.data.annotations.objects import MAX_BYTES, Annotations, ObjectBuilder, ellipse, read_bytes
from muvit.errors import InputError, ReadError, first_line

_SUFFIX = ".roi"
_NOT_ROI = (ValueError, RuntimeError, LookupError, TypeError, NotImplementedError, zipfile.BadZipFile, OSError)


def imagej_objects(file: Path) -> Annotations:
    """The objects of ImageJ, in pixels of the image; the class of an object is ``group <n>``, if it is in one.

    Needs the extra ``muvit[annotations]``.

    Raises:
        InputError: the package roifile is missing.
        ReadError: it is no file of ImageJ.
    """
    try:
        from roifile import ROI_TYPE, ImagejRoi
    except ImportError as error:
        raise InputError(
            file, expected="the package roifile", got="an environment without it", hint="pip install muvit[annotations]"
        ) from error
    areas = (ROI_TYPE.POLYGON, ROI_TYPE.RECT, ROI_TYPE.OVAL, ROI_TYPE.FREEHAND, ROI_TYPE.TRACED)
    builder = ObjectBuilder(file)
    try:
        for content in _contents(file):
            roi = ImagejRoi.frombytes(content)
            rings = list(roi.coordinates(multi=True)) if roi.roitype in areas else []
            if roi.roitype == ROI_TYPE.OVAL:
                rings = [ellipse([(roi.left, roi.top), (roi.right, roi.bottom)])]
            builder.add(f"group {roi.group}" if roi.group else None, _polygons(rings))
    except InputError:
        raise
    except _NOT_ROI as error:
        raise ReadError(file, expected="regions of ImageJ", got=first_line(error), hint="Save them again.") from error
    return builder.build()


def _contents(file: Path) -> Iterator[bytes]:
    content = read_bytes(file)
    if file.suffix.lower() == _SUFFIX:
        yield content
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.lower().endswith(_SUFFIX)]
        size = sum(entry.file_size for entry in entries)
        if size > MAX_BYTES:
            got = f"{size / 2**30:.1f} GiB"
            raise ReadError(file, expected=f"regions of at most {MAX_BYTES >> 30} GiB", got=got)
        for entry in entries:
            yield archive.read(entry)


def _polygons(rings: list[Any]) -> list[list[Any]]:
    """Rings of the polygons of a region; of several paths, what lies inside an odd number of them is inside."""
    rings = [ring for ring in rings if len(ring) > 2]
    if len(rings) < 2:
        return [[ring] for ring in rings]
    closed = [shapely.LinearRing(np.asarray(ring, np.float64)) for ring in rings]
    area = shapely.build_area(shapely.GeometryCollection(closed))
    return [
        [shapely.get_coordinates(ring) for ring in shapely.get_rings(polygon)] for polygon in shapely.get_parts(area)
    ]
