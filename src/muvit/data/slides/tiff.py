"""Physical pixel sizes and channel names of TIFF files: OME-XML, ImageJ metadata, resolution tags."""

import itertools
import logging
import os
import struct
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from muvit.data.slides.formats import LABELS_NAMESPACE, MICROMETERS_PER_UNIT, file_version, pyramid_factor
from muvit.data.slides.slide import Palette, Slide, default_channel_names
from muvit.errors import InputError, ReadError, first_line
from muvit.levels import Level

_PRINTER_UM = 25.0
_RESOLUTION_UNITS = {2: 25400.0, 3: 1e4}


def ome_channel_names(ome_xml: str, number: int) -> tuple[str, ...]:
    """Names of the channels of image ``number``, or nothing if one has none; RGB in one channel gives its colours."""
    names: list[str] = []
    for channel in _ome_pixels(ome_xml, number).iterfind("{*}Channel"):
        name, samples = channel.get("Name", ""), int(channel.get("SamplesPerPixel") or 1)
        names += [name] if samples == 1 else ["red", "green", "blue", "alpha"][:samples]
    return tuple(names) if all(names) else ()


def ome_labels(ome_xml: str) -> tuple[dict[int, str], dict[int, tuple[int, ...]]]:
    """Names and colours of label values, as this package writes them."""
    names, colors = {}, {}
    for annotation in ET.fromstring(ome_xml).iterfind("{*}StructuredAnnotations/{*}MapAnnotation"):
        if annotation.get("Namespace") == LABELS_NAMESPACE:
            for entry in annotation.iterfind("{*}Value/{*}M"):
                what, value = str(entry.get("K")).split()
                if what == "name":
                    names[int(value)] = entry.text or ""
                else:
                    colors[int(value)] = tuple(map(int, (entry.text or "").split()))
    return names, colors


def tiff_pixel_size_um(tif: Any, number: int, page: Any, axes: tuple[str, ...]) -> tuple[float, ...] | None:
    """Micrometers per pixel along each axis of ``TZYX`` that the image has (seconds along T, 1 where not stated).

    A resolution tag is used only if it states pixels below 25 um: coarser ones refer to printers or screens.

    Args:
        tif: the open file.
        number: number of the image in the file.
        page: its first page.
        axes: letters of the wanted axes.
    """
    sizes = _ome_sizes(tif.ome_metadata, number) if tif.is_ome else _tag_sizes(tif, page)
    sizes.setdefault("T", 1.0)
    return tuple(sizes[axis] for axis in axes) if all(axis in sizes for axis in axes) else None


def _ome_pixels(ome_xml: str, number: int) -> ET.Element:
    images = ET.fromstring(ome_xml).findall("{*}Image")
    image = images[number] if number < len(images) else images[0]
    pixels = image.find("{*}Pixels")
    return ET.Element("Pixels") if pixels is None else pixels


def _ome_sizes(ome_xml: str, number: int) -> dict[str, float]:
    pixels = _ome_pixels(ome_xml, number)
    sizes = {}
    for axis in "XYZ":
        size, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        if size and float(size) > 0 and unit in MICROMETERS_PER_UNIT:
            sizes[axis] = float(size) * MICROMETERS_PER_UNIT[unit]
    if float(pixels.get("TimeIncrement") or 0) > 0 and pixels.get("TimeIncrementUnit", "s") == "s":
        sizes["T"] = float(pixels.get("TimeIncrement") or 1)
    return sizes


def _tag_sizes(tif: Any, page: Any) -> dict[str, float]:
    imagej = tif.imagej_metadata or {}
    unit = str(imagej.get("unit", "")).replace("\\u00B5", "µ")
    micrometers = (
        MICROMETERS_PER_UNIT.get(unit)
        if tif.is_imagej
        else _RESOLUTION_UNITS.get(int(page.tags.valueof("ResolutionUnit", 1)))
    )
    sizes: dict[str, float] = {}
    if micrometers is None:
        return sizes
    for axis in "XY":
        pixels, units = page.tags.valueof(f"{axis}Resolution", (0, 1))
        if pixels > 0 and units > 0 and (tif.is_imagej or micrometers * units / pixels < _PRINTER_UM):
            sizes[axis] = micrometers * units / pixels
    if imagej.get("spacing", 0) > 0:
        sizes["Z"] = float(imagej["spacing"]) * micrometers
    return sizes


