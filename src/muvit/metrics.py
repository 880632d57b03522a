"""Overlap scores from a confusion matrix (MuViT section 4.2): exact, additive over tiles, slides and devices."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muvit.errors import InputError


def confusion_matrix(
    truth: NDArray[np.integer], prediction: NDArray[np.integer], num_classes: int, ignore: Sequence[int] = ()
) -> NDArray[np.int64]:
    """Count pixels, ``(num_classes, num_classes)`` int64: rows the true class, columns the predicted one.

    Args:
        truth: integer labels of any shape.
        prediction: integer labels of the same shape.
        num_classes: classes, background included.
        ignore: values of ``truth`` that count nowhere.

    Raises:
        InputError: the shapes differ, or a counted label is not a class.
    """
    if truth.shape != prediction.shape:
        raise InputError("prediction", expected=f"the shape of the truth, {truth.shape}", got=prediction.shape)
    counted = ~np.isin(truth, tuple(ignore))
    true, guessed = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
    for name, labels in (("truth", true), ("prediction", guessed)):
        if labels.size and not (labels.min() >= 0 and labels.max() < num_classes):
            raise InputError(
                name, expected=f"labels 0 to {num_classes - 1}", got=f"labels {labels.min()} to {labels.max()}"
            )
    return np.bincount(true * num_classes + guessed, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """Scores of each class and their means over the foreground classes (background, class 0, left out).

    A class that neither occurs nor is predicted has no score: NaN, and left out of the means.
    """

    dice: NDArray[np.float64]
    """``2 |P & G| / (|P| + |G|)`` of each class."""
    iou: NDArray[np.float64]
    """``|P & G| / |P | G|`` of each class."""
    accuracy: float
    """Share of the counted pixels that are right, background included."""

    @property
    def mean_dice(self) -> float:
        """mDSC: plain mean over the foreground classes."""
        return _mean(self.dice[1:])

    @property
    def mean_iou(self) -> float:
        """Mean intersection over union over the foreground classes."""
        return _mean(self.iou[1:])


def scores(confusion: NDArray[np.int64]) -> Scores:
    """Scores of a confusion matrix ``(K, K)``, rows the truth."""
    hits = np.diag(confusion).astype(np.float64)
    total = confusion.sum(0) + confusion.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Scores(
            dice=2 * hits / total,
            iou=hits / (total - hits),
            accuracy=float(hits.sum() / confusion.sum()),
        )


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
