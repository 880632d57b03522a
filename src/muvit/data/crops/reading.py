"""Reading the views of one sample and their labels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from muvit.data.crops.config import CropConfig
from muvit.data.crops.placement import Window
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.labels import IGNORE


def read_views(slide: Slide, windows: Sequence[Window], config: CropConfig) -> dict[str, Tensor]:
    """Read the views of one sample.

    Args:
        slide: the image.
        windows: one crop per level; they may leave the image.
        config: normalisation and padding. Padding does not enter the percentiles of `Percentile`.

    Returns:
        ``img``: float32 ``(L, C, *space)``; ``bbox``: float32 ``(L, 2, ndim)``, the true boxes in world pixels, also
        where a view leaves the image; under zero padding also ``inside``, bool ``(L, *space)``: whether pixels lie in
        the image.
    """
    views = list(zip(config.levels, windows, strict=True))
    pixels = np.stack([slide.read(level, w.start, w.size, padding=config.padding) for level, w in views])
    valid = np.zeros((len(views), *config.size), dtype=bool)
    for inside, (level, window) in zip(valid, views, strict=True):
        inside[window.slices_inside(slide.level_shape(level))] = True
    return to_sample(pixels.astype(np.float32), valid, [w.box for w in windows], config)


def without_inside(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """A sample as models take it, without the mask ``inside`` that augmentation needs."""
    return {name: value for name, value in sample.items() if name != "inside"}


def to_sample(pixels: np.ndarray, valid: np.ndarray, boxes: list[Tensor], config: CropConfig) -> dict[str, Tensor]:
    """Normalised ``img`` and ``bbox``, from native pixels ``(L, C, *space)`` and whether they lie in the image.

    Under zero padding also ``inside``, bool ``(L, *space)``, for the augmentation, to leave the padding as it is.
    """
    img = config.normalization(pixels, valid)
    sample = {"img": torch.from_numpy(img), "bbox": torch.stack(boxes).float()}
    if config.padding == "zero":
        img *= valid[:, None]
        sample["inside"] = torch.from_numpy(valid)
    return sample


def read_label(label: Slide, window: Window, config: CropConfig) -> Tensor:
    """Read the labels of a view: int64 ``(*space)``, `IGNORE` outside the image and at ignored labels.

    Raises:
        InputError: a value is no class and not ignored.
    """
    inside = window.slices_inside(label.level_shape(window.level))
    stored = label.read(window.level, window.start, window.size)[0][inside].astype(np.int64)
    stored[np.isin(stored, config.ignore_labels)] = IGNORE
    check_label_values(label, stored[stored != IGNORE], config)
    classes = np.full(window.size, IGNORE, dtype=np.int64)
    classes[inside] = stored
    return torch.from_numpy(classes)


def check_label_values(label: Slide, values: np.ndarray, config: CropConfig) -> None:
    """Refuse label values that are neither a class nor ignored.

    Raises:
        InputError: there is one.
    """
    assert config.num_classes is not None  # checked with the slides
    wrong = values[(values < 0) | (values >= config.num_classes)]
    if wrong.size:
        ignored = f" or one of {list(config.ignore_labels)}" if config.ignore_labels else ""
        raise InputError(
            label.path,
            expected=f"label values from 0 to {config.num_classes - 1}{ignored}",
            got=int(wrong.flat[0]),
            hint="Raise num_classes, or list the value in ignore_labels.",
        )
