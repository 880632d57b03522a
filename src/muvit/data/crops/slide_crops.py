"""Base of the data sets that cut crops out of slides, reading only the windows they need."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from muvit.data.crops.affine import SimilarView, request_similar
from muvit.data.crops.appearance import PixelMap
from muvit.data.crops.balance import ClassPixels, locate_classes
from muvit.data.crops.dataset import MuViTDataset
from muvit.data.crops.normalize import fitted
from muvit.data.crops.placement import PlacedViews, Window, place_views
from muvit.data.crops.preprocessing import CropConfig
from muvit.data.crops.stain import StainNormalization, check_stained
from muvit.data.crops.stored import Look, Stored, finish
from muvit.data.slides.blocks import BlockCache
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.labels import IGNORE
from muvit.levels import Level, level_name

_LOG = logging.getLogger(__name__)

Finite = np.ndarray | None
"""Mask of pixels of views whose channels are all finite, bool ``(L, *space)``; None: everywhere."""


def read_views(slide: Slide, windows: Sequence[Window], config: CropConfig) -> dict[str, Tensor]:
    """Read the views of one sample.

    Args:
        slide: the image.
        windows: one crop per level; they may leave the image.
        config: normalisation and padding. Padding does not enter the percentiles of `Percentile`.

    Returns:
        ``img``: float32 ``(L, C, *space)``; ``bbox``: float32 ``(L, 2, ndim)``, the true boxes in world pixels, also
        where a view leaves the image.

    Raises:
        InputError: a pixel is NaN or infinite, and ``config.nonfinite`` is ``error``.
    """
    pixels, valid = request_windows(slide, windows, config)()
    return finish(to_stored(slide, pixels, valid, [window.box for window in windows], config)[0])


def request_windows(
    slide: Slide, windows: Sequence[Window], config: CropConfig
) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Ask for the views of one sample (`Slide.request`).

    Returns:
        A function that gives native pixels ``(L, C, *space)``, and whether they lie in the image ``(L, *space)``.
    """
    views = list(zip(config.levels, windows, strict=True))
    pending = [slide.request(level, w.start, w.size, padding=config.padding) for level, w in views]

    def read() -> tuple[np.ndarray, np.ndarray]:
        valid = np.zeros((len(views), *config.size), dtype=bool)
        for inside, (level, window) in zip(valid, views, strict=True):
            inside[window.slices_inside(slide.level_shape(level))] = True
        return np.stack([pixels() for pixels in pending]), valid

    return read


def to_stored(
    slide: Slide, pixels: np.ndarray, valid: np.ndarray, boxes: list[Tensor], config: CropConfig
) -> tuple[Stored, Finite]:
    """``img`` with its look and ``bbox``, from native pixels ``(L, C, *space)`` and whether they lie in the image.

    Under zero padding also ``inside``, unless all views lie in the image.
    """
    finite = _finite_pixels(slide, pixels, boxes, config)
    if finite is not None:  # one channel that is missing hides the pixel, which becomes 0
        pixels, valid = np.where(finite[:, None], pixels, np.float32(np.nan)), valid & finite
    scaling = fitted(config.normalization, slide)(pixels, valid)
    img, low, spread = map(torch.from_numpy, scaling)
    stored = {"img": img, "look": Look(low, spread), "bbox": torch.stack(boxes).float()}
    if config.padding == "zero" and not valid.all():
        stored["inside"] = torch.from_numpy(valid)
    return stored, finite


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


