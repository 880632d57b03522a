"""Physical pixel sizes and channel names of TIFF files: OME-XML, ImageJ metadata, resolution tags."""

import xml.etree.ElementTree as ET
from typing import Any

from muvit.data.slides.formats import MICROMETERS_PER_UNIT

_PRINTER_UM = 25.0
_RESOLUTION_UNITS = {2: 25400.0, 3: 1e4}


def ome_channel_names(ome_xml: str, number: int) -> tuple[str, ...]:
    """Names of the channels of image ``number``, or nothing if one has none; RGB in one channel gives its colours."""
    names: list[str] = []
    for channel in _ome_pixels(ome_xml, number).iterfind("{*}Channel"):
        name, samples = channel.get("Name", ""), int(channel.get("SamplesPerPixel") or 1)
        names += [name] if samples == 1 else ["red", "green", "blue", "alpha"][:samples]
    return tuple(names) if all(names) else ()


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
