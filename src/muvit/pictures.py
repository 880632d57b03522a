"""Pictures of images, labels and boxes for people to look at: numpy arrays ``(H, W, 3)`` and Pillow images."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from muvit.errors import InputError, ShapeError

Color = tuple[int, int, int]
"""Red, green, blue, 0 to 255."""

RGB = NDArray[np.uint8]
"""A colour picture, ``(H, W, 3)`` uint8."""

BACKGROUND_COLOR: Color = (0, 0, 0)
IGNORED_COLOR: Color = (128, 128, 128)
MASK_GREY = 0.5
"""Value of masked patches, as in figure 2 of MuViT."""

MAX_COLORS = 256
OKABE_ITO: tuple[Color, ...] = (  # Okabe and Ito, "Color Universal Design", 2008; strongest contrasts first
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
)
_LEAST_LIGHTNESS = 0.45  # of OKLab: darker ones drown in the black background
_PAPER: Color = (255, 255, 255)
_INK: Color = (32, 33, 36)
_CHANNEL_TINTS: dict[int, NDArray[np.float32]] = {
    1: np.array([[1, 1, 1]], np.float32),
    2: np.array([[0, 1, 0], [1, 0, 1]], np.float32),  # green, magenta: told apart by everybody
    3: np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]], np.float32) / np.float32(2),  # cyan, magenta, yellow: sum to white
}


class Picture(NamedTuple):
    """A picture with its title, for `panel`."""

    title: str
    pixels: RGB
    """``(H, W, 3)``."""
    is_labels: bool = False
    """Whether its colours are classes, which must not be mixed when the picture is scaled."""


@lru_cache(maxsize=32)
def class_colors(num_classes: int) -> tuple[Color, ...]:
    """Distinct colours for classes 0 to ``num_classes - 1``, the same for every call; class 0 is black.

    The first seven after black are those of Okabe and Ito. Each further one is the colour farthest from all before it
    and from the grey of ignored pixels, as seen by people with normal, deuteranope and protanope vision.

    Raises:
        InputError: ``num_classes`` is not in 1 to 256.
    """
    if not 1 <= num_classes <= MAX_COLORS:
        raise InputError("num_classes", expected=f"1 to {MAX_COLORS}", got=num_classes)
    colors = [BACKGROUND_COLOR, *OKABE_ITO]
    if num_classes > len(colors):
        steps = np.linspace(0, 255, 16).round()
        candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
        candidates = candidates[_as_seen(candidates)[0, :, 0] > _LEAST_LIGHTNESS]
        seen = _as_seen(candidates)
        taken = _as_seen(np.array([*colors, IGNORED_COLOR, _PAPER]))
        nearest = np.linalg.norm(seen[:, :, None] - taken[:, None], axis=-1).min((0, 2))
        while len(colors) < num_classes:
            pick = int(nearest.argmax())
            red, green, blue = candidates[pick].astype(int).tolist()
            colors.append((red, green, blue))
            nearest = np.minimum(nearest, np.linalg.norm(seen - seen[:, pick, None], axis=-1).min(0))
    return tuple(colors[:num_classes])


def _as_seen(rgb: NDArray[Any]) -> NDArray[np.float64]:
    """OKLab coordinates of colours ``(N, 3)`` in normal, deuteranope and protanope vision, ``(3, N, 3)``."""
    scaled = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
    # Machado, Oliveira and Fernandes 2009, severity 1
    deuteranope = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    protanope = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    views = np.stack([linear, *(linear @ np.array(matrix).T for matrix in (deuteranope, protanope))]).clip(0, 1)
    # Ottosson 2020, OKLab
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(views @ np.array(to_cones).T) @ np.array(to_lab).T


def to_rgb(
    image: ArrayLike, *, low: float = 1.0, high: float = 99.8, contrast: NDArray[np.floating] | None = None
) -> RGB:
    """Picture of an image, its contrast stretched so that two percentiles become black and full brightness.

    One channel gives grey. Three are red, green and blue, stretched together so that hues stay. Two become green and
    magenta; of four or more the first three become cyan, magenta and yellow, each channel stretched by itself.

    Args:
        image: ``(C, H, W)`` of any real dtype. Values that are not finite come out black.
        low: lower percentile, at least 0.
        high: upper percentile, above ``low``, at most 100.
        contrast: values that become black and full brightness, from `measure_contrast` of another image, in place of
            the percentiles: parts of one image then have one contrast.

    Returns:
        ``(H, W, 3)``.

    Raises:
        ShapeError: the image has not three axes, or an axis without extent.
        InputError: the image is not real, or the percentiles are out of order.
    """
    bounds = measure_contrast(image, low=low, high=high) if contrast is None else contrast
    groups = _stretched_together(image)
    scaled = np.concatenate([_stretch(group, *ends) for group, ends in zip(groups, bounds, strict=True)])
    # (C, 3), (C, H, W) -> (3, H, W)
    channels = scaled if len(groups) == 1 < len(scaled) else np.tensordot(_CHANNEL_TINTS[len(scaled)], scaled, (0, 0))
    return np.moveaxis((channels * 255).round().clip(0, 255).astype(np.uint8), 0, -1).copy()  # (C, H, W) -> (H, W, C)


def measure_contrast(image: ArrayLike, *, low: float = 1.0, high: float = 99.8) -> NDArray[np.float64]:
    """Values that become black and full brightness, ``(G, 2)``: one pair for three channels, else one for each.

    Arguments and errors as of `to_rgb`.
    """
    if not 0 <= low < high <= 100:
        raise InputError("low, high", expected="percentiles, 0 <= low < high <= 100", got=(low, high))
    return np.array([_find_ends(group, low, high) for group in _stretched_together(image)])


def _stretched_together(image: ArrayLike) -> list[NDArray[np.floating]]:
    """The channels that are shown, ``(C, H, W)`` each: three together, others one by one."""
    pixels = np.asarray(image)
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise ShapeError("image", expected="shape (C, H, W)", got=pixels.shape)
    if pixels.dtype.kind not in "biuf":
        raise InputError("image", expected="real numbers", got=pixels.dtype)
    floats: NDArray[np.floating] = pixels.astype(np.float64 if pixels.dtype.itemsize > 2 else np.float32)
    return [floats] if len(floats) == 3 else [channel[None] for channel in floats[:3]]


def _find_ends(values: NDArray[np.floating], low: float, high: float) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    if not known.size:
        return 0.0, 1.0
    bottom, top = np.percentile(known, (low, high))
    if top <= bottom:  # a flat image, or one whose content is rarer than the percentiles: show its whole range
        bottom, top = known.min(), known.max()
    return float(bottom), float(top)


def _stretch(values: NDArray[np.floating], bottom: float, top: float) -> NDArray[np.floating]:
    span = max(top - bottom, float(np.finfo(np.float32).tiny))
    return np.where(np.isfinite(values), (values - values.dtype.type(bottom)) / values.dtype.type(span), 0).clip(0, 1)


def colorize(labels: ArrayLike, colors: Sequence[Color], *, ignore: Sequence[int] = ()) -> RGB:
    """Picture of labels, each class in its colour, ignored values grey.

    Args:
        labels: ``(H, W)``, integers.
        colors: colour of each class, from class 0.
        ignore: label values that are no classes.

    Returns:
        ``(H, W, 3)``.

    Raises:
        ShapeError: the labels have not two axes.
        InputError: they are not integers, or one has no colour and is not ignored.
    """
    values = np.asarray(labels)
    if values.ndim != 2:
        raise ShapeError("labels", expected="shape (H, W)", got=values.shape)
    if values.dtype.kind not in "biu":
        raise InputError("labels", expected="integers", got=values.dtype)
    ignored = np.isin(values, tuple(ignore))
    classes = np.where(ignored, 0, values).astype(np.int64)
    if classes.size and not (classes.min() >= 0 and classes.max() < len(colors)):
        raise InputError(
            "labels",
            expected=f"0 to {len(colors) - 1}, as there are colours",
            got=f"{classes.min()} to {classes.max()}",
        )
    picture = np.array(colors, dtype=np.uint8).reshape(-1, 3)[classes]
    picture[ignored] = IGNORED_COLOR
    return picture


def overlay(
    image: RGB, labels: ArrayLike, colors: Sequence[Color], *, alpha: float = 0.5, ignore: Sequence[int] = ()
) -> RGB:
    """Picture with classes painted over it; background (class 0) and ignored pixels stay as they are.

    Args:
        image: ``(H, W, 3)``.
        labels: ``(H, W)``, integers.
        colors: colour of each class, from class 0.
        alpha: opacity of the paint, 0 to 1.
        ignore: label values that are no classes.

    Raises:
        ShapeError: the picture and the labels are not of one size.
        InputError: a label has no colour, or ``alpha`` is out of range.
    """
    _check_rgb(image)
    values = np.asarray(labels)
    if values.shape != image.shape[:2]:
        raise ShapeError("labels", expected=f"shape {image.shape[:2]}, as the image", got=values.shape)
    if not 0 <= alpha <= 1:
        raise InputError("alpha", expected="0 to 1", got=alpha)
    paint = colorize(values, colors, ignore=ignore)
    painted = (values != 0) & ~np.isin(values, tuple(ignore))
    mixed = ((1 - alpha) * image + alpha * paint).round().astype(np.uint8)
    return np.where(painted[..., None], mixed, image)


def outline_boxes(image: RGB, boxes: ArrayLike, *, colors: Sequence[Color] = OKABE_ITO) -> RGB:
    """Picture with the outlines of boxes, drawn just inside them with a thin dark rim; the first box lies on top.

    Args:
        image: ``(H, W, 3)``.
        boxes: ``(N, 2, 2)``: lower and upper corner (exclusive) in yx, in pixels of the picture; may leave it.
        colors: of the boxes, repeated if there are more boxes.

    Raises:
        ShapeError: the boxes are not ``(N, 2, 2)``.
        InputError: an upper corner does not lie above its lower corner.
    """
    _check_rgb(image)
    corners = np.asarray(boxes, dtype=np.float64)
    if corners.ndim != 3 or corners.shape[1:] != (2, 2):
        raise ShapeError("boxes", expected="shape (N, 2, 2)", got=corners.shape)
    if not (corners[:, 1] > corners[:, 0]).all():  # also refuses NaN
        raise InputError("boxes", expected="upper corners above lower corners", got=corners.tolist())
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    width = max(1, round(max(image.shape[:2]) / 200))
    for index in reversed(range(len(corners))):
        (top, left), (bottom, right) = corners[index].round().astype(int).tolist()
        last = (max(left, right - 1), max(top, bottom - 1))
        draw.rectangle((left, top, *last), outline=_INK, width=width + 1)
        draw.rectangle((left, top, *last), outline=colors[index % len(colors)], width=width)
    return np.array(picture)


def outline_rings(image: RGB, rings: Sequence[ArrayLike], color: Color, *, width: int = 2) -> RGB:
    """Picture with closed lines, such as the outlines of polygons.

    Args:
        image: ``(H, W, 3)``.
        rings: points ``(N, 2)``, (x, y) in pixels of the picture; may leave it.
        color: of the lines.
        width: of the lines, in pixels.
    """
    _check_rgb(image)
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for ring in rings:
        points = np.asarray(ring, np.float64)
        draw.line([*map(tuple, points.tolist()), tuple(points[0].tolist())], fill=color, width=width)
    return np.array(picture)


def fit(pixels: RGB, size: int, *, is_labels: bool = False) -> RGB:
    """Scale a picture ``(H, W, 3)`` so that its longer side has ``size`` pixels; labels keep their exact colours."""
    _check_rgb(pixels)
    height, width = pixels.shape[:2]
    scale = size / max(height, width)
    target = (max(1, round(width * scale)), max(1, round(height * scale)))
    resampling = Image.Resampling.NEAREST if is_labels else Image.Resampling.BICUBIC
    return np.array(Image.fromarray(pixels).resize(target, resampling))


def panel(
    rows: Sequence[Sequence[Picture | tuple[str, RGB]]],
    *,
    size: int = 256,
    gap: int = 12,
    font_size: int = 16,
    captions: Sequence[str] = (),
) -> Image.Image:
    """Titled pictures in a grid on white: the title above, each picture scaled to fit a square and centred in it.

    Args:
        rows: pictures (or pairs of title and pixels) from top to bottom and left to right; rows may differ in length.
        size: side of the squares, in pixels.
        gap: space around them, in pixels.
        font_size: of the titles, in pixels; a title too long for its square is cut.
        captions: line above each row, as far as there are any; an empty one takes no space.

    Raises:
        InputError: there is no picture.
    """
    if not any(rows):
        raise InputError("rows", expected="at least one picture", got="none")
    font = ImageFont.load_default(font_size)
    header = round(font_size * 1.5)
    columns = max(map(len, rows))
    lines = [*captions, *[""] * (len(rows) - len(captions))]
    tops = np.cumsum([gap, *(header * (1 + bool(line)) + size + gap for line in lines)]).tolist()
    sheet = Image.new("RGB", (gap + columns * (size + gap), tops[-1]), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, line, begin in zip(rows, lines, tops, strict=False):
        if line:
            shown = _shorten(line, font, sheet.width - 2 * gap)
            draw.text((gap, begin + header / 2), shown, fill=_INK, font=font, anchor="lm", stroke_width=0.4)
        for c, item in enumerate(row):
            picture = Picture(*item)
            left, top = gap + c * (size + gap), begin + header * bool(line)
            title = _shorten(picture.title, font, size)
            draw.text((left + size / 2, top + header / 2), title, fill=_INK, font=font, anchor="mm")
            scaled = fit(picture.pixels, size, is_labels=picture.is_labels)
            height, width = scaled.shape[:2]
            sheet.paste(Image.fromarray(scaled), (left + (size - width) // 2, top + header + (size - height) // 2))
    return sheet


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other on white, on the left edge."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), _PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def with_legend(picture: Image.Image, entries: Sequence[tuple[str, Color]]) -> Image.Image:
    """The picture with swatches and names of classes below it, on as many lines as needed."""
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


def extent_words(extent_px: float, pixel_size_um: float | None) -> str:
    """A length as people write it: in micrometers or millimeters, or in pixels where their size is unknown."""
    if pixel_size_um is None:
        return f"{extent_px:.0f} px"
    length = extent_px * pixel_size_um
    return f"{length:.3g} µm" if length < 1000 else f"{length / 1000:.3g} mm"


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    line = " ".join(text.split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."


def _check_rgb(image: RGB) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype != np.uint8:
        raise ShapeError("image", expected="shape (H, W, 3), uint8", got=f"{image.shape}, {image.dtype}")
