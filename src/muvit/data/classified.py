"""Crops that know which slide they are from, and what class that slide is of: for classification."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from muvit.data.augment import Augmentation
from muvit.data.crops import CropConfig, GridCrops, SlideCrops
from muvit.data.sampling import Window, sample_nested
from muvit.data.slides import Slide
from muvit.errors import InputError

SlideChoice = Literal["slides", "classes"]
"""Which slide a random crop is from: each in turn, or one of a class that is drawn first."""


class ClassifiedTiles(GridCrops):
    """Every tile of every slide once, as `GridCrops`; samples also hold ``slide``, its number, and ``class``.

    Args:
        slides: the images.
        classes: class of each, from 0; None leaves it out of the samples.
        config: what a sample consists of.

    Raises:
        InputError: as `GridCrops`, or there are not as many classes as slides.
    """

    def __init__(self, slides: Sequence[Slide], classes: Sequence[int] | None, config: CropConfig) -> None:
        self.classes = _checked(classes, slides)
        super().__init__([(slide, None) for slide in slides], config)

    def read(self, slide: int, windows: Sequence[Window]) -> dict[str, Tensor]:
        """The sample at ``windows`` of one slide: ``img``, ``bbox``, ``slide`` and ``class``."""
        return super().read(slide, windows) | _facts(slide, self.classes)


class ClassifiedCrops(SlideCrops):
    """Random nested crops; samples also hold ``slide``, the number of their slide, and ``class``.

    Sample ``i`` depends on ``(seed, i)`` alone, for any ``i >= 0``, as in `NestedCrops`. Slides come in turn whatever
    their area, so that each has its say.

    Args:
        slides: the images.
        classes: class of each, from 0; None leaves it out of the samples.
        config: what a sample consists of.
        num_samples: what ``len`` says.
        seed: of everything random.
        choice: with ``classes``, a class is drawn first and then a slide of it, so that rare classes are seen as often.
        augmentation: applied to every sample (None: nothing).

    Raises:
        InputError: as `SlideCrops`, or an argument is out of range, or classes are missing.
    """

    def __init__(
        self,
        slides: Sequence[Slide],
        classes: Sequence[int] | None,
        config: CropConfig,
        *,
        num_samples: int,
        seed: int = 0,
        choice: SlideChoice = "slides",
        augmentation: Augmentation | None = None,
    ) -> None:
        if choice not in get_args(SlideChoice):
            raise InputError("choice", expected="slides or classes", got=repr(choice))
        if num_samples < 1 or seed < 0:
            got = f"{num_samples} samples and seed {seed}"
            raise InputError("num_samples and seed", expected="at least one sample, a seed >= 0", got=got)
        if choice == "classes" and classes is None:
            raise InputError("choice 'classes'", expected="slides with classes", got="slides without")
        self.classes = _checked(classes, slides)
        super().__init__([(slide, None) for slide in slides], config)
        self.num_samples, self.seed, self.choice, self.augmentation = num_samples, seed, choice, augmentation

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < 0:
            raise IndexError(f"sample numbers begin at 0, got {index}")
        rng = np.random.default_rng((self.seed, int(index)))
        slide = self._choose(int(index), rng)
        sample = self.read(slide, sample_nested(rng, self.shapes[slide], self.config.levels, self.config.size))
        return sample if self.augmentation is None else self.augmentation(sample, rng)

    def read(self, slide: int, windows: Sequence[Window]) -> dict[str, Tensor]:
        """The sample at ``windows`` of one slide: ``img``, ``bbox``, ``slide`` and ``class``."""
        return super().read(slide, windows) | _facts(slide, self.classes)

    def _choose(self, index: int, rng: np.random.Generator) -> int:
        if self.choice == "slides":
            return index % len(self.images)
        assert self.classes is not None  # the constructor has seen to it
        drawn = rng.choice(np.unique(self.classes))
        return int(rng.choice(np.flatnonzero(self.classes == drawn)))


def _facts(slide: int, classes: np.ndarray | None) -> dict[str, Tensor]:
    facts = {"slide": torch.tensor(slide)}
    return facts if classes is None else facts | {"class": torch.tensor(int(classes[slide]))}


def _checked(classes: Sequence[int] | None, slides: Sequence[Slide]) -> np.ndarray | None:
    if classes is not None and len(classes) != len(slides):
        raise InputError("classes", expected=f"{len(slides)}, one for each slide", got=len(classes))
    return None if classes is None else np.asarray(classes, dtype=np.int64)
