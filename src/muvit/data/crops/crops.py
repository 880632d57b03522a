"""Data sets that cut nested crops out of slides, reading only the windows they need."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from muvit.data.crops.affine import Similarity, SimilarView, read_similar
from muvit.data.crops.augment import Augmentation
from muvit.data.crops.balance import Balance, ClassPixels, ForegroundIndex, locate_classes
from muvit.data.crops.dataset import MuViTDataset
from muvit.data.crops.normalize import Normalization, Percentile
from muvit.data.crops.placement import (
    ContextPlace,
    FreeViews,
    Window,
    centered_nested,
    concentric,
    sample_free,
    sample_nested,
    sample_start,
    tile_generator,
)
from muvit.data.slides.slide import Padding, Slide
from muvit.errors import InputError
from muvit.geometry import box_center
from muvit.labels import BACKGROUND, IGNORE
from muvit.levels import Level, check_levels, plain_level

LabelledSlide = tuple[Slide, Slide | None]
"""An image and its label image (None: no labels)."""

LabelLevels = Literal["finest", "all"]


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """What one sample consists of."""

    levels: tuple[Level, ...]
    """Downsampling factors of the views, finest first; each must be stored in every slide."""
    size: tuple[int, ...]
    """Pixels of every view, (t)(z)yx."""
    normalization: Normalization = field(default_factory=Percentile)
    """How native pixel values become the model's."""
    padding: Padding = "zero"
    """What a view shows outside the image: 0 after normalisation and augmentation, the nearest pixel, or the mirrored
    image."""
    num_classes: int | None = None
    """Classes of the labels, background included; required with labels, whose values must be smaller."""
    ignore_labels: tuple[int, ...] = ()
    """Label values that count as no class at all."""
    has_background: bool = True
    """Whether class 0 is background; else all classes are foreground."""
    label_levels: LabelLevels = "finest"
    """Views whose labels a sample holds: the finest, or each view at its own level, which the labels must store."""
    free_views: FreeViews | None = None
    """Where the coarser views lie if they need not hold the finest; unset, every view holds the next finer one."""
    context: ContextPlace = "random"
    """Where they lie else: anywhere around the finest, but in the image (random; tiles have them centred as well as the
    image allows), or centred on the finest, also beyond the image (centered)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(map(plain_level, self.levels)))
        check_levels(self.levels, len(self.size))
        if not self.size or not all(isinstance(n, int) and n > 0 for n in self.size):
            raise InputError("size", expected="a positive number of pixels for each axis", got=self.size)
        if self.padding not in get_args(Padding):
            raise InputError("padding", expected=f"one of {', '.join(get_args(Padding))}", got=repr(self.padding))
        if self.label_levels not in get_args(LabelLevels):
            raise InputError("label_levels", expected="finest or all", got=repr(self.label_levels))
        if self.context not in get_args(ContextPlace):
            raise InputError("context", expected="random or centered", got=repr(self.context))
        if self.context == "centered" and self.free_views is not None:
            raise InputError("context", expected="random, as views are free", got="centered")
        offsets = None if self.free_views is None else self.free_views.offset_px
        if offsets is not None and len(offsets) != len(self.size):
            raise InputError("offset_px", expected=f"a range for each of {len(self.size)} axes", got=offsets)

    @property
    def labelled_levels(self) -> tuple[Level, ...]:
        """Levels whose labels a sample holds."""
        return self.levels if self.label_levels == "all" else self.levels[:1]


def read_views(slide: Slide, windows: Sequence[Window], config: CropConfig) -> dict[str, Tensor]:
    """Read the views of one sample.

    Args:
        slide: the image.
        windows: one crop per level; they may leave the image.
        config: normalisation and padding. Padding does not enter the percentiles of `Percentile`.

    Returns:
        ``img``: float32 ``(L, C, *space)``; ``bbox``: float32 ``(L, 2, ndim)``, the true boxes in world pixels, also
        where a view leaves the image.
    """
    return _plain(_read_windows(slide, windows, config))


def _read_windows(slide: Slide, windows: Sequence[Window], config: CropConfig) -> dict[str, Tensor]:
    """The sample of `read_views`, with ``inside`` under zero padding."""
    views = list(zip(config.levels, windows, strict=True))
    pixels = np.stack([slide.read(level, w.start, w.size, padding=config.padding) for level, w in views])
    valid = np.zeros((len(views), *config.size), dtype=bool)
    for inside, (level, window) in zip(valid, views, strict=True):
        inside[window.slices_inside(slide.level_shape(level))] = True
    return _sample(pixels.astype(np.float32), valid, [w.box for w in windows], config)


def _sample(pixels: np.ndarray, valid: np.ndarray, boxes: list[Tensor], config: CropConfig) -> dict[str, Tensor]:
    """Normalised ``img`` and ``bbox``, from native pixels ``(L, C, *space)`` and whether they lie in the image.

    Under zero padding also ``inside``, bool ``(L, *space)``, for the augmentation, to leave the padding as it is.
    """
    img = config.normalization(pixels, valid)
    sample = {"img": torch.from_numpy(img), "bbox": torch.stack(boxes).float()}
    if config.padding == "zero":
        img *= valid[:, None]
        sample["inside"] = torch.from_numpy(valid)
    return sample


def _plain(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """A sample as models take it."""
    return {name: value for name, value in sample.items() if name != "inside"}


def read_label(label: Slide, window: Window, config: CropConfig) -> Tensor:
    """Read the labels of a view: int64 ``(*space)``, `IGNORE` outside the image and at ignored labels.

    Raises:
        InputError: a value is no class and not ignored.
    """
    inside = window.slices_inside(label.level_shape(window.level))
    stored = label.read(window.level, window.start, window.size)[0][inside].astype(np.int64)
    stored[np.isin(stored, config.ignore_labels)] = IGNORE
    _check_label_values(label, stored[stored != IGNORE], config)
    classes = np.full(window.size, IGNORE, dtype=np.int64)
    classes[inside] = stored
    return torch.from_numpy(classes)


class SlideCrops(MuViTDataset):
    """What the data sets of this module share: checked slides, and reading a sample from one of them.

    Args:
        slides: images with their label images; either all have labels or none has.
        config: what a sample consists of.

    Raises:
        InputError: the slides do not fit each other or the config.
    """

    def __init__(self, slides: Sequence[LabelledSlide], config: CropConfig) -> None:
        _check_slides(slides, config)
        self.config = config
        self.images = tuple(image for image, _ in slides)
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

    def locate_classes(self) -> list[ClassPixels]:
        """Look coarsely at all labels, before any work starts (every crop is looked at again when it is read).

        Raises:
            InputError: a label value is no class and not ignored.
        """
        located = []
        for i, label in enumerate(self.labels):
            found = locate_classes(i, label, self.config.levels[0])
            values = np.array([entry.value for entry in found])
            _check_label_values(label, values[~np.isin(values, self.config.ignore_labels)], self.config)
            located += found
        return located

    def read(self, slide: int, windows: Sequence[Window]) -> dict[str, Tensor]:
        """The sample at ``windows`` of one slide: ``img``, ``bbox`` and, if there are labels, ``label``.

        With ``label_levels = "all"`` also ``labels``, int64 ``(L, *space)``: those of every view. Under zero padding
        also ``inside``, bool ``(L, *space)``: whether pixels lie in the image.
        """
        config = self.config
        sample = _read_windows(self.images[slide], windows, config)
        if self.labels:
            labels = [read_label(self.labels[slide], w, config) for w in windows[: len(config.labelled_levels)]]
            self._put_labels(sample, labels)
        return sample

    def read_similar(self, slide: int, views: Sequence[SimilarView]) -> dict[str, Tensor]:
        """The sample of scaled and turned views of one slide, as `read` gives that of windows."""
        config = self.config
        pixels, valid = read_similar(self.images[slide], views, config.padding)
        sample = _sample(pixels, valid, [view.box for view in views], config)
        if self.labels:
            labels = []
            for view in views[: len(config.labelled_levels)]:
                stored = read_label(self.labels[slide], view.window, config).numpy()
                labels.append(torch.from_numpy(view.sample(stored, linear=False)))
            self._put_labels(sample, labels)
        return sample

    def _put_labels(self, sample: dict[str, Tensor], labels: list[Tensor]) -> None:
        sample["label"] = labels[0]
        if self.config.label_levels == "all":
            sample["labels"] = torch.stack(labels)

    def read_free(
        self, rng: np.random.Generator, slide: int, start: Sequence[int], free: FreeViews
    ) -> dict[str, Tensor]:
        """The sample whose finest view starts at ``start`` and whose other views are drawn freely."""
        config = self.config
        draws = (sample_free(rng, start, self.shapes[slide], config.levels, config.size, free) for _ in range(2))
        sample = self.read(slide, next(draws))
        if free.boxes == "shuffled":
            sample["bbox"][1:] = torch.stack([window.box for window in next(draws)])[1:]
        return sample


class NestedCrops(SlideCrops):
    """Random crops for training: each view lies inside the next coarser one, or, with ``free_views``, where it likes.

    With ``context = "centered"`` all views have one centre, about which the augmentation may scale and turn them.

    Sample ``i`` depends on ``(seed, i)`` alone, for any ``i >= 0``; epochs go on counting (`EpochSampler`). A slide is
    chosen with a probability proportional to its area, so that every place is equally likely. With ``balance``, a part
    of the samples instead holds a foreground pixel in the finest view: any (``foreground``), or one of a class drawn
    first (``classes``); foreground is every class but the background (if there is one) and the ignored ones.

    Args:
        slides: images with their label images; either all have labels or none has.
        config: what a sample consists of.
        samples_per_epoch: what ``len`` says.
        seed: of everything random.
        augmentation: applied to every sample (None: nothing).
        balance: whether and how some samples are made to hold foreground.
        foreground_fraction: which part of them.

    Raises:
        InputError: as `SlideCrops`, or an argument is out of range, or there is no foreground to balance.
    """

    def __init__(
        self,
        slides: Sequence[LabelledSlide],
        config: CropConfig,
        *,
        samples_per_epoch: int = 4096,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        balance: Balance = "none",
        foreground_fraction: float = 0.5,
    ) -> None:
        if balance not in get_args(Balance):
            raise InputError("balance", expected=f"one of {', '.join(get_args(Balance))}", got=repr(balance))
        if not 0 <= foreground_fraction <= 1:
            raise InputError("foreground_fraction", expected="a number from 0 to 1", got=foreground_fraction)
        if samples_per_epoch < 1 or seed < 0:
            got = f"{samples_per_epoch} samples and seed {seed}"
            raise InputError("samples_per_epoch and seed", expected="at least one sample, a seed >= 0", got=got)
        super().__init__(slides, config)
        if augmentation is not None and augmentation.has_similarity and config.context != "centered":
            raise InputError(
                "scale and rotation_degrees of the augmentation",
                expected="views with one centre, context centered",
                got=f"context {config.context}" if config.free_views is None else "free views",
            )
        self.samples_per_epoch = samples_per_epoch
        self.seed = seed
        self.augmentation = augmentation
        self.foreground_fraction = foreground_fraction
        if balance != "none" and not self.labels:
            raise InputError(f"balance '{balance}'", expected="slides with labels", got="slides without")
        found, level, ignored = self.locate_classes(), config.levels[0], config.ignore_labels
        others = (BACKGROUND, *ignored) if config.has_background else ignored
        self._foreground = (
            None
            if balance == "none"
            else ForegroundIndex(self.labels, found, level=level, balance=balance, not_foreground=others)
        )
        self.seen_classes = {entry.value for entry in found} - set(ignored)
        """Classes that a coarse look at the labels found; one of a few pixels may have escaped it."""
        self._areas = np.cumsum([math.prod(image.shape) for image in self.images], dtype=np.float64)

    def __len__(self) -> int:
        return self.samples_per_epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < 0:
            raise IndexError(f"sample numbers begin at 0, got {index}")
        rng = np.random.default_rng((self.seed, int(index)))
        slide, pixel = self._draw(int(index), rng)
        config, shapes = self.config, self.shapes[slide]
        if config.context == "centered":
            sample = self._read_centered(rng, slide, pixel)
        elif config.free_views is None:
            sample = self.read(slide, sample_nested(rng, shapes, config.levels, config.size, contains=pixel))
        else:
            start = sample_start(rng, shapes[0], config.size, contains=pixel)
            sample = self.read_free(rng, slide, start, config.free_views)
        return _plain(sample if self.augmentation is None else self.augmentation(sample, rng))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The samples of the first epoch (any number is a valid index, so counting up would not end)."""
        return (self[index] for index in range(len(self)))

    def _read_centered(self, rng: np.random.Generator, slide: int, pixel: tuple[int, ...] | None) -> dict[str, Tensor]:
        """A sample of views of one centre; a turn that would lose the pixel that it shall hold is left out."""
        config, shape = self.config, self.shapes[slide][0]
        similarity = Similarity() if self.augmentation is None else self.augmentation.draw_similarity(rng)
        extent = similarity.extent(config.size)
        start = sample_start(rng, shape, extent, contains=pixel)
        if similarity.is_identity:
            return self.read(slide, concentric(start, config.levels, config.size))
        center = tuple(box_center(Window(config.levels[0], start, extent).box).tolist())

        def views(similarity: Similarity) -> list[SimilarView]:
            return [SimilarView(level, center, config.size, similarity) for level in config.levels]

        turned = views(similarity)
        is_lost = pixel is not None and not turned[0].shows(pixel)
        return self.read_similar(slide, views(Similarity(similarity.scale)) if is_lost else turned)

    def _draw(self, index: int, rng: np.random.Generator) -> tuple[int, tuple[int, ...] | None]:
        """Number of the slide of a sample and, if it shall be balanced, a foreground pixel of it."""
        if self._foreground is not None and rng.random() < self.foreground_fraction:
            return self._foreground.draw(rng)
        return int(np.searchsorted(self._areas, rng.random() * self._areas[-1], side="right")), None


