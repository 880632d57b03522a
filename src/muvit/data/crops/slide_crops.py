"""Base of the data sets that cut crops out of slides, reading only the windows they need."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from muvit.data.crops.affine import SimilarView, read_similar
from muvit.data.crops.appearance import PixelMap
from muvit.data.crops.balance import ClassPixels, locate_classes
from muvit.data.crops.dataset import MuViTDataset
from muvit.data.crops.normalize import fitted
from muvit.data.crops.placement import PlacedViews, Window, place_views
from muvit.data.crops.preprocessing import CropConfig
from muvit.data.crops.stain import StainNormalization, check_stained
from muvit.data.slides.slide import BlockCache, Slide
from muvit.errors import InputError
from muvit.labels import IGNORE
from muvit.levels import Level, level_name

_LOG = logging.getLogger(__name__)

Finite = np.ndarray | None
"""Mask of pixels of views whose channels are all finite, bool ``(L, *space)``; None: everywhere."""


def read_views(
    slide: Slide, windows: Sequence[Window], config: CropConfig, recolor: PixelMap | None = None
) -> dict[str, Tensor]:
    """Read the views of one sample.

    Args:
        slide: the image.
        windows: one crop per level; they may leave the image.
        config: normalisation and padding. Padding does not enter the percentiles of `Percentile`.
        recolor: a change of the native pixels.

    Returns:
        ``img``: float32 ``(L, C, *space)``; ``bbox``: float32 ``(L, 2, ndim)``, the true boxes in world pixels, also
        where a view leaves the image; under zero padding also ``inside``, bool ``(L, *space)``: whether pixels lie in
        the image.

    Raises:
        InputError: a pixel is NaN or infinite, and ``config.nonfinite`` is ``error``.
    """
    return _read_views(slide, windows, config, recolor)[0]


def _read_views(
    slide: Slide, windows: Sequence[Window], config: CropConfig, recolor: PixelMap | None
) -> tuple[dict[str, Tensor], Finite]:
    """The views, and where their pixels are finite."""
    views = list(zip(config.levels, windows, strict=True))
    pixels = np.stack([slide.read(level, w.start, w.size, padding=config.padding) for level, w in views])
    valid = np.zeros((len(views), *config.size), dtype=bool)
    for inside, (level, window) in zip(valid, views, strict=True):
        inside[window.slices_inside(slide.level_shape(level))] = True
    if recolor is not None:
        pixels = recolor(pixels)
    return to_sample(slide, pixels, valid, [w.box for w in windows], config)


def without_inside(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """A sample as models take it, without the mask ``inside`` that augmentation needs."""
    return {name: value for name, value in sample.items() if name != "inside"}


def to_sample(
    slide: Slide, pixels: np.ndarray, valid: np.ndarray, boxes: list[Tensor], config: CropConfig
) -> tuple[dict[str, Tensor], Finite]:
    """Normalised ``img`` and ``bbox``, from native pixels ``(L, C, *space)`` and whether they lie in the image.

    Under zero padding also ``inside``, bool ``(L, *space)``, for the augmentation, to leave the padding as it is.
    """
    finite = _finite_pixels(slide, pixels, boxes, config)
    if finite is not None:  # one channel that is missing hides the pixel, which normalisation sets to 0
        pixels, valid = np.where(finite[:, None], pixels, np.float32(np.nan)), valid & finite
    img = fitted(config.normalization, slide)(pixels, valid)
    sample = {"img": torch.from_numpy(img), "bbox": torch.stack(boxes).float()}
    if config.padding == "zero":
        if not valid.all():
            img *= valid[:, None]
        sample["inside"] = torch.from_numpy(valid)
    return sample, finite


def _finite_pixels(slide: Slide, pixels: np.ndarray, boxes: list[Tensor], config: CropConfig) -> Finite:
    """Mask of the pixels whose channels are all finite.

    Raises:
        InputError: a pixel is not, and the configuration does not ignore that.
    """
    if slide.dtype.kind != "f":
        return None
    with np.errstate(over="ignore"):  # what float32 cannot hold counts as infinite
        finite = np.all(np.isfinite(pixels.astype(np.float32, copy=False)), axis=1, keepdims=True)[:, 0]
    if finite.all():
        return None
    view = int(np.flatnonzero(~finite.reshape(len(finite), -1).all(axis=1))[0])
    corners = " to ".join(str(corner) for corner in boxes[view].tolist())
    place = f"{(~finite[view]).sum()} at level {level_name(config.levels[view])} in the box {corners}"
    if config.nonfinite == "error":
        hint = "Mend them, or set nonfinite to ignore (--nonfinite ignore; data.nonfinite in recipes)."
        raise InputError(slide.path, expected="finite pixels", got=f"NaN or infinity: {place}", hint=hint)
    _report(slide.path, place)
    return finite


_REPORTED: set[Path] = set()


def _report(slide: Path, place: str) -> None:
    """Warn of the first such pixels of a slide, in each process."""
    if slide not in _REPORTED:
        _REPORTED.add(slide)
        _LOG.warning("%s: ignored are pixels that are NaN or infinite, first %s", slide, place)


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


LabelledSlide = tuple[Slide, Slide | None]
"""An image and its label image (None: no labels)."""


class SlideCrops(MuViTDataset):
    """Base of data sets of crops: checked slides, and samples placed and read from one of them.

    Args:
        slides: images, with all levels of the config, and their label images; either all have labels or none has.
        config: contents of a sample.

    Raises:
        InputError: the slides do not fit each other or the config.
    """

    def __init__(self, slides: Sequence[LabelledSlide], config: CropConfig) -> None:
        _check_slides(slides, config)
        ignored = {value for _, label in slides if label is not None for value in label.ignored_labels}
        self.config = replace(config, ignore_labels=(*config.ignore_labels, *sorted(ignored)))
        self.images = _keeping_coarse_levels([image for image, _ in slides], config)
        self.labels = tuple(label for _, label in slides if label is not None)
        self.shapes = [[image.level_shape(level) for level in config.levels] for image in self.images]

    @property
    def levels(self) -> tuple[Level, ...]:
        """Downsampling factors of the views, finest first."""
        return tuple(self.config.levels)

    @property
    def n_channels(self) -> int:
        """Number of channels of every view."""
        return self.images[0].num_channels

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.config.size)

    def slide_of(self, index: int) -> Slide:
        """The slide of a sample."""
        raise NotImplementedError

    def locate_classes(self) -> list[ClassPixels]:
        """Find the classes in a coarse scan of all labels, before any work starts; crops are checked again when read.

        Raises:
            InputError: a label value is neither a class nor ignored.
        """
        located = []
        for i, label in enumerate(self.labels):
            found = locate_classes(i, label, self.config.levels[0])
            values = np.array([entry.value for entry in found])
            check_label_values(label, values[~np.isin(values, self.config.ignore_labels)], self.config)
            located += found
        return located

    def place(
        self,
        slide: int,
        *,
        start: Sequence[int] | None = None,
        rng: np.random.Generator | None = None,
        contains: Sequence[int] | None = None,
    ) -> PlacedViews:
        """Place the views of a sample of one slide; arguments as of `muvit.data.crops.placement.place_views`."""
        config = self.config
        return place_views(
            config.placement,
            self.shapes[slide],
            config.levels,
            config.size,
            start=start,
            rng=rng,
            contains=contains,
            free_views=config.free_views,
        )

    def read_placed(self, slide: int, placed: PlacedViews, recolor: PixelMap | None = None) -> dict[str, Tensor]:
        """The sample of placed views of one slide, as `read` gives that of windows, at the boxes that they claim."""
        return self.read(slide, placed.windows, recolor) | {"bbox": placed.boxes.float()}

    def read(self, slide: int, windows: Sequence[Window], recolor: PixelMap | None = None) -> dict[str, Tensor]:
        """The sample at ``windows`` of one slide: ``img``, ``bbox`` and, if there are labels, ``label``.

        ``recolor`` changes the native pixels.

        With ``label_levels = "all"`` also ``labels``, int64 ``(L, *space)``: those of every view. Under zero padding
        also ``inside``, bool ``(L, *space)``: whether pixels lie in the image.
        """
        config = self.config
        sample, finite = _read_views(self.images[slide], windows, config, recolor)
        if self.labels:
            labels = [read_label(self.labels[slide], w, config) for w in windows[: len(config.labelled_levels)]]
            self._put_labels(sample, labels, finite)
        return sample

    def read_similar(
        self, slide: int, views: Sequence[SimilarView], recolor: PixelMap | None = None
    ) -> dict[str, Tensor]:
        """The sample of scaled and rotated views of one slide, as `read` gives that of windows."""
        config = self.config
        image = self.images[slide]
        pixels, valid = read_similar(image, views, config.padding)
        if recolor is not None:
            pixels = recolor(pixels)
        sample, finite = to_sample(image, pixels, valid, [view.box for view in views], config)
        if self.labels:
            labels = []
            for view in views[: len(config.labelled_levels)]:
                stored = read_label(self.labels[slide], view.window, config).numpy()
                labels.append(torch.from_numpy(view.sample(stored, linear=False)))
            self._put_labels(sample, labels, finite)
        return sample

    def _put_labels(self, sample: dict[str, Tensor], labels: list[Tensor], finite: Finite) -> None:
        if finite is not None:
            for label, seen in zip(labels, torch.from_numpy(finite), strict=False):  # of the finest views
                label[~seen] = IGNORE
        sample["label"] = labels[0]
        if self.config.label_levels == "all":
            sample["labels"] = torch.stack(labels)


def _keeping_coarse_levels(slides: Sequence[Slide], config: CropConfig) -> tuple[Slide, ...]:
    """Slides that share a cache for the coarsest levels, as many as ``config.cache_mib`` holds of all slides."""
    block_bytes = max(slide.block_bytes for slide in slides)
    left = int(config.cache_mib * 2**20) // block_bytes
    cache, kept = BlockCache(left * block_bytes, block_bytes), []
    for level in reversed(config.levels):
        left -= sum(slide.num_blocks(level) for slide in slides)
        if left < 0:
            break
        kept.append(level)
    return tuple(slide.keeping(kept, cache) for slide in slides) if kept else tuple(slides)


def _check_slides(slides: Sequence[LabelledSlide], config: CropConfig) -> None:
    if not slides:
        raise InputError("slides", expected="at least one", got="none")
    first, labelled = slides[0][0], slides[0][1] is not None
    if labelled and config.num_classes is None:
        raise InputError("num_classes", expected="the number of classes, since the slides have labels", got=None)
    for image, label in slides:
        if image.ndim != len(config.size):
            expected = f"{len(config.size)} spatial axes, as size {tuple(config.size)} has"
            raise InputError(image.path, expected=expected, got=f"shape {image.shape}")
        for level in config.levels:
            image.level_shape(level)  # refuses a level that is not stored, and says which are
        if isinstance(config.normalization, StainNormalization):
            check_stained(image)
        if image.num_channels != first.num_channels or image.dtype.kind != first.dtype.kind:
            expected = f"{first.num_channels} channels of a type like {first.dtype}, as in {first.path}"
            raise InputError(image.path, expected=expected, got=f"{image.num_channels} channels of {image.dtype}")
        if (label is not None) != labelled:
            raise InputError(image.path, expected="labels for all slides or for none", got="labels for some only")
        if label is not None:
            _check_label(image, label, config)


def _check_label(image: Slide, label: Slide, config: CropConfig) -> None:
    if label.shape != image.shape:
        expected = f"shape {image.shape}, as its image {image.path} has"
        raise InputError(label.path, expected=expected, got=f"shape {label.shape}")
    if label.num_channels != 1 or label.dtype.kind not in "uib":
        got = f"{label.num_channels} channels of {label.dtype}"
        raise InputError(label.path, expected="labels: one channel of an integer type", got=got)
    for level in config.labelled_levels:
        label.level_shape(level)
