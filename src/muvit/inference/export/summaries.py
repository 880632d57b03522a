"""Summaries of slides: a table of the area of each class, and pictures of labels and outlines over their image."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from muvit.data.annotations.slide import AnnotationSlide
from muvit.data.pyramids.ngff import Kind
from muvit.data.pyramids.reduction import reduce_blocks
from muvit.data.slides.slide import Slide
from muvit.durable import write_whole
from muvit.errors import ExistsError, InputError
from muvit.inference.export.labelled import LabelledImage
from muvit.inference.export.objects import BLOCK_PX
from muvit.inference.tiling.tissue import trace_mask
from muvit.pictures import (
    MAX_COLORS,
    Color,
    class_colors,
    colorize,
    outline_boxes,
    outline_rings,
    overlay,
    to_rgb,
    with_legend,
)
from muvit.progress import Progress

AREA_COLUMNS = ("slide", "value", "class", "pixels", "fraction", "area_um2")
_LEGEND_CLASSES = 24


def count_pixels(labels: Slide, progress: Progress | None = None) -> dict[int, int]:
    """Pixels of each value of a label slide, in ascending order of the values; read block by block."""
    sides = [range(0, extent, BLOCK_PX) for extent in labels.shape]
    corners = list(product(*sides))
    counts: dict[int, int] = {}
    for done, corner in enumerate(corners, start=1):
        size = tuple(min(BLOCK_PX, extent - a) for a, extent in zip(corner, labels.shape, strict=True))
        values, numbers = np.unique(labels.read(1, corner, size), return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + number
        if progress is not None:
            progress(done, len(corners))
    return dict(sorted(counts.items()))


def area_rows(source: LabelledImage, counts: Mapping[int, int]) -> list[dict[str, str | int | float | None]]:
    """Area of each class that has a name or pixels, background included, as rows with `AREA_COLUMNS`.

    Args:
        source: the labels.
        counts: pixels of each value, from `count_pixels`.

    Returns:
        ``pixels`` of the labels, their ``fraction`` of all, and ``area_um2``, None without a pixel size.
    """
    total, area = sum(counts.values()), source.pixel_area_um2
    return [
        {
            "slide": source.labels.name,
            "value": value,
            "class": source.class_name(value),
            "pixels": counts.get(value, 0),
            "fraction": counts.get(value, 0) / total,
            "area_um2": None if area is None else counts.get(value, 0) * area,
        }
        for value in sorted({*counts, *source.class_names})
    ]


def write_areas(rows: Sequence[Mapping[str, Any]], file: Path | str, *, overwrite: bool = False) -> None:
    """Write rows of `area_rows`, of one slide or of many, as a CSV file; unknown values are empty.

    Raises:
        ExistsError: the file exists and ``overwrite`` is false.
    """
    file = Path(file)
    if file.exists() and not overwrite:
        raise ExistsError(file)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, AREA_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue().encode())


def draw_overview(source: LabelledImage, *, size: int = 1600, alpha: float = 0.5) -> Image.Image:
    """Picture of the labels over their image, or of the labels alone, with a legend of the classes.

    The coarsest stored level of at least ``size`` pixels is read, or else the finest, block by block.

    Args:
        source: the labels, and their image if there is one.
        size: largest number of pixels of the longer side of the picture, without its legend.
        alpha: opacity of the labels.

    Raises:
        InputError: ``size`` is not positive.
    """
    if size < 1:
        raise InputError("size", expected="a positive number", got=size)
    labels = _shrink(source.labels, size, "label")[0]
    image = None if source.image is None else to_rgb(_shrink(source.image, size, "image"))
    if image is not None:  # both show the same area, in pixels of different sizes
        y, x = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(image.shape[:2], labels.shape, strict=True))
        labels = labels[np.ix_(y, x)]
    is_shown = labels >= source.lowest_value
    present = np.unique(labels[is_shown])
    index = np.where(is_shown, np.searchsorted(present, labels) + 1, 0)
    colors = [source.class_color(0), *(source.class_color(int(value)) for value in present)]
    picture = colorize(index, colors) if image is None else overlay(image, index, colors, alpha=alpha)
    entries = [(source.class_name(int(value)), color) for value, color in zip(present, colors[1:], strict=True)]
    return with_legend(Image.fromarray(picture), entries[:_LEGEND_CLASSES])


def write_overview(
    source: LabelledImage, file: Path | str, *, size: int = 1600, alpha: float = 0.5, overwrite: bool = False
) -> None:
    """Write `draw_overview` as a PNG file.

    Raises:
        ExistsError: the file exists and ``overwrite`` is false.
    """
    file = Path(file)
    if file.exists() and not overwrite:
        raise ExistsError(file)
    png = io.BytesIO()
    draw_overview(source, size=size, alpha=alpha).save(png, format="png")
    write_whole(file, png.getvalue())


@dataclass(frozen=True, kw_only=True)
class Outlines:
    """Polygons to draw in one colour."""

    name: str
    """Name in the legend."""
    color: Color
    """Red, green and blue."""
    polygons: Sequence[shapely.Geometry]
    """Polygons and multipolygons, (x, y) in world pixels."""


def label_outlines(labels: Slide, size: int = 1600) -> list[Outlines]:
    """Outlines of the classes of a label slide: of annotations as they are drawn, else of the labels in a picture.

    Args:
        labels: the labels; background and ignored ones are left out.
        size: largest number of pixels of the longer side of the picture.
    """
    if isinstance(labels, AnnotationSlide):
        drawn = labels.polygons
        parts = {int(value): drawn.polygons[drawn.values == value] for value in np.unique(drawn.values)}
    else:
        small = _shrink(labels, size, "label")[0]
        step = tuple(n / m for n, m in zip(labels.shape, small.shape, strict=True))
        parts = {int(value): trace_mask(small == value, step, labels.shape) for value in np.unique(small)}
    left_out = {*labels.ignored_labels, *({0} if labels.has_background else ())}
    default = class_colors(MAX_COLORS)
    found = []
    for value in sorted(set(parts) - left_out):
        red, green, blue, *_ = labels.label_colors.get(value, default[value % MAX_COLORS])
        name = labels.label_names.get(value, f"label {value}")
        found.append(Outlines(name=name, color=(red, green, blue), polygons=list(parts[value])))
    return found


def draw_slide(
    slide: Slide, outlines: Sequence[Outlines] = (), boxes: Sequence[ArrayLike] = (), *, size: int = 1200
) -> Image.Image:
    """Picture of a slide with outlines, nested boxes and a legend.

    Args:
        slide: a two-dimensional image.
        outlines: to draw, the last on top.
        boxes: of samples, each ``(L, 2, 2)``, yx in world pixels; each level has a colour.
        size: largest number of pixels of the longer side of the picture, without its legend.

    Raises:
        InputError: the image is not two-dimensional.
    """
    if slide.ndim != 2:
        raise InputError(slide.path, expected="a two-dimensional image, to draw it", got=f"axes {slide.axes}")
    picture = to_rgb(_shrink(slide, size, "image"))
    scale = np.array(picture.shape[:2]) / slide.shape
    for found in outlines:
        parts = shapely.get_parts(np.asarray(found.polygons, object)) if len(found.polygons) else []
        rings = [shapely.get_coordinates(ring) * scale[::-1] for ring in shapely.get_rings(parts)]
        picture = outline_rings(picture, rings, found.color)
    for sample in boxes:
        picture = outline_boxes(picture, np.asarray(sample, np.float64) * scale)
    entries = [(found.name, found.color) for found in outlines]
    return with_legend(Image.fromarray(picture), entries[:_LEGEND_CLASSES])


def _shrink(slide: Slide, size: int, kind: Kind) -> NDArray[Any]:
    """A reduced slide, ``(C, H, W)`` of at most ``size`` pixels: block means of images, majority votes of labels."""
    level = next((lv for lv in reversed(slide.levels) if max(slide.level_shape(lv)) >= size), 1)
    shape = slide.level_shape(level)
    factor = -(-max(shape) // size)
    side = max(1, BLOCK_PX // factor) * factor
    small = np.zeros((slide.num_channels, *(-(-n // factor) for n in shape)), slide.dtype)
    for top, left in product(range(0, shape[0], side), range(0, shape[1], side)):
        window = (min(side, shape[0] - top), min(side, shape[1] - left))
        part = reduce_blocks(slide.read(level, (top, left), window), factor, kind)
        y, x = top // factor, left // factor
        small[:, y : y + part.shape[1], x : x + part.shape[2]] = part
    return small
