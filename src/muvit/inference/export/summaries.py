"""Summaries of labels: a table of the area of each class, and a picture of the labels over their image."""

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from muvit.data.pyramids.ngff import Kind
from muvit.data.pyramids.reduction import reduce_blocks
from muvit.data.slides.slide import Slide
from muvit.durable import write_whole
from muvit.errors import ExistsError, InputError
from muvit.inference.export.labelled import LabelledImage
from muvit.inference.export.objects import BLOCK_PX
from muvit.pictures import Color, colorize, overlay, to_rgb
from muvit.progress import Progress

AREA_COLUMNS = ("slide", "value", "class", "pixels", "fraction", "area_um2")
_LEGEND_CLASSES = 24
_PAPER, _INK = (255, 255, 255), (32, 33, 36)


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
    return _with_legend(Image.fromarray(picture), entries[:_LEGEND_CLASSES])


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


def _with_legend(picture: Image.Image, entries: Sequence[tuple[str, Color]]) -> Image.Image:
    """The picture with swatches and names of the classes below it, on as many lines as needed."""
    if not entries:
        return picture
    font, line, gap = ImageFont.load_default(16), 24, 16
    places, x, y = [], gap, 0
    for name, _ in entries:
        width = line + round(font.getlength(name)) + gap
        if x > gap and x + width > picture.width:
            x, y = gap, y + line
        places.append((x, y))
        x += width
    sheet = Image.new("RGB", (picture.width, picture.height + y + line + gap), _PAPER)
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for (name, color), (left, top) in zip(entries, places, strict=True):
        middle = picture.height + gap / 2 + top + line / 2
        draw.rectangle((left, middle - 7, left + 14, middle + 7), fill=color, outline=_INK)
        draw.text((left + 20, middle), name, fill=_INK, font=font, anchor="lm")
    return sheet
