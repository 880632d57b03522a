"""Pyramids in formats that more software reads than OME-Zarr 0.5: OME-TIFF and OME-Zarr 0.4."""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from muvit.data.pyramids.arrays import open_store
from muvit.data.pyramids.ngff import read_attributes, write_json
from muvit.data.pyramids.reduction import blocks
from muvit.data.slides.formats import LABELS_NAMESPACE
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.durable import make_folder, sync_folder
from muvit.levels import Level, level_factors, level_name
from muvit.progress import Progress

_LOG = logging.getLogger(__name__)

Format = Literal["ome-zarr-0.5", "ome-zarr-0.4", "ome-tiff"]
SUFFIXES: dict[str, str] = {"ome-zarr-0.5": ".ome.zarr", "ome-zarr-0.4": ".ome.zarr", "ome-tiff": ".ome.tif"}
"""Conventional ending of names in each format."""

_TILE = 256
_CHUNK = {2: 256, 3: 64, 4: 16}
_LARGE_BYTES = 1 << 31


def write_zarr_04(store: Path, target: Path, progress: Progress | None = None) -> None:
    """Write a finished OME-Zarr 0.5 store again as OME-Zarr 0.4 (zarr v2, blosc).

    Args:
        store: folder of the store, as `muvit.data.pyramids.writer` makes it.
        target: folder to make.
        progress: called after each block of chunks.
    """
    slide = OmeZarrSlide(store)
    found = read_attributes(store)
    assert found is not None
    ome = {name: value for name, value in found[1].items() if name != "version"}
    ome["multiscales"] = [{**entry, "version": "0.4"} for entry in ome["multiscales"]]
    for name in ("omero", "image-label"):
        if name in ome:
            ome[name] = {**ome[name], "version": "0.4"}
    axes = [axis["name"] for axis in ome["multiscales"][0]["axes"]]
    edge = _CHUNK[slide.ndim]
    work = [
        (number, level, window)
        for number, level in enumerate(slide.levels)
        for window in blocks(slide.level_shape(level), (4 * edge,) * slide.ndim)
    ]
    arrays = {}
    for done, (number, level, (start, size)) in enumerate(work, start=1):
        if number not in arrays:
            make_folder(target / str(number))
            arrays[number] = open_store(target / str(number), _array_04(slide, level, axes, edge))
        pixels = np.moveaxis(slide.read(level, start, size), 0, axes.index("c")) if "c" in axes else None
        pixels = slide.read(level, start, size)[0] if pixels is None else pixels
        inside = dict(zip(slide.axes, zip(start, size, strict=True), strict=True))
        window = tuple(slice(None) if a == "c" else slice(inside[a][0], inside[a][0] + inside[a][1]) for a in axes)
        arrays[number][window].write(pixels).result()
        if progress is not None:
            progress(done, len(work))
    write_json(target / ".zattrs", ome)
    write_json(target / ".zgroup", {"zarr_format": 2})
    sync_folder(target)


def _array_04(slide: OmeZarrSlide, level: Level, axes: Sequence[str], edge: int) -> dict[str, Any]:
    extent = dict(zip(slide.axes, slide.level_shape(level), strict=True)) | {"c": slide.num_channels}
    return {
        "driver": "zarr",
        "create": True,
        "delete_existing": True,
        "metadata": {
            "zarr_format": 2,
            "shape": [extent[axis] for axis in axes],
            "chunks": [1 if axis == "c" else min(edge, extent[axis]) for axis in axes],
            "dtype": slide.dtype.newbyteorder("<").str,
            "compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1},
            "fill_value": 0,
            "order": "C",
            "filters": None,
            "dimension_separator": "/",
        },
    }


