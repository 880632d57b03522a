"""Crops with the index and the class of their slide, for classification."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from muvit.data.crops.augment import Augmentation
from muvit.data.crops.crops import GridCrops, NestedCrops
from muvit.data.crops.preprocessing import CropConfig
from muvit.data.slides.slide import Slide
from muvit.errors import InputError

SlideChoice = Literal["slides", "classes"]
"""Slide of a random crop: each in turn, or one of a class that is drawn first."""


class ClassifiedTiles(GridCrops):
    """Every tile of every slide once, as `GridCrops`; samples also hold ``slide``, its index, and ``class``.

    Args:
        slides: the images.
        classes: class of each, from 0; None leaves it out of the samples.
        config: contents of a sample.

    Raises:
        InputError: as `GridCrops`, or there are not as many classes as slides.
    """

    def __init__(self, slides: Sequence[Slide], classes: Sequence[int] | None, config: CropConfig) -> None:
        self.classes = _checked(classes, slides)
        super().__init__([(slide, None) for slide in slides], config)

    def _facts(self, slide: int) -> dict[str, Tensor]:
        return _facts(slide, self.classes)


class ClassifiedCrops(NestedCrops):
    """Random crops as `NestedCrops`; samples also hold ``slide``, the index of their slide, and ``class``.

    Slides come in turn, so that all are sampled equally often, regardless of their area.

    Args:
        slides: the images.
        classes: class of each, from 0; None leaves it out of the samples.
        config: contents of a sample.
        num_samples: length of the data set.
        seed: of everything random.
        choice: with ``classes``, a class is drawn first and then a slide of it, so that rare classes are seen as often.
        augmentation: applied to every sample (None: nothing).

    Raises:
        InputError: as `NestedCrops`, or an argument is out of range, or classes are missing.
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
        self.choice = choice
        super().__init__(
            [(slide, None) for slide in slides],
            config,
            samples_per_epoch=num_samples,
            seed=seed,
            augmentation=augmentation,
        )

    def _facts(self, slide: int) -> dict[str, Tensor]:
        return _facts(slide, self.classes)

    def _draw(self, index: int, rng: np.random.Generator) -> tuple[int, None]:
        """Index of the slide of a sample, without a pixel that it must hold."""
        if self.choice == "slides":
            return index % len(self.images), None
        assert self.classes is not None  # checked in the constructor
        drawn = rng.choice(np.unique(self.classes))
        return int(rng.choice(np.flatnonzero(self.classes == drawn))), None


def _facts(slide: int, classes: np.ndarray | None) -> dict[str, Tensor]:
    facts = {"slide": torch.tensor(slide)}
    return facts if classes is None else facts | {"class": torch.tensor(int(classes[slide]))}


def _checked(classes: Sequence[int] | None, slides: Sequence[Slide]) -> np.ndarray | None:
    if classes is not None and len(classes) != len(slides):
        raise InputError("classes", expected=f"{len(slides)}, one for each slide", got=len(classes))
    return None if classes is None else np.asarray(classes, dtype=np.int64)
