"""Data sets of crops: random ones for training (`NestedCrops`), every tile once for evaluation (`GridCrops`)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
from torch import Tensor

from muvit.data.crops.affine import Similarity, SimilarView
from muvit.data.crops.appearance import PixelMap
from muvit.data.crops.augment import Augmentation
from muvit.data.crops.balance import Balance, ForegroundIndex
from muvit.data.crops.placement import Window, draw_start
from muvit.data.crops.preprocessing import CropConfig
from muvit.data.crops.slide_crops import LabelledSlide, SlideCrops
from muvit.data.crops.stain import check_colors, white_of
from muvit.data.crops.stored import Stored, finish
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.geometry import box_center
from muvit.labels import BACKGROUND, IGNORE


class NestedCrops(SlideCrops):
    """Random crops for training, placed as ``config.placement`` says.

    With placement ``concentric`` all views have one centre, about which the augmentation may scale and rotate them.

    Sample ``i`` depends on ``(seed, i)`` alone, for any ``i >= 0``; epochs continue the count
    (`muvit.data.crops.balance.EpochSampler`). A slide is chosen with a probability proportional to its area (times
    its weight), so that every place is equally likely. With ``balance``, a fraction of the samples instead holds a
    foreground pixel in the finest view: any (``foreground``), or one of a class drawn first (``classes``); foreground
    is every class but the background (if there is one) and the ignored ones.

    Args:
        slides: images, with all levels of the config, and their label images; either all have labels or none has.
        config: contents of a sample.
        samples_per_epoch: length of the data set.
        seed: of everything random.
        augmentation: applied to every sample (None: nothing).
        balance: whether and how some samples are chosen to hold foreground.
        foreground_fraction: fraction of these samples.
        weights: factor of the probability of each slide, for balanced samples, too; by default 1.

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
        weights: Sequence[float] | None = None,
    ) -> None:
        if balance not in get_args(Balance):
            raise InputError("balance", expected=f"one of {', '.join(get_args(Balance))}", got=repr(balance))
        if not 0 <= foreground_fraction <= 1:
            raise InputError("foreground_fraction", expected="a number from 0 to 1", got=foreground_fraction)
        if samples_per_epoch < 1 or seed < 0:
            got = f"{samples_per_epoch} samples and seed {seed}"
            raise InputError("samples_per_epoch and seed", expected="at least one sample, a seed >= 0", got=got)
        weights = (1.0,) * len(slides) if weights is None else tuple(weights)
        if len(weights) != len(slides) or not all(0 < weight < math.inf for weight in weights):
            raise InputError("weights", expected=f"{len(slides)} numbers above 0, one for each slide", got=weights)
        super().__init__(slides, config)
        if augmentation is not None and augmentation.has_similarity and config.placement != "concentric":
            raise InputError(
                "scale and rotation_degrees of the augmentation",
                expected="views with one centre, placement concentric",
                got=f"placement {config.placement}",
            )
        if augmentation is not None and augmentation.has_colors:
            for image in self.images:
                check_colors(image, "hed, brightness, contrast, saturation and hue of the augmentation")
        self.samples_per_epoch = samples_per_epoch
        self.seed = seed
        self.augmentation = augmentation
        self.foreground_fraction = foreground_fraction
        if balance != "none" and not self.labels:
            raise InputError(f"balance '{balance}'", expected="slides with labels", got="slides without")
        found, level, ignored = self.locate_classes(), config.levels[0], self.config.ignore_labels
        others = (BACKGROUND, *ignored) if config.has_background else ignored
        self._foreground = (
            None
            if balance == "none"
            else ForegroundIndex(
                self.labels,
                [entry._replace(area=entry.area * weights[entry.slide]) for entry in found],
                level=level,
                balance=balance,
                not_foreground=others,
            )
        )
        self.seen_classes = {entry.value for entry in found} - set(ignored)
        """Classes that a coarse scan of the labels found; it may miss one of a few pixels."""
        areas = [math.prod(image.shape) * weight for image, weight in zip(self.images, weights, strict=True)]
        self._areas = np.cumsum(areas, dtype=np.float64)

    def __len__(self) -> int:
        return self.samples_per_epoch

    def request(self, index: int) -> Callable[[], Stored]:
        """As `SlideCrops.request`."""
        if index < 0:
            raise IndexError(f"sample numbers begin at 0, got {index}")
        rng = np.random.default_rng((self.seed, int(index)))
        slide, pixel = self._draw(int(index), rng)
        augmentation = self.augmentation
        similarity = Similarity() if augmentation is None else augmentation.draw_similarity(rng)
        recolor = self._draw_colors(slide, rng)
        if similarity.is_identity:
            read = self.request_placed(slide, self.place(slide, rng=rng, contains=pixel), recolor)
        else:
            read = self.request_similar(slide, self._place_similar(rng, slide, pixel, similarity), recolor)
        return read if augmentation is None else lambda: augmentation.draw(read(), rng)

    def slide_of(self, index: int) -> Slide:
        """The slide of a sample."""
        return self.images[self._draw(index, np.random.default_rng((self.seed, index)))[0]]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The samples of the first epoch (every index is valid, so that iterating over indices would not end)."""
        return (self[index] for index in range(len(self)))

    def read_plain(self, index: int) -> tuple[int, dict[str, Tensor]]:
        """Number of the slide of a sample, and the sample without augmentation, about the same centre."""
        rng = np.random.default_rng((self.seed, int(index)))
        slide, pixel = self._draw(int(index), rng)
        similarity = Similarity() if self.augmentation is None else self.augmentation.draw_similarity(rng)
        if similarity.is_identity:
            read = self.request_placed(slide, self.place(slide, rng=rng, contains=pixel))
        else:
            views = self._place_similar(rng, slide, pixel, similarity)
            read = self.request_similar(slide, [replace(view, similarity=Similarity()) for view in views])
        return slide, finish(read())

    def _place_similar(
        self, rng: np.random.Generator, slide: int, pixel: tuple[int, ...] | None, similarity: Similarity
    ) -> list[SimilarView]:
        """Scaled and rotated views of one centre; not rotated if the pixel that they must hold would leave them."""
        config = self.config
        extent = similarity.extent(config.size)
        start = draw_start(rng, self.shapes[slide][0], extent, contains=pixel)
        center = tuple(box_center(Window(config.levels[0], start, extent).box).tolist())
        views = [SimilarView(level, center, config.size, similarity) for level in config.levels]
        if pixel is not None and not views[0].shows(pixel):
            views = [replace(view, similarity=Similarity(similarity.scale)) for view in views]
        return views

    def _draw_colors(self, slide: int, rng: np.random.Generator) -> PixelMap | None:
        if self.augmentation is None or not self.augmentation.has_colors:
            return None
        # a generator of its own, so that all else is drawn as without
        return self.augmentation.draw_colors(rng.spawn(1)[0], self.n_levels, white_of(self.images[slide]))

    def _draw(self, index: int, rng: np.random.Generator) -> tuple[int, tuple[int, ...] | None]:
        """Index of the slide of a sample and, if it is a balanced one, a foreground pixel of it."""
        if self._foreground is not None and rng.random() < self.foreground_fraction:
            return self._foreground.draw(rng)
        return int(np.searchsorted(self._areas, rng.random() * self._areas[-1], side="right")), None


class GridCrops(SlideCrops):
    """Every slide once, tile by tile in row-major order, for evaluation.

    Coarse views are placed by the tile's place alone, as `place_views` does without a generator.

    The last tile of a row or column is moved back into the image; pixels that its neighbours hold too get the label
    `IGNORE`, so that every labelled pixel counts exactly once.

    Args:
        slides: images, with all levels of the config, and their label images; either all have labels or none has.
        config: contents of a sample.

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

    def request(self, index: int) -> Callable[[], Stored]:
        """As `SlideCrops.request`."""
        slide = self._slide_number(index)
        grid, shapes, size = self._grids[slide], self.shapes[slide], self.config.size
        tile = np.unravel_index(index - int(self._ends[slide]) + math.prod(grid), grid)
        unseen = [int(i) * n for i, n in zip(tile, size, strict=True)]
        start = [min(a, max(0, extent - n)) for a, extent, n in zip(unseen, shapes[0], size, strict=True)]
        pending = self.request_placed(slide, self.place(slide, start=start))

        def read() -> Stored:
            sample = pending()
            if self.labels:
                for axis, (a, b) in enumerate(zip(start, unseen, strict=True)):
                    sample["label"].narrow(axis, 0, b - a).fill_(IGNORE)
                if "labels" in sample:
                    sample["labels"][0] = sample["label"]
            return sample

        return read

    def slide_of(self, index: int) -> Slide:
        """The slide of a sample."""
        return self.images[self._slide_number(index)]

    def _slide_number(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample numbers are 0 to {len(self) - 1}, got {index}")
        return int(np.searchsorted(self._ends, index, side="right"))
