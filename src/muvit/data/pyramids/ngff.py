"""NGFF metadata, which make a zarr hierarchy an OME-Zarr image, as plain data: written as 0.5, read as 0.4 to 0.6.

Specification: https://ngff.openmicroscopy.org/0.5/
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from muvit.data.slides.formats import MICROMETERS_PER_UNIT
from muvit.durable import write_whole
from muvit.errors import ReadError
from muvit.labels import BACKGROUND
from muvit.levels import Level, level_factors

Kind = Literal["image", "label"]
Color = tuple[int, ...]
"""Red, green, blue and optionally alpha, 0 to 255."""

MAX_JSON_BYTES, MAX_JSON_DEPTH = 32 << 20, 64
"""Largest and most deeply nested JSON file that is read."""

_LOG = logging.getLogger(__name__)
_AXIS_TYPES = {"t": "time", "c": "channel"}
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]')
_CHANNEL_COLORS = ("FF0000", "00FF00", "0000FF", "FF00FF", "00FFFF", "FFFF00")


@dataclass(frozen=True, kw_only=True)
class Multiscale:
    """Metadata of one multiscale image. Axis tuples run over all stored axes, channels included."""

    axes: tuple[str, ...]
    """Names, in stored order, such as ``("c", "y", "x")``."""
    units: tuple[str, ...]
    """Unit of each axis, empty where none is stated."""
    paths: tuple[str, ...]
    """Array of each level, relative to the image's folder."""
    scales: tuple[tuple[float, ...], ...]
    """Extent of one pixel of each level, in units."""
    translations: tuple[tuple[float, ...] | None, ...]
    """Centre of the first pixel of each level, in units; None where not stated."""
    channel_names: tuple[str, ...]
    """Empty where not stated."""
    label_names: dict[int, str]
    """Name of each label value, where this is a label image that has names."""
    label_colors: dict[int, Color]
    """Colour of each label value."""
    has_background: bool
    """Whether label 0 is background: unless this package has stated that it is not."""