class GridCrops(SlideCrops):
    """Every slide once, tile by tile in row-major order, for evaluation.

    Context is centred on the tile; free views (``config.free_views``) are drawn by the tile's place alone.

    The last tile of a row or column is moved back into the image; what its neighbours have shown already carries the
    label `IGNORE`, so that every labelled pixel counts exactly once.

    Args:
        slides: images with their label images; either all have labels or none has.
        config: what a sample consists of.

    Raises:
        InputError: as `SlideCrops`.
    """

    def __init__(self, slides: Sequence[LabelledSlide], config: CropConfig) -> None:
        super().__init__(slides, config)
        self.locate_classes()
        self._grids = [
            tuple(math.ceil(extent / n) for extent, n in zip(shapes[0], config.size, strict=True))
            for shapes in self.shapes
        ]
        self._ends = np.cumsum([math.prod(grid) for grid in self._grids])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample numbers are 0 to {len(self) - 1}, got {index}")
        slide = int(np.searchsorted(self._ends, index, side="right"))
        grid, shapes, size = self._grids[slide], self.shapes[slide], self.config.size
        tile = np.unravel_index(index - int(self._ends[slide]) + math.prod(grid), grid)
        unseen = [int(i) * n for i, n in zip(tile, size, strict=True)]
        start = [min(a, max(0, extent - n)) for a, extent, n in zip(unseen, shapes[0], size, strict=True)]
        free = self.config.free_views
        if self.config.context == "centered":
            sample = self.read(slide, concentric(start, self.config.levels, size))
        elif free is None:
            sample = self.read(slide, centered_nested(start, shapes, self.config.levels, size))
        else:
            sample = self.read_free(tile_generator(start), slide, start, free)
        if self.labels:
            for axis, (a, b) in enumerate(zip(start, unseen, strict=True)):
                sample["label"].narrow(axis, 0, b - a).fill_(IGNORE)
            if "labels" in sample:
                sample["labels"][0] = sample["label"]
        return _plain(sample)


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


def _check_label_values(label: Slide, values: np.ndarray, config: CropConfig) -> None:
    assert config.num_classes is not None  # _check_slides has seen to it
    wrong = values[(values < 0) | (values >= config.num_classes)]
    if wrong.size:
        ignored = f" or one of {list(config.ignore_labels)}" if config.ignore_labels else ""
        raise InputError(
            label.path,
            expected=f"label values from 0 to {config.num_classes - 1}{ignored}",
            got=int(wrong.flat[0]),
            hint="Raise num_classes, or list the value in ignore_labels.",
        )