def request_label(label: Slide, window: Window, config: CropConfig) -> Callable[[], Tensor]:
    """Ask for the labels of a view (`Slide.request`).

    Returns:
        A function that gives int64 ``(*space)``, `IGNORE` outside the image and at ignored labels; it raises an
        InputError if a value is no class and not ignored.
    """
    pending = label.request(window.level, window.start, window.size)

    def read() -> Tensor:
        inside = window.slices_inside(label.level_shape(window.level))
        stored = pending()[0][inside].astype(np.int64)
        stored[np.isin(stored, config.ignore_labels)] = IGNORE
        check_label_values(label, stored[stored != IGNORE], config)
        classes = np.full(window.size, IGNORE, dtype=np.int64)
        classes[inside] = stored
        return torch.from_numpy(classes)

    return read


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

    def request(self, index: int) -> Callable[[], Stored]:
        """Draw a sample and ask for its pixels and labels (`Slide.request`).

        Returns:
            A function that gives the sample as it is stored, see `muvit.data.crops.stored`.
        """
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return finish(self.request(index)())

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Samples of a batch, all of which are asked for before the first is waited for."""
        if type(self).__getitem__ is not SlideCrops.__getitem__:  # a subclass of a user, with samples of its own
            return [self[index] for index in indices]
        return [finish(sample) for sample in self.as_stored().__getitems__(indices)]

    def as_stored(self) -> "StoredCrops":
        """This data set with samples as they are stored, to be finished on a device."""
        return StoredCrops(self)

    def request_placed(self, slide: int, placed: PlacedViews, recolor: PixelMap | None = None) -> Callable[[], Stored]:
        """Ask for a sample of placed views of one slide, at the boxes that they claim.

        Args:
            slide: its index.
            placed: the views.
            recolor: a change of the native pixels.

        Returns:
            A function that gives the stored sample: ``img``, ``bbox`` and, if there are labels, ``label``; with
            ``label_levels = "all"`` also ``labels``, int64 ``(L, *space)``: those of every view.
        """
        windows, boxes = placed.windows, [window.box for window in placed.windows]
        pixels = request_windows(self.images[slide], windows, self.config)
        labels = self._request_labels(slide, windows)

        def read() -> Stored:
            sample = self._put_together(slide, *pixels(), boxes, [label() for label in labels], recolor)
            return sample | {"bbox": placed.boxes.float()}

        return read

    def request_similar(
        self, slide: int, views: Sequence[SimilarView], recolor: PixelMap | None = None
    ) -> Callable[[], Stored]:
        """As `request_placed`, of scaled and rotated views."""
        pixels = request_similar(self.images[slide], views, self.config.padding)
        labels = self._request_labels(slide, [view.window for view in views])

        def read() -> Stored:
            sampled = [
                torch.from_numpy(view.sample(label().numpy(), linear=False))
                for view, label in zip(views, labels, strict=False)
            ]
            return self._put_together(slide, *pixels(), [view.box for view in views], sampled, recolor)

        return read

    def _request_labels(self, slide: int, windows: Sequence[Window]) -> list[Callable[[], Tensor]]:
        """The labels of the finest views, as many as a sample holds."""
        if not self.labels:
            return []
        labelled = windows[: len(self.config.labelled_levels)]
        return [request_label(self.labels[slide], window, self.config) for window in labelled]

    def _put_together(
        self,
        slide: int,
        pixels: np.ndarray,
        valid: np.ndarray,
        boxes: list[Tensor],
        labels: list[Tensor],
        recolor: PixelMap | None,
    ) -> Stored:
        pixels = pixels if recolor is None else recolor(pixels)
        sample, finite = to_stored(self.images[slide], pixels, valid, boxes, self.config)
        if finite is not None:
            for label, seen in zip(labels, torch.from_numpy(finite), strict=False):  # of the finest views
                label[~seen] = IGNORE
        if labels:
            sample["label"] = labels[0]
            if self.config.label_levels == "all":
                sample["labels"] = torch.stack(labels)
        return sample | self._facts(slide)

    def _facts(self, slide: int) -> dict[str, Tensor]:
        """Further entries of the samples of a slide."""
        return {}


class StoredCrops(Dataset[Stored]):
    """Samples of a data set of crops as they are stored, for batches that `muvit.data.crops.stored.finish` finishes.

    Args:
        crops: the data set.
    """

    def __init__(self, crops: SlideCrops) -> None:
        self.crops = crops

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> Stored:
        return self.crops.request(index)()

    def __getitems__(self, indices: Sequence[int]) -> list[Stored]:
        """Samples of a batch, all of which are asked for before the first is waited for."""
        return [read() for read in [self.crops.request(index) for index in indices]]


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