def read_attributes(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Zarr format (2 or 3) of a group and its OME attributes, or None where there is no zarr group.

    Raises:
        ReadError: the metadata file is no JSON object.
    """
    if (folder / "zarr.json").is_file():
        group = read_json(folder / "zarr.json")
        return 3, _object(_object(group.get("attributes"), folder).get("ome"), folder)
    if (folder / ".zgroup").is_file():
        return 2, read_json(folder / ".zattrs") if (folder / ".zattrs").is_file() else {}
    return None


def _object(value: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise ReadError(folder / "zarr.json", expected="attributes that are JSON objects", got=type(value).__name__)
    return dict(value or {})


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ReadError: it is none, or beyond `MAX_JSON_BYTES` and `MAX_JSON_DEPTH`.
    """
    try:
        is_remote = not isinstance(file, Path)  # whose size is known once it is there
        if not is_remote and file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        text = file.read_text(encoding="utf-8")
        if is_remote and len(text) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        if _nesting(text) > MAX_JSON_DEPTH:
            raise ValueError(f"more than {MAX_JSON_DEPTH} levels of nesting")
        content = json.loads(text)
    except ReadError:  # of a server
        raise
    except (OSError, ValueError) as error:
        raise ReadError(file, expected="a readable JSON file", got=str(error)) from error
    if not isinstance(content, dict):
        raise ReadError(file, expected="a JSON object", got=type(content).__name__)
    return content


def _nesting(text: str) -> int:
    """Depth of brackets outside of strings."""
    deepest = depth = 0
    for found in _BRACKETS.finditer(text):
        depth += (found[0] in "[{") - (found[0] in "]}")
        deepest = max(deepest, depth)
    return deepest


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is either whole or absent."""
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False).encode())


def group_json(ome: dict[str, Any]) -> dict[str, Any]:
    """Content of the ``zarr.json`` of a group with these OME attributes."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"version": "0.5", **ome}}}


def multiscale_attributes(
    *, name: str, axes: str, levels: Sequence[Level], pixel_size_um: Sequence[float] | None, kind: Kind
) -> dict[str, Any]:
    """The ``multiscales`` entry of a pyramid of block-wise reduced levels.

    A pixel of level l covers l finest pixels, so its centre lies ``(l - 1) / 2`` finest pixels further in: that is its
    ``translation``. Without a physical pixel size the unit is the finest pixel.

    Args:
        axes: one letter per stored axis, ``c`` for channels.
        levels: downsampling factors, of all axes but ``c`` alike or of each.
        pixel_size_um: per axis but ``c``: micrometers, seconds for ``t``.
    """
    sizes = iter(pixel_size_um or (1.0,) * len(axes))
    finest = [1.0 if axis == "c" else float(next(sizes)) for axis in axes]
    described = [{"name": axis, "type": _AXIS_TYPES.get(axis, "space")} for axis in axes]
    if pixel_size_um is not None:
        for axis in described:
            if axis["name"] != "c":
                axis["unit"] = "second" if axis["name"] == "t" else "micrometer"
    datasets = []
    for index, level in enumerate(levels):
        along = iter(level_factors(level, len(axes) - axes.count("c")))
        factors = [1 if axis == "c" else next(along) for axis in axes]
        scale = [size * factor for size, factor in zip(finest, factors, strict=True)]
        shift = [size * (factor - 1) / 2 for size, factor in zip(finest, factors, strict=True)]
        transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
        datasets.append({"path": str(index), "coordinateTransformations": transforms})
    method = "area mean" if kind == "image" else "majority"
    return {"name": name, "type": method, "axes": described, "datasets": datasets}


def omero_attributes(
    names: Sequence[str], dtype: np.dtype[Any], value_range: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """The ``omero`` entry: names, colours and contrast limits, so that viewers show RGB as colours.

    Args:
        value_range: lowest and highest value per channel, used as contrast limits except for uint8.
    """
    limits = (0.0, 1.0) if dtype.kind == "f" else (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max))
    channels = []
    for i, (name, (low, high)) in enumerate(zip(names, value_range, strict=True)):
        if dtype == np.uint8 or not low < high:
            low, high = limits
        window = {"min": min(low, limits[0]), "max": max(high, limits[1]), "start": low, "end": high}
        color = "FFFFFF" if len(names) == 1 else _CHANNEL_COLORS[i % len(_CHANNEL_COLORS)]
        channels.append({"label": name, "color": color, "active": True, "window": window})
    return {"channels": channels, "rdefs": {"model": "greyscale" if len(names) == 1 else "color"}}


def label_attributes(names: dict[int, str], colors: dict[int, Color], *, has_background: bool = True) -> dict[str, Any]:
    """The ``image-label`` entry of a label image.

    NGFF does not say what is background; a label image without any states it in a property of label 0, ``background``.
    """
    entry: dict[str, Any] = {}
    if colors:
        entry["colors"] = [{"label-value": v, "rgba": [*c, 255][:4]} for v, c in sorted(colors.items())]
    properties: dict[int, dict[str, Any]] = {value: {"name": name} for value, name in names.items()}
    if not has_background:
        properties.setdefault(BACKGROUND, {})["background"] = False
    if properties:
        entry["properties"] = [{"label-value": value, **known} for value, known in sorted(properties.items())]
    return entry


def parse_multiscale(ome: dict[str, Any], subject: object) -> Multiscale:
    """Read the first multiscale image of a group's OME attributes.

    Raises:
        ReadError: the entry lacks something that an image needs; names ``subject``.
    """
    try:
        entry = ome["multiscales"][0]
        described = _axes(entry)
        axes = tuple(axis if isinstance(axis, str) else _text(axis["name"]) for axis in described)
        units = tuple("" if isinstance(axis, str) else _text(axis.get("unit") or "") for axis in described)
        if len(set(axes)) < len(axes):
            raise ValueError(f"an axis twice: {', '.join(axes)}")
        # 0.6: those of the image lead from the system of its levels to others
        whole, offset = _transforms({} if "coordinateSystems" in entry else entry, len(axes))
        pairs = [_transforms(dataset, len(axes)) for dataset in entry["datasets"]]
        label = ome.get("image-label") or {}
        return Multiscale(
            axes=axes,
            units=units,
            paths=tuple(_inner_path(dataset["path"]) for dataset in entry["datasets"]),
            scales=tuple(tuple(a * b for a, b in zip(scale, whole, strict=True)) for scale, _ in pairs),
            translations=tuple(
                None
                if t is None
                else tuple(a * b + c for a, b, c in zip(t, whole, offset or (0.0,) * len(axes), strict=True))
                for _, t in pairs
            ),
            channel_names=tuple(str(c.get("label", "")) for c in (ome.get("omero") or {}).get("channels", ())),
            label_names={int(p["label-value"]): str(p["name"]) for p in label.get("properties") or () if "name" in p},
            label_colors={int(c["label-value"]): _color(c["rgba"]) for c in label.get("colors") or () if "rgba" in c},
            has_background=all(p.get("background") is not False for p in label.get("properties") or ()),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ReadError(
            subject, expected="a complete NGFF multiscales entry", got=f"{type(error).__name__}: {error}"
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} in place of a text")
    return value


def _inner_path(value: Any) -> str:
    """The path of an array, which lies inside the image's folder."""
    path = PurePosixPath(_text(value))
    if path.is_absolute() or ".." in path.parts or "\0" in value:
        raise ValueError(f"an array outside the image, {value!r}")
    return str(value)


def _color(value: Any) -> Color:
    color = tuple(int(channel) for channel in value)
    if len(color) not in (3, 4) or not all(0 <= channel <= 255 for channel in color):
        raise ValueError(f"the colour {value}")
    return color


def pixel_size_um(axes: Sequence[str], units: Sequence[str], scale: Sequence[float]) -> tuple[float, ...] | None:
    """Micrometers per pixel (seconds along t) of the axes but ``c``, or None where a unit of space is not stated."""
    sizes = []
    for axis, unit, size in zip(axes, units, scale, strict=True):
        if axis == "t":
            sizes.append(float(size))
        elif axis != "c":
            if unit not in MICROMETERS_PER_UNIT:
                return None
            sizes.append(float(size) * MICROMETERS_PER_UNIT[unit])
    return tuple(sizes)


def _axes(entry: dict[str, Any]) -> Sequence[Any]:
    """Axes of the levels; in 0.6 those of the coordinate system that their transformations lead to."""
    systems = entry.get("coordinateSystems")
    if systems is None:
        axes: Sequence[Any] = entry["axes"]
        return axes
    outputs = [t.get("output") for d in entry["datasets"] for t in d.get("coordinateTransformations") or ()]
    named = [output.get("name") if isinstance(output, dict) else output for output in outputs]
    names = {str(name) for name in named if name}
    found = [system["axes"] for system in systems if system.get("name") in names] or [systems[0]["axes"]]
    if len(found) > 1:
        raise ValueError(f"levels lie in several coordinate systems: {', '.join(sorted(names))}")
    return found[0]


def _transforms(entry: dict[str, Any], ndim: int) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """Scale and translation that the transformations of an entry amount to, applied one after the other."""
    scale: tuple[float, ...] = (1.0,) * ndim
    translation: tuple[float, ...] | None = None
    todo = list(entry.get("coordinateTransformations") or ())
    while todo:
        transform = todo.pop(0)
        kind = transform["type"]
        if kind == "sequence":
            todo = [*transform["transformations"], *todo]
        elif kind == "scale":
            values = [float(v) for v in transform["scale"]]
            scale = tuple(a * b for a, b in zip(scale, values, strict=True))
            if translation is not None:
                translation = tuple(a * b for a, b in zip(translation, values, strict=True))
        elif kind == "translation":
            values = [float(v) for v in transform["translation"]]
            translation = tuple(a + b for a, b in zip(translation or (0.0,) * ndim, values, strict=True))
        elif kind != "identity":
            raise ValueError(f"a coordinate transformation of type {kind!r}, and only scales and translations are read")
    if len(scale) != ndim or (translation is not None and len(translation) != ndim):
        raise ValueError("coordinateTransformations do not have one number per axis")
    return scale, translation


def register_label(path: Path) -> None:
    """List a store inside an image's ``labels`` folder among that image's labels, in the zarr format of the image.

    A warning says so where that differs from the format of the store: other software then does not find it.
    """
    folder, store = path.parent, read_attributes(path)
    image = read_attributes(folder.parent) if folder.name == "labels" else None
    if image is None:
        return
    if store is not None and store[0] != image[0]:
        _LOG.warning(
            "%s: labels of zarr format %d in an image of format %d, which other software does not find; "
            "`muvit convert --format` writes others", path, store[0], image[0],
        )  # fmt: skip
    group = read_attributes(folder)
    names = list(group[1].get("labels", ())) if group else []
    if path.name in names:
        return
    if image[0] == 2:
        write_json(folder / ".zattrs", {"labels": [*names, path.name]})
        write_json(folder / ".zgroup", {"zarr_format": 2})
    else:
        write_json(folder / "zarr.json", group_json({"labels": [*names, path.name]}))