_LOG = logging.getLogger(__name__)
_JPEG = {6, 7, 34892, 33007}
_UNDESCRIBED = "QIR"
_ALPHA = (1, 2)
_PALETTE = 3
_PHOTOMETRICS = {0: "white is zero", 1: "black is zero", 2: "RGB", 3: "palette", 6: "YCbCr", 32844: "LogL"}


class TiffSlide(Slide):
    """A TIFF file; of several images in one file, the largest with its pyramid, or the one that is chosen.

    Pages that the file does not describe further are taken for a stack along z. Axes t and z of length 1 are left out
    of `shape`. Levels that are not coarsened alike along every axis of space are not offered; a warning in the log says
    so. Alpha samples are dropped. A colour table gives RGB, or with ``palette="index"`` the stored indices. Values are
    those stored, also where the file says that 0 is white. Physical pixel sizes come from OME-XML, ImageJ metadata, or
    a resolution tag that is finer than a printer's.

    Args:
        path: the file.
        palette: pixels of an image with a colour table.
        series: number of the image in the file, from 0 on; unset, the largest.

    Raises:
        ReadError: the file is truncated, or no TIFF image that can be read.
        InputError: there is no such image in it.
    """

    def __init__(self, path: str | Path, *, palette: Palette = "rgb", series: int | None = None) -> None:
        path = Path(path)
        self._series = series
        try:
            with tifffile.TiffFile(path) as tif:
                self._describe(path, tif, palette)
        except (ReadError, InputError):
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, struct.error) as error:
            raise ReadError(path, expected="a TIFF image", got=first_line(error)) from error

    def _describe(self, path: Path, tif: tifffile.TiffFile, palette: Palette) -> None:
        if self._series is not None and not 0 <= self._series < len(tif.series):
            raise InputError(
                f"series of {path}", expected=f"a number from 0 to {len(tif.series) - 1}", got=self._series
            )
        found = _levels(tif, self._series)
        number, series = found[0]
        page = series.keyframe
        axes = _named_axes(series)
        _check_page(page, axes, path)
        extent = dict(zip(axes, series.shape, strict=True))
        spatial = tuple(axis for axis in "TZYX" if axis in "YX" or extent.get(axis, 1) > 1)
        self._places: dict[Level, int] = {}
        shapes: dict[Level, tuple[int, ...]] = {}
        for place, (_, level) in enumerate(found):
            shape = tuple(dict(zip(axes, level.shape, strict=True))[axis] for axis in spatial)
            factor = pyramid_factor(shapes.get(1.0, shape), shape)
            if factor is None or factor in shapes:
                _LOG.warning("%s: level of shape %s does not fit the pyramid and is left out", path, shape)
                continue
            shapes[factor], self._places[factor] = shape, place
        self._num_samples = page.samplesperpixel - sum(int(kind) in _ALPHA for kind in page.extrasamples)
        self._colormap = _colormap(page) if palette == "rgb" else None
        stored = extent.get("C", 1) * (self._num_samples if "S" in axes else 1)
        num_channels = stored if self._colormap is None else 3
        dtype = np.dtype(np.uint8) if self._colormap is not None or series.dtype.kind == "b" else series.dtype
        names = ome_channel_names(tif.ome_metadata, number) if tif.ome_metadata else ()
        super().__init__(
            path,
            level_shapes=shapes,
            num_channels=num_channels,
            dtype=dtype,
            pixel_size_um=tiff_pixel_size_um(tif, number, page, spatial),
            channel_names=names if len(names) == num_channels else default_channel_names(num_channels, dtype),
            axes="".join(spatial).lower(),
        )
        if tif.ome_metadata:
            self.label_names, self.label_colors = ome_labels(tif.ome_metadata)
        self._tables: list[_Level] | None = None

    def version(self) -> str:
        """As `Slide.version`."""
        return file_version(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": None}

    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        if self._tables is None:
            with tifffile.TiffFile(self.path) as tif:
                self._tables = [_level_table(series, tif.byteorder) for _, series in _levels(tif, self._series)]
        table = self._tables[self._places[level]]
        spatial = self.axes.upper()
        bounds = dict(zip(spatial, zip(start, stop, strict=True), strict=True))
        pixels, letters = table.read(bounds)
        if "S" in letters:
            pixels = pixels[(slice(None),) * letters.index("S") + (slice(self._num_samples),)]
        order = [axis for axis in ("C", "S", *spatial) if axis in letters]
        rest = tuple(i for i, axis in enumerate(letters) if axis not in order)
        kept = [axis for axis in letters if axis in order]
        pixels = pixels.squeeze(rest).transpose([kept.index(axis) for axis in order])
        pixels = pixels.reshape(-1, *(b - a for a, b in zip(start, stop, strict=True)))
        if self._colormap is not None:
            pixels = self._colormap[:, pixels[0].astype(np.intp)]
        return np.ascontiguousarray(pixels, dtype=self.dtype)


_END_OF_JPEG, _FILLING = b"\xff\xd9", b"\0\xff"


@dataclass(frozen=True, kw_only=True)
class _Page:
    """File offsets of the segments (tiles or strips) of one page."""

    file: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    jpeg: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Level:
    """Everything that reading windows of one level takes, without an open file."""

    axes: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    plain: tuple[str, int] | None
    """File and offset of pixels that are stored in one piece, uncompressed."""
    pages: tuple[_Page | None, ...]
    """One per combination of the axes that lead a page's own, row-major; None where the file lacks it."""
    leading: int
    """Number of those axes."""
    page_shape: tuple[int, int, int, int, int]
    """Planes, depth, rows, columns, samples of a page."""
    segment: tuple[int, int, int]
    """Depth, rows and columns of a segment."""
    decode: Callable[..., Any]
    nodata: Any

    def read(self, bounds: dict[str, tuple[int, int]]) -> tuple[np.ndarray[Any, Any], list[str]]:
        """The window with these bounds, whole along every other axis, and the letters of its axes."""
        ranges = [bounds.get(axis, (0, n)) for axis, n in zip(self.axes, self.shape, strict=True)]
        if self.plain is not None:
            file, offset = self.plain
            stored = np.memmap(file, self.dtype, "r", offset, self.shape)
            return np.array(stored[tuple(slice(a, b) for a, b in ranges)]), list(self.axes)
        lead = self.shape[: self.leading]
        depth = bounds.get("Z", (0, self.page_shape[1])) if "Z" in self.axes[self.leading :] else (0, 1)
        planes = []
        for index in itertools.product(*(range(a, b) for a, b in ranges[: self.leading])):
            page = self.pages[int(np.ravel_multi_index(index, lead)) if index else 0]
            planes.append(self._plane(page, (depth, bounds["Y"], bounds["X"])))
        counts = [b - a for a, b in ranges[: self.leading]]
        pixels = planes[0][None] if len(planes) == 1 else np.stack(planes)
        pixels = pixels.reshape(*counts, *planes[0].shape)
        # a page is planar or interleaved, never both: one of its two sample axes is of length 1
        pixels = np.moveaxis(pixels, -1, len(counts) + 1)
        pixels = pixels.reshape(*counts, -1, *pixels.shape[len(counts) + 2 :])
        return pixels, [*self.axes[: self.leading], "S", "Z" if "Z" in self.axes[self.leading :] else "depth", "Y", "X"]

    def _plane(self, page: _Page | None, window: tuple[tuple[int, int], ...]) -> np.ndarray[Any, Any]:
        """Window (depth, rows, columns) of one page, ``(planes, depth, rows, columns, samples)``."""
        num_planes, *extent, samples = self.page_shape
        pixels = np.full((num_planes, *(b - a for a, b in window), samples), self.nodata, self.dtype)
        if page is None:
            return pixels
        file = os.open(page.file, os.O_RDONLY)
        try:
            for number in self._segments(window, extent, num_planes):
                data = os.pread(file, page.lengths[number], page.offsets[number])
                if len(data) != page.lengths[number]:
                    raise ValueError(f"the file ends before its chunk {number} (tile or strip) does")
                if not data:
                    continue
                if page.jpeg and not data.rstrip(_FILLING).endswith(_END_OF_JPEG):  # which libjpeg makes up
                    raise ValueError(f"the JPEG image of its chunk {number} (tile or strip) has lost its end")
                try:
                    segment, (plane, *corner, _), _ = self.decode(data, number, **page.jpeg)
                except (ValueError, RuntimeError) as error:  # also those of every codec
                    got = f"chunk {number} (tile or strip, at byte {page.offsets[number]}) is corrupt"
                    raise ValueError(f"{got} ({first_line(error)})") from error
                inside, outside = [], []
                for c, n, e, (a, b) in zip(corner, segment.shape[:3], extent, window, strict=True):
                    low, high = max(c, a), min(c + n, b, e)
                    inside.append(slice(low - c, high - c))
                    outside.append(slice(low - a, high - a))
                pixels[(plane, *outside)] = segment[tuple(inside)]
        finally:
            os.close(file)
        return pixels

    def _segments(self, window: tuple[tuple[int, int], ...], extent: list[int], num_planes: int) -> Iterator[int]:
        grid = [-(-n // s) for n, s in zip(extent, self.segment, strict=True)]
        touched = [range(a // s, -(-b // s)) for (a, b), s in zip(window, self.segment, strict=True)]
        for plane, *cell in itertools.product(range(num_planes), *touched):
            yield int(np.ravel_multi_index((plane, *cell), (num_planes, *grid)))


def _levels(tif: tifffile.TiffFile, chosen: int | None) -> list[tuple[int, Any]]:
    """Series number and tifffile series of every level of the chosen or the largest image, finest first."""
    images = list(enumerate(tif.series))
    number, main = max(images, key=lambda item: item[1].size) if chosen is None else images[chosen]
    found = [(number, level) for level in main.levels]
    if len(found) == 1 and not tif.is_ome:
        # pyramids older than SubIFDs: the same picture again, smaller
        smaller = [item for item in enumerate(tif.series) if _is_smaller(item[1], main)]
        found += sorted(smaller, key=lambda item: -item[1].size)
    return [item for item in found if item[1].axes == main.axes]


def _is_smaller(series: Any, main: Any) -> bool:
    pages = (series.keyframe, main.keyframe)
    if series.axes != main.axes or series.size >= main.size or series.dtype != main.dtype:
        return False
    if pages[0].photometric != pages[1].photometric:
        return False
    extents = [[n for axis, n in zip(s.axes, s.shape, strict=True) if axis not in "CS"] for s in (main, series)]
    return pyramid_factor(*extents) is not None


def _named_axes(series: Any) -> str:
    """Letters of a series' axes, an undescribed one read as z."""
    axes = "".join("Z" if axis in _UNDESCRIBED and "Z" not in series.axes else axis for axis in series.axes)
    return str(axes)


def _check_page(page: Any, axes: str, path: Path) -> None:
    if set(axes) - set("TZCYXS") or len(set(axes)) != len(axes) or "Y" not in axes or "X" not in axes:
        raise ReadError(path, expected="axes among T, Z, C, Y, X and samples", got=", ".join(axes))
    subsampled = page.photometric == 6 and page.compression not in _JPEG
    if int(page.photometric) not in _PHOTOMETRICS or subsampled:
        raise ReadError(path, expected="grey, RGB or palette colours", got=f"photometric {page.photometric!r}")
    if page.dtype is None or page.dtype.kind not in "biuf":
        raise ReadError(
            path, expected="pixels of a numeric dtype", got=f"{page.bitspersample} bits, {page.sampleformat!r}"
        )
    end = max((o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
    if end > path.stat().st_size:
        raise ReadError(path, expected=f"at least {end} bytes", got=f"{path.stat().st_size}, the file is truncated")
    missing, total = page.databytecounts.count(0), len(page.databytecounts)
    if missing:
        _LOG.warning("%s: tiles or strips that are not stored are read as empty: %d of %d", path, missing, total)


def _colormap(page: Any) -> np.ndarray[Any, Any] | None:
    if int(page.photometric) != _PALETTE or page.colormap is None:
        return None
    colors = np.asarray(page.colormap)
    return (colors >> 8 if colors.max() > 255 else colors).astype(np.uint8)


def _level_table(series: Any, byteorder: str) -> _Level:
    page = series.keyframe
    axes = _named_axes(series)
    own = len(page.axes) if len(page.axes) <= len(axes) else len(axes)
    plain = None
    if series.dataoffset is not None:
        plain = (str(series.parent.filehandle.path), int(series.dataoffset))
    num_planes, depth, rows, columns, samples = (int(n) for n in page.shaped)
    return _Level(
        axes=axes,
        shape=tuple(int(n) for n in series.shape),
        dtype=series.dtype.newbyteorder(byteorder) if plain else series.dtype.newbyteorder("="),
        plain=plain,
        pages=() if plain else tuple(None if each is None else _page_table(each, page) for each in series.pages),
        leading=len(axes) - own,
        page_shape=(num_planes, depth, rows, columns, samples),
        segment=(page.tiledepth, page.tilelength, page.tilewidth) if page.is_tiled else (1, page.rowsperstrip, columns),
        decode=page.decode,
        nodata=page.nodata,
    )


def _page_table(page: Any, keyframe: Any) -> _Page:
    is_jpeg = int(keyframe.compression) in _JPEG
    return _Page(
        file=str(page.parent.filehandle.path),
        offsets=tuple(page.dataoffsets),
        lengths=tuple(page.databytecounts),
        jpeg={"jpegtables": page.jpegtables, "jpegheader": keyframe.jpegheader} if is_jpeg else {},
    )
