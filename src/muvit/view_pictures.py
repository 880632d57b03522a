"""Pictures of the views of a sample: side by side, with frames of the finer views in the coarser ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from muvit.levels import Level, level_name
from muvit.pictures import OKABE_ITO, RGB, Color, Picture, extent_words, fit, outline_boxes, to_rgb

_HEAT: tuple[Color, Color] = (213, 94, 0), (255, 243, 176)  # vermilion to a light yellow
_MOST_OPAQUE = 0.85


def middle_slice(pixels: NDArray[Any], ndim: int) -> NDArray[Any]:
    """The middle slice ``(..., H, W)`` of ``(..., *space)`` with ``ndim`` spatial axes."""
    return pixels[(..., *(n // 2 for n in pixels.shape[-ndim:-2]), slice(None), slice(None))]


def with_one_contrast(views: NDArray[Any]) -> list[RGB]:
    """Pictures of views ``(n, C, H, W)`` whose contrast is stretched together: a view of empty glass looks empty."""
    return np.split(to_rgb(np.concatenate([*views], axis=-1)), len(views), axis=1)


def frame(inner: ArrayLike, outer: ArrayLike, shape: Sequence[int]) -> NDArray[np.float64]:
    """Box of a view in the picture of another, ``(1, 2, 2)`` in yx pixels of that picture.

    Args:
        inner: box ``(2, ndim)`` of the view, in world pixels.
        outer: box ``(2, ndim)`` of the view that the picture shows.
        shape: ``(H, W)`` of the picture.
    """
    box, (lower, upper) = np.asarray(inner, np.float64)[:, -2:], np.asarray(outer, np.float64)[:, -2:]
    return np.asarray((box - lower) / (upper - lower) * shape)[None]


def framed(picture: RGB, bbox: ArrayLike, index: int) -> RGB:
    """The picture of a view with frames of the finer views, and an outline of its own, each in its colour.

    Args:
        picture: of the view with index ``index``.
        bbox: boxes ``(L, 2, ndim)`` of all views.
        index: 0 is the finest view.
    """
    boxes, (height, width) = np.asarray(bbox, np.float64), picture.shape[:2]
    frames = [frame(finer, boxes[index], (height, width)) for finer in boxes[:index]]
    whole = np.array([[[0, 0], [height, width]]])
    return outline_boxes(picture, np.concatenate([*frames, whole]), colors=OKABE_ITO)


def view_row(
    pictures: Sequence[RGB], bbox: ArrayLike, levels: Sequence[Level], pixel_size_um: float | None, *, size: int = 256
) -> list[Picture]:
    """The views of one sample, finest first, each with the frames of the finer ones and its width in the title.

    Args:
        pictures: of the views, such as those of `with_one_contrast`.
        bbox: boxes ``(L, 2, ndim)`` of the views.
        levels: of the views.
        pixel_size_um: micrometers per world pixel along x; None if unknown.
        size: side of the pictures, in pixels.
    """
    boxes = np.asarray(bbox, np.float64)
    return [
        Picture(
            f"level {level_name(level)}: {extent_words(float(boxes[i, 1, -1] - boxes[i, 0, -1]), pixel_size_um)} wide",
            framed(fit(picture, size), boxes, i),
        )
        for i, (level, picture) in enumerate(zip(levels, pictures, strict=True))
    ]


def heat(picture: RGB, values: ArrayLike) -> RGB:
    """The picture in grey, with values from 0 (clear) to 1 (light yellow) over it.

    Args:
        picture: ``(H, W, 3)``.
        values: ``(h, w)``, evenly spread over the picture; values above 1 look as 1.
    """
    height, width = picture.shape[:2]
    shares = np.asarray(values, np.float64).clip(0, 1)
    rows, columns = (np.arange(n) * m // n for n, m in zip((height, width), shares.shape, strict=True))
    strength = shares[rows][:, columns][..., None]
    low, high = np.array(_HEAT, np.float64)
    grey = picture.mean(-1, keepdims=True)
    opacity = _MOST_OPAQUE * np.sqrt(strength)
    return np.asarray(((1 - opacity) * grey + opacity * (low + strength * (high - low))).round(), np.uint8)