def write_ome_tiff(store: Path, target: Path, progress: Progress | None = None) -> None:
    """Write a finished OME-Zarr 0.5 store again as a tiled OME-TIFF, compressed without loss.

    Coarser levels are SubIFDs, as Bio-Formats expects them; of a stack these are the levels that coarsen its planes
    only. Three channels of 8 bits are RGB, others a page each. The pixel size is in the OME metadata and the resolution
    tags, names and colours of label values are in a map annotation.

    Args:
        store: folder of the store, as `muvit.data.pyramids.writer` makes it.
        target: file to write.
        progress: called after each row of tiles.
    """
    import tifffile

    slide = OmeZarrSlide(store)
    levels = [level for level in slide.levels if set(level_factors(level, slide.ndim)[:-2]) <= {1}]
    if len(levels) < len(slide.levels):
        left = ", ".join(level_name(level) for level in slide.levels if level not in levels)
        _LOG.warning("%s: level %s is left out, as OME-TIFF coarsens planes only", target, left)
    is_rgb = slide.num_channels == 3 and slide.dtype == np.uint8
    channels: list[int | None] = [None] if is_rgb else list(range(slide.num_channels))
    total = sum(len(channels) * _num_rows(slide.level_shape(level)) for level in levels)
    options: dict[str, Any] = {
        "dtype": slide.dtype.newbyteorder("<"),
        "tile": (_TILE, _TILE),
        "photometric": "rgb" if is_rgb else "minisblack",
        "compression": "zlib",
        "maxworkers": 2,
    }
    if slide.pixel_size_um is not None:
        options["resolutionunit"] = "CENTIMETER"
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    nbytes = math.prod(slide.shape) * slide.num_channels * slide.dtype.itemsize
    with tifffile.TiffWriter(target, ome=True, bigtiff=nbytes > _LARGE_BYTES) as tif:
        for number, level in enumerate(levels):
            tif.write(
                _tiles(slide, level, channels, count),
                shape=_tiff_shape(slide, level, is_rgb),
                resolution=_resolution(slide, level),
                **options,
                **(
                    {"subifds": len(levels) - 1, "metadata": _ome_metadata(slide, is_rgb)}
                    if number == 0
                    else {"subfiletype": 1}
                ),
            )


def _num_rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-2]) * -(-shape[-2] // _TILE)


def _tiff_shape(slide: OmeZarrSlide, level: Level, is_rgb: bool) -> tuple[int, ...]:
    *planes, height, width = slide.level_shape(level)
    return (*planes, height, width, 3) if is_rgb else (slide.num_channels, *planes, height, width)


def _resolution(slide: OmeZarrSlide, level: Level) -> tuple[float, float] | None:
    if slide.pixel_size_um is None:
        return None
    y, x = (s * f for s, f in zip(slide.pixel_size_um[-2:], level_factors(level, slide.ndim)[-2:], strict=True))
    return 1e4 / x, 1e4 / y


def _ome_metadata(slide: OmeZarrSlide, is_rgb: bool) -> dict[str, Any]:
    names = list(slide.channel_names)
    axes = slide.axes.upper()
    metadata: dict[str, Any] = {"axes": f"{axes}S" if is_rgb else f"C{axes}", "Name": slide.name}
    metadata["Channel"] = {"Name": ", ".join(names) if is_rgb else names}
    for axis, size in zip(axes, slide.pixel_size_um or (), strict=False):
        if axis == "T":
            metadata["TimeIncrement"], metadata["TimeIncrementUnit"] = size, "s"
        else:
            metadata[f"PhysicalSize{axis}"], metadata[f"PhysicalSize{axis}Unit"] = size, "µm"
    if slide.label_names or slide.label_colors:
        legend = {f"name {value}": name for value, name in sorted(slide.label_names.items())}
        legend |= {f"color {v}": " ".join(map(str, color)) for v, color in sorted(slide.label_colors.items())}
        metadata["MapAnnotation"] = {"Namespace": LABELS_NAMESPACE, **legend}
    return metadata


def _tiles(
    slide: OmeZarrSlide, level: Level, channels: Sequence[int | None], count: Any
) -> Iterator[np.ndarray[Any, Any]]:
    """Tiles of every plane in the order of their pages, whole also at the border; a row of them is read at once."""
    *planes, height, width = slide.level_shape(level)
    whole = -(-width // _TILE) * _TILE
    for channel in channels:
        for plane in np.ndindex(*planes):
            for top in range(0, height, _TILE):
                start, size = (*plane, top, 0), (*(1 for _ in plane), _TILE, whole)
                row = slide.read(level, start, size).reshape(slide.num_channels, _TILE, whole)
                row = np.moveaxis(row, 0, -1) if channel is None else row[channel]
                for left in range(0, whole, _TILE):
                    yield np.ascontiguousarray(row[:, left : left + _TILE])
                count()
