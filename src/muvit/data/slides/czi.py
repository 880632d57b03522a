"""CZI files of Zeiss microscopes as slides, through pylibCZIrw (extra ``muvit[czi]``)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from muvit.data.slides.formats import file_version
from muvit.data.slides.slide import Slide, default_channel_names
from muvit.errors import InputError, ReadError, first_line, require_package
from muvit.levels import Level

_DTYPES = {"Gray8": np.uint8, "Gray16": np.uint16, "Gray32Float": np.float32, "Bgr24": np.uint8, "Bgr48": np.uint16}


class CziSlide(Slide):
    """A CZI file: its whole mosaic, or one of its scenes. The finest pixels alone are offered.

    pylibCZIrw scales coarser pixels by repeating stored ones, so coarser levels are computed as area means instead;
    convert a large file to read them often.

    Args:
        path: the file.
        series: number of the scene; unset, all scenes where they lie in the scanned area.

    Raises:
        ReadError: the file is no CZI that can be read.
        InputError: pylibCZIrw is not installed, or there is no such scene.
    """

    def __init__(self, path: str | Path, *, series: int | None = None) -> None:
        path = Path(path)
        self.path = path
        self._opened: tuple[int, Any] | None = None
        document = self._document()
        scenes, kinds = document.scenes_bounding_rectangle, document.pixel_types
        if series is not None and series not in (scenes or {0: None}):
            expected = f"a number from 0 to {max(len(scenes), 1) - 1}"
            raise InputError(f"series of {path}", expected=expected, got=series)
        self._scene = series if scenes else None
        area = document.total_bounding_rectangle if self._scene is None else scenes[self._scene]
        kind = next(iter(kinds.values()))
        if kind not in _DTYPES or len(set(kinds.values())) > 1:
            expected = f"channels of one type among {', '.join(_DTYPES)}"
            raise ReadError(path, expected=expected, got=", ".join(kinds.values()))
        self._corner, self._is_rgb, self._numbers = (area.y, area.x), kind.startswith("Bgr"), sorted(kinds)
        bounds = document.total_bounding_box
        self._planes = {axis: bounds.get(axis, (0, 1)) for axis in "TZ"}
        extents = {axis.lower(): upper - lower for axis, (lower, upper) in self._planes.items() if upper - lower > 1}
        num_channels, dtype = len(self._numbers) * (3 if self._is_rgb else 1), np.dtype(_DTYPES[kind])
        axes = "".join(axis for axis in "tz" if axis in extents) + "yx"
        names = () if self._is_rgb else _channel_names(document.metadata)
        super().__init__(
            path,
            level_shapes={1.0: (*(extents[axis] for axis in axes[:-2]), area.h, area.w)},
            num_channels=num_channels,
            dtype=dtype,
            pixel_size_um=_pixel_size_um(document.metadata, axes),
            channel_names=names if len(names) == num_channels else default_channel_names(num_channels, dtype),
            axes=axes,
        )

    def version(self) -> str:
        """As `Slide.version`."""
        return file_version(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _document(self) -> Any:
        # a handle shared with a forked process would share its file position too
        if self._opened is None or self._opened[0] != os.getpid():
            require_package("pylibCZIrw", str(self.path), package="pylibCZIrw", install="'muvit[czi]'")
            from pylibCZIrw.czi import CziReader

            try:
                self._opened = os.getpid(), CziReader(str(self.path))
            except (RuntimeError, OSError, ValueError) as error:
                raise ReadError(self.path, expected="a CZI file", got=first_line(error)) from error
        return self._opened[1]

    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        bounds = dict(zip(self.axes, zip(start, stop, strict=True), strict=True))
        (top, bottom), (left, right) = bounds["y"], bounds["x"]
        roi = (self._corner[1] + left, self._corner[0] + top, right - left, bottom - top)
        pixels = np.empty((self.num_channels, *(b - a for a, b in zip(start, stop, strict=True))), self.dtype)
        for index in np.ndindex(*pixels.shape[1:-2]):
            plane = {axis: first for axis, (first, _) in self._planes.items()}
            for axis, offset in zip(self.axes, index, strict=False):
                plane[axis.upper()] += bounds[axis][0] + offset
            for place, number in enumerate(self._numbers):
                found = self._document().read(roi=roi, plane=plane | {"C": number}, scene=self._scene)
                if self._is_rgb:  # stored as blue, green, red
                    pixels[(slice(3 * place, 3 * place + 3), *index)] = np.moveaxis(found[..., ::-1], -1, 0)
                else:
                    pixels[(place, *index)] = found[..., 0]
        return pixels


def _pixel_size_um(metadata: Mapping[str, Any], axes: str) -> tuple[float, ...] | None:
    """Micrometers along each axis (time: 1), or None where one is not stated."""
    found = _inside(metadata, "Scaling", "Items", "Distance")
    sizes = {
        str(entry.get("@Id")).lower(): float(entry["Value"]) * 1e6 for entry in _listed(found) if entry.get("Value")
    }
    sizes["t"] = 1.0
    return tuple(sizes[axis] for axis in axes) if all(sizes.get(axis, 0) > 0 for axis in axes) else None


def _channel_names(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    found = _listed(_inside(metadata, "Information", "Image", "Dimensions", "Channels", "Channel"))
    return tuple(str(entry.get("@Name") or entry.get("@Id", "")) for entry in found)


def _inside(metadata: Any, *names: str) -> Any:
    for name in ("ImageDocument", "Metadata", *names):
        metadata = metadata.get(name) if isinstance(metadata, Mapping) else None
    return metadata


def _listed(found: Any) -> list[Mapping[str, Any]]:
    entries = found if isinstance(found, list) else [found]
    return [entry for entry in entries if isinstance(entry, Mapping)]
