"""Slides as layers of napari: all levels, read as they are looked at, scaled in micrometers."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.errors import MuViTError, require_package
from muvit.levels import Level

LayerData = tuple[list[Any], dict[str, Any], str]
"""Levels, settings and type of a layer, as napari takes them."""

SLIDE = "muvit_slide"
"""Entry of the metadata of an image layer: the path of its slide."""
_CHUNK_PX = 512
_CONTRAST_PX = 1 << 20
_PERCENTILES = (0.2, 99.8)


def reader_for(path: str | Sequence[str]) -> Callable[[str | Sequence[str]], list[LayerData]] | None:
    """A function that reads a path, or several, into layers; None if muvit cannot open one of them.

    napari calls this for every file that is dropped onto it.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    try:
        for one in paths:
            open_slide(one)
    except MuViTError:
        return None
    return read_layers


def read_layers(path: str | Sequence[str]) -> list[LayerData]:
    """The layers of images and labels; labels stored inside an OME-Zarr image follow it.

    Raises:
        ReadError: a path cannot be opened.
    """
    layers = []
    for one in [path] if isinstance(path, str | Path) else path:
        slide = open_slide(one)
        layers.append(labels_layer(slide) if is_labels(slide) else image_layer(slide))
        if isinstance(slide, OmeZarrSlide):
            layers += [labels_layer(slide.label(name)) for name in slide.labels()]
    return layers


def is_labels(slide: Slide) -> bool:
    """Whether a slide is shown as labels: whole numbers in one channel, whose values have names or colours."""
    has_legend = bool(slide.label_names or slide.label_colors)
    return slide.num_channels == 1 and slide.dtype.kind in "iu" and has_legend


def image_layer(slide: Slide) -> LayerData:
    """An image; three channels of 8 bits are colours, any others are layers of their own."""
    settings: dict[str, Any] = {"name": slide.name, "metadata": {SLIDE: str(slide.path)}, **_place(slide)}
    is_rgb = slide.num_channels == 3 and slide.dtype == np.uint8 and slide.ndim == 2
    if is_rgb:
        return [_lazy(slide, level, last=True) for level in slide.levels], settings | {"rgb": True}, "image"
    limits = [_contrast(slide, channel) for channel in range(slide.num_channels)]
    if slide.num_channels == 1:
        return [_lazy(slide, level)[0] for level in slide.levels], settings | {"contrast_limits": limits[0]}, "image"
    settings |= {"channel_axis": 0, "contrast_limits": limits}
    settings["name"] = [f"{slide.name} {channel}" for channel in slide.channel_names]
    return [_lazy(slide, level) for level in slide.levels], settings, "image"


def labels_layer(slide: Slide) -> LayerData:
    """Labels with the names and colours of their classes."""
    settings: dict[str, Any] = {"name": slide.name, **_place(slide)}
    names = dict(sorted(slide.label_names.items()))
    settings["features"] = {"index": list(names), "class": list(names.values())}
    colors: dict[int | None, tuple[float, ...]] = {}
    for value, color in slide.label_colors.items():
        colors[value] = tuple(part / 255 for part in _opaque(color))
    if colors:
        if slide.has_background:
            colors[0] = (0.0, 0.0, 0.0, 0.0)
        colors.setdefault(None, (0.5, 0.5, 0.5, 1.0))  # of any other value
        settings["colormap"] = _colormap(colors)
    return [_lazy(slide, level)[0] for level in slide.levels], settings, "labels"


def _colormap(colors: dict[int | None, tuple[float, ...]]) -> Any:
    """The colours as napari takes them: a colour map of its own where it is installed."""
    if find_spec("napari") is None:
        return colors
    from napari.utils.colormaps import DirectLabelColormap

    return DirectLabelColormap(color_dict=colors)


def _opaque(color: Sequence[int]) -> tuple[int, ...]:
    return tuple(color) if len(color) == 4 else (*color[:3], 255)


def _place(slide: Slide) -> dict[str, Any]:
    """Scale of level 1 in micrometers, where it is known, else in pixels."""
    if slide.pixel_size_um is None or slide.axes.startswith("t"):
        return {"scale": (1.0,) * slide.ndim, "units": ("pixel",) * slide.ndim}
    return {"scale": tuple(slide.pixel_size_um), "units": ("um",) * slide.ndim}


def _contrast(slide: Slide, channel: int) -> tuple[float, float]:
    """Limits of the brightness of a channel, from its coarsest level."""
    level = slide.levels[-1]
    shape = slide.level_shape(level)
    side = int(_CONTRAST_PX ** (1 / slide.ndim))
    size = [min(n, side) for n in shape]
    pixels = slide.read(level, [(n - s) // 2 for n, s in zip(shape, size, strict=True)], size)[channel]
    low, high = np.percentile(pixels[np.isfinite(pixels)], _PERCENTILES) if np.isfinite(pixels).any() else (0.0, 1.0)
    return float(low), float(high) if high > low else float(low) + 1


def _lazy(slide: Slide, level: Level, *, last: bool = False) -> Any:
    """A level as a dask array ``(C, *space)``, or ``(*space, C)``, whose blocks are read when they are looked at."""
    require_package("dask", "layers of napari", package="dask", install="muvit[napari]")
    import dask.array as da

    pixels = LevelArray(slide, level)
    chunks = (slide.num_channels, *(min(_CHUNK_PX, n) for n in pixels.shape[1:]))
    empty = np.empty((0,) * pixels.ndim, slide.dtype)
    array = da.from_array(pixels, chunks=chunks, name=False, asarray=False, meta=empty)
    return da.moveaxis(array, 0, -1) if last else array


class LevelArray:
    """A level of a slide that is indexed like an array ``(C, *space)``, by whole numbers and slices forwards.

    Args:
        slide: the slide.
        level: the level.
    """

    def __init__(self, slide: Slide, level: Level) -> None:
        self.slide, self.level = slide, level
        self.shape = (slide.num_channels, *slide.level_shape(level))
        self.dtype, self.ndim = slide.dtype, slide.ndim + 1

    def __getitem__(self, index: tuple[slice | int, ...]) -> np.ndarray[Any, Any]:
        window: list[tuple[int, int]] = []
        picked: list[slice | int] = []
        for part, extent in zip(index, self.shape, strict=True):
            if isinstance(part, slice):
                start, stop, step = part.indices(extent)
                window.append((start, stop))
                picked.append(slice(None, None, step))
            else:
                window.append((int(part), int(part) + 1))
                picked.append(0)
        (first, last), *space = window
        pixels = self.slide.read(self.level, [a for a, _ in space], [b - a for a, b in space])
        return pixels[first:last][tuple(picked)]
