"""Scores of predicted label slides against true ones, read block by block: exact, in bounded memory."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muvit.data.slides import Slide
from muvit.errors import InputError
from muvit.metrics import Scores, confusion_matrix, scores

_BLOCK_PIXELS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class SlideConfusion:
    """What was counted on one slide."""

    name: str
    """Name of the true slide."""
    confusion: NDArray[np.int64]
    """Pixels ``(K, K)``: rows the true class, columns the predicted one."""

    @property
    def scores(self) -> Scores:
        """Scores on this slide alone."""
        return scores(self.confusion)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores on a set of slides, of each slide and of all together. Class 0 is the background."""

    class_names: tuple[str, ...]
    """Name of each class, background first."""
    slides: tuple[SlideConfusion, ...]
    """Each slide's confusion matrix."""

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Pixels of all slides together, ``(K, K)``: rows the true class, columns the predicted one."""
        return np.sum([slide.confusion for slide in self.slides], axis=0)

    @property
    def pooled(self) -> Scores:
        """Scores of all pixels together, as if the slides were one (Synthetic and Mouse, MuViT section 4.2)."""
        return scores(self.confusion)

    @property
    def mean_slide_dice(self) -> float:
        """Mean over the slides of each slide's mDSC (KPIS); slides without any foreground are left out."""
        values = [slide.scores.mean_dice for slide in self.slides]
        known = [value for value in values if not isnan(value)]
        return float(np.mean(known)) if known else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a score that does not exist is None."""
        return {
            "class_names": list(self.class_names),
            "pooled": self._score_dict(self.pooled),
            "mean_slide_dice": _number(self.mean_slide_dice),
            "slides": {slide.name: self._score_dict(slide.scores) for slide in self.slides},
            "confusion": self.confusion.tolist(),
        }

    def table(self) -> list[dict[str, str | float]]:
        """Dice as rows for a table, one per slide and a last one, ``all``, of all pixels together.

        Columns: ``slide``, the foreground classes by name, ``mDSC``. A score that does not exist is NaN.
        """
        rows = [(slide.name, slide.scores) for slide in self.slides] + [("all", self.pooled)]
        return [
            {"slide": name}
            | dict(zip(self.class_names[1:], row.dice[1:].tolist(), strict=True))
            | {"mDSC": row.mean_dice}
            for name, row in rows
        ]

    def _score_dict(self, values: Scores) -> dict[str, Any]:
        return {
            "mean_dice": _number(values.mean_dice),
            "mean_iou": _number(values.mean_iou),
            "accuracy": _number(values.accuracy),
            "dice": dict(zip(self.class_names, map(_number, values.dice.tolist()), strict=True)),
            "iou": dict(zip(self.class_names, map(_number, values.iou.tolist()), strict=True)),
        }


def evaluate_slides(
    pairs: Sequence[tuple[Slide, Slide]],
    num_classes: int,
    *,
    ignore: Sequence[int] = (),
    class_names: Sequence[str] | None = None,
) -> Evaluation:
    """Compare label slides pixel by pixel at their finest level.

    Args:
        pairs: predicted and true labels of each slide.
        num_classes: classes, background included.
        ignore: values of the true labels that count nowhere.
        class_names: one per class, by default their numbers.

    Raises:
        InputError: there are no pairs, two slides have one name, a pair differs in shape, a slide holds no labels, or a
            counted label is no class; names the file.
    """
    names = tuple(map(str, range(num_classes))) if class_names is None else tuple(class_names)
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise InputError("class_names", expected=f"{num_classes} different names", got=names)
    if not pairs:
        raise InputError("slides", expected="at least one prediction with its truth", got="none")
    seen: dict[str, Slide] = {}
    for prediction, truth in pairs:
        _check_pair(prediction, truth)
        if truth.name in seen:
            raise InputError(truth.path, expected="slides of different names", got=f"also {seen[truth.name].path}")
        seen[truth.name] = truth
    counted = tuple(
        SlideConfusion(name=truth.name, confusion=_count(prediction, truth, num_classes, ignore))
        for prediction, truth in pairs
    )
    return Evaluation(class_names=names, slides=counted)


def _check_pair(prediction: Slide, truth: Slide) -> None:
    for slide in (prediction, truth):
        if slide.num_channels != 1 or slide.dtype.kind not in "iu":
            got = f"{slide.num_channels} channels of {slide.dtype}"
            raise InputError(slide.path, expected="labels: one channel of integers", got=got)
    if prediction.shape != truth.shape:
        raise InputError(
            prediction.path, expected=f"shape {truth.shape}, as {truth.path} has", got=f"shape {prediction.shape}"
        )


def _count(prediction: Slide, truth: Slide, num_classes: int, ignore: Sequence[int]) -> NDArray[np.int64]:
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for start, size in _blocks(truth.shape):
        true, guessed = (slide.read(1, start, size)[0] for slide in (truth, prediction))
        counted = ~np.isin(true, tuple(ignore))
        for slide, labels in ((truth, true), (prediction, guessed)):
            wrong = labels[counted & ((labels < 0) | (labels >= num_classes))]
            if wrong.size:
                raise InputError(
                    f"{slide.path}, block at {start}",
                    expected=f"labels 0 to {num_classes - 1}" + (f" or {tuple(ignore)} (ignored)" if ignore else ""),
                    got=int(wrong[0]),
                )
        confusion += confusion_matrix(true, guessed, num_classes, ignore)
    return confusion


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Start and size of cubes that cover an image; sides are powers of two, as chunks of pyramids mostly are."""
    side = 1 << ((_BLOCK_PIXELS.bit_length() - 1) // len(shape))
    for start in itertools.product(*(range(0, extent, side) for extent in shape)):
        yield start, tuple(min(side, extent - a) for a, extent in zip(start, shape, strict=True))


def _number(value: float) -> float | None:
    return None if isnan(value) else value
