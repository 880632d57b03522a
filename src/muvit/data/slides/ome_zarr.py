"""OME-Zarr: reading images and labels as slides (`OmeZarrSlide`), writing them as pyramids (`PyramidWriter`)."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from muvit.data.pyramids.arrays import ZarrArray, count_chunks, open_array
from muvit.data.pyramids.manifest import read_manifest
from muvit.data.pyramids.ngff import Multiscale, parse_multiscale, pixel_size_um, read_attributes
from muvit.data.pyramids.remote import RemotePath
from muvit.data.pyramids.spec import PyramidSpec
from muvit.data.pyramids.writer import UNFINISHED, PyramidWriter
from muvit.data.slides.blocks import Pending
from muvit.data.slides.formats import file_version, whole_if_near
from muvit.data.slides.slide import Padding, Slide, default_channel_names
from muvit.errors import InputError, ReadError
from muvit.levels import Level, level_factors, level_name, plain_level

__all__ = ["OmeZarrSlide", "PyramidSpec", "PyramidWriter"]

_LOG = logging.getLogger(__name__)
_AXES = "tczyx"


class OmeZarrSlide(Slide):
    """A multiscale image of an OME-Zarr folder (NGFF 0.5, or 0.4 on zarr v2), or one of its label images.

    Axes t and z of length 1 are left out of `shape`. A level whose factor differs between the axes (a stack that is
    coarsened in its planes only) is a tuple of factors.

    NGFF states where the centre of the first pixel of a level lies (``translation``). Levels whose pixels cover blocks
    of finest pixels, or that state nothing, agree with this package's world coordinates. Others are read at
    the nearest whole pixel; `level_shifts` gives the offset of each level.

    Stores of this package record their shards: they are refused unless all are there in the size that was written.
    Elsewhere a chunk that is not stored stands for the fill value, so missing ones are counted in a warning; a level
    of an image without a single chunk is refused.

    Args:
        path: folder of the image.
        series: number of the image in a folder that holds several (layout of bioformats2raw), from 0 on.

    Attributes:
        level_shifts: for each of `levels`, how far the stored pixels lie from the world's grid of that level, in pixels
            of that level per axis. `read` corrects its integer part, so at most half a pixel remains.

    Raises:
        ReadError: the folder holds no such image, or one whose writing was never finished, or one that has lost a part
            since.
        InputError: it holds several and none is chosen, or there is no such one.
    """

    def __init__(self, path: str | Path, *, series: int | None = None) -> None:
        path = Path(path) if isinstance(path, str) else path
        folder, zarr_format, ome = _find_image(path, series)
        image = parse_multiscale(ome, path)
        if set(image.axes) - set(_AXES) or image.axes[-2:] != ("y", "x"):
            raise ReadError(path, expected="axes among t, c, z, y, x, ending in y, x", got=", ".join(image.axes))
        is_remote = isinstance(folder, RemotePath)  # whose files cannot be listed
        manifest = None if is_remote else read_manifest(folder)
        if manifest is not None and set(manifest) != set(image.paths):
            raise ReadError(path, expected=f"levels {', '.join(manifest)}, as written", got=", ".join(image.paths))
        arrays = [open_array(folder / name, zarr_format, (manifest or {}).get(name)) for name in image.paths]
        if any(len(array.shape) != len(image.axes) for array in arrays):
            raise ReadError(path, expected=f"arrays of {len(image.axes)} axes", got=[a.shape for a in arrays])
        if manifest is None and not is_remote:
            _check_chunks(path, [folder / name for name in image.paths], zarr_format, is_label="image-label" in ome)
        finest = arrays[0]
        extent = dict(zip(image.axes, finest.shape, strict=True))
        self._stored_axes = image.axes
        self.axes = "".join(a for a in "tzyx" if extent.get(a, 0) > (1 if a in "tz" else 0))
        self._arrays: dict[Level, ZarrArray] = {}
        self._shifts: dict[Level, tuple[float, ...]] = {}
        for index, array in enumerate(arrays):
            self._add_level(image, index, array, path)
        if len({array.dtype for array in arrays}) > 1 or finest.dtype.kind not in "biuf":
            raise ReadError(path, expected="levels of one numeric dtype", got={str(a.dtype) for a in arrays})
        channels = extent.get("c", 1)
        dtype = np.dtype(np.uint8) if finest.dtype.kind == "b" else finest.dtype
        names = image.channel_names if len(image.channel_names) == channels else ()
        sizes = pixel_size_um(self.axes, *(self._along(values, image) for values in (image.units, image.scales[0])))
        super().__init__(
            path,
            level_shapes={level: self._along(array.shape, image) for level, array in self._arrays.items()},
            num_channels=channels,
            dtype=dtype,
            pixel_size_um=sizes,
            channel_names=names or (("label",) if "image-label" in ome else default_channel_names(channels, dtype)),
            axes=self.axes,
        )
        self._folder = folder
        self.label_names = image.label_names
        self.label_colors = image.label_colors
        self.has_background = image.has_background
        self.level_shifts = tuple(self._shifts[level] for level in self.levels)

    def version(self) -> str | None:
        """As `Slide.version`."""
        return None if isinstance(self.path, RemotePath) else file_version(self.path)

    def request(self, level: Level, start: Sequence[int], size: Sequence[int], *, padding: Padding = "zero") -> Pending:
        """As `Slide.request`; where stored pixels lie off the world's grid, the nearest whole pixels are read."""
        shift = self._shifts.get(plain_level(level), ())
        if len(shift) == len(start):
            start = tuple(int(a) - round(s) for a, s in zip(start, shift, strict=True))
        return super().request(level, start, size, padding=padding)

    def labels(self) -> tuple[str, ...]:
        """Names of the label images stored inside this image."""
        group = read_attributes(self._folder / "labels")
        return tuple(str(name) for name in group[1].get("labels", ())) if group else ()

    def label(self, name: str) -> "OmeZarrSlide":
        """Open a label image stored inside this image.

        Raises:
            InputError: there is none of this name.
        """
        if name not in self.labels():
            known = ", ".join(self.labels()) or "none"
            raise InputError(
                f"{self.path}, label {name!r}", expected=f"one of its label images ({known})", got=repr(name)
            )
        return OmeZarrSlide(self._folder / "labels" / name)

    def _along(self, values: tuple[Any, ...], image: Multiscale) -> tuple[Any, ...]:
        return tuple(values[image.axes.index(axis)] for axis in self.axes)

    def _add_level(self, image: Multiscale, index: int, array: ZarrArray, path: Path) -> None:
        base, scale = self._along(image.scales[0], image), self._along(image.scales[index], image)
        if not all(a > 0 and b > 0 for a, b in zip(base, scale, strict=True)):
            raise ReadError(path, expected="positive scales", got=f"{scale} at level {image.paths[index]}")
        factors = tuple(whole_if_near(b / a) for a, b in zip(base, scale, strict=True))
        level: Level = factors if max(factors) > 1.01 * min(factors) else factors[-1]
        if min(factors) < 1 or level in self._arrays:
            raise ReadError(
                path,
                expected="levels that get coarser, the finest first",
                got=f"factor {level_name(level)} at {image.paths[index]}",
            )
        self._arrays[level] = array
        centre, first = image.translations[index], image.translations[0] or (0.0,) * len(image.axes)
        self._shifts[level] = tuple(
            0.0 if centre is None else (c - f - (factor - 1) / 2 * b) / s
            for c, f, factor, b, s in zip(
                self._along(centre or first, image),
                self._along(first, image),
                level_factors(level, len(factors)),
                base,
                scale,
                strict=True,
            )
        )

    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return self._request_window(level, start, stop)()

    def _request_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> Pending:
        bounds = dict(zip(self.axes, zip(start, stop, strict=True), strict=True))
        bounds["c"] = (0, self.num_channels)
        stored = [bounds.get(axis, (0, 1)) for axis in self._stored_axes]
        pending = self._arrays[level].request(tuple(a for a, _ in stored), tuple(b for _, b in stored))
        return lambda: self._ordered(pending())

    def _ordered(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Pixels ``(C, *space)`` of stored ones, whose axes are those of the file."""
        order = [axis for axis in "c" + self.axes if axis in self._stored_axes]
        dropped = tuple(i for i, axis in enumerate(self._stored_axes) if axis not in order)
        kept = [axis for axis in self._stored_axes if axis in order]
        pixels = pixels.squeeze(dropped).transpose([kept.index(axis) for axis in order])
        return np.ascontiguousarray(pixels if "c" in order else pixels[None], dtype=self.dtype)


def _check_chunks(path: Path, arrays: Sequence[Path], zarr_format: int, *, is_label: bool) -> None:
    """Refuse an image with a level without chunks, and warn of missing ones.

    A level of labels may be all background, but not the finest alone.
    """
    counts = [count_chunks(array, zarr_format) for array in arrays]
    stored = [number for number, _ in counts]
    if not all(stored) and not (is_label and (stored[0] or not any(stored))):
        empty = arrays[stored.index(0)]
        raise ReadError(
            empty,
            expected=f"chunks of an array, up to {counts[stored.index(0)][1]}",
            got="none",
            hint="Its folder of chunks is missing: copy the image again.",
        )
    missing = [
        f"{total - number} of {total} in {array.name}"
        for array, (number, total) in zip(arrays, counts, strict=True)
        if number < total
    ]
    if missing:
        _LOG.warning("%s: chunks that are not stored are read as empty: %s", path, ", ".join(missing))


def _find_image(path: Path, series: int | None = None) -> tuple[Path, int, dict[str, Any]]:
    """Folder, zarr format and OME attributes of the image at a path."""
    group = read_attributes(path)
    if group is None:
        if (path / UNFINISHED).is_file():
            raise ReadError(
                path,
                expected="a finished OME-Zarr image",
                got="an unfinished one",
                hint="Whatever was writing it was interrupted: finish that run, or make the image again.",
            )
        raise ReadError(path, expected="an OME-Zarr image", got="a folder without zarr metadata (zarr.json or .zgroup)")
    zarr_format, ome = group
    if "bioformats2raw.layout" in ome and "multiscales" not in ome:
        # layout of bioformats2raw: a collection of images in numbered folders
        if series is None and read_attributes(path / "1") is not None:
            raise InputError(
                path, expected="one image", got="a collection of several", hint="Choose one by its number (--series 0)."
            )
        folder = path / str(series or 0)
        if series and read_attributes(folder) is None:
            raise InputError(f"series of {path}", expected="the number of an image in it", got=series)
        return _find_image(folder)
    if series:
        raise InputError(f"series of {path}", expected="0, as there is a single one", got=series)
    if not ome.get("multiscales"):
        raise ReadError(path, expected="an OME-Zarr image", got=f"a zarr group with {sorted(ome) or 'no OME metadata'}")
    return path, zarr_format, ome
