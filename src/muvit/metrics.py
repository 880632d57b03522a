"""Scores: of overlap, from a confusion matrix (MuViT section 4.2), additive over tiles, slides and devices; and of
probabilities, as the area under the ROC curve."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from muvit.errors import InputError
from muvit.labels import foreground


def confusion_matrix(
    truth: NDArray[np.integer], prediction: NDArray[np.integer], num_classes: int, ignore: Sequence[int] = ()
) -> NDArray[np.int64]:
    """Count pixels, ``(num_classes, num_classes)`` int64: rows the true class, columns the predicted one.

    Args:
        truth: integer labels of any shape.
        prediction: integer labels of the same shape.
        num_classes: classes, background included.
        ignore: values of ``truth`` that are left out.

    Raises:
        InputError: the shapes differ, or a counted label is not a class.
    """
    if truth.shape != prediction.shape:
        raise InputError("prediction", expected=f"the shape of the truth, {truth.shape}", got=prediction.shape)
    counted = ~np.isin(truth, tuple(ignore))
    true, predicted = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
    for name, labels in (("truth", true), ("prediction", predicted)):
        if labels.size and not (labels.min() >= 0 and labels.max() < num_classes):
            raise InputError(
                name, expected=f"labels 0 to {num_classes - 1}", got=f"labels {labels.min()} to {labels.max()}"
            )
    return np.bincount(true * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """Scores of each class, and their means over the foreground or over all classes.

    A class that neither occurs nor is predicted has no score, nor has an ignored one: NaN, and left out of the means.
    """

    dice: NDArray[np.float64]
    """``2 |P & G| / (|P| + |G|)`` of each class."""
    iou: NDArray[np.float64]
    """``|P & G| / |P | G|`` of each class."""
    accuracy: float
    """Fraction of the counted pixels that are right, background included."""
    has_background: bool = True
    """Whether class 0 is background; else all classes are foreground."""

    @property
    def mean_dice(self) -> float:
        """mDSC: plain mean over the foreground classes."""
        return mean_known(self.dice[foreground(self.has_background)])

    @property
    def mean_iou(self) -> float:
        """mIoU: mean intersection over union over all classes, background included."""
        return mean_known(self.iou)

    @property
    def mean_foreground_iou(self) -> float:
        """Mean intersection over union over the foreground classes."""
        return mean_known(self.iou[foreground(self.has_background)])


def scores(confusion: NDArray[np.int64], *, ignore: Sequence[int] = (), has_background: bool = True) -> Scores:
    """Scores of a confusion matrix ``(K, K)``, rows the truth.

    Args:
        confusion: pixels, from `confusion_matrix`.
        ignore: true values that were left out of it. Such a class has no score, even where it is predicted; a pixel of
            another class that it is predicted for is an error of that class.
        has_background: whether class 0 is background.
    """
    hits = np.diag(confusion).astype(np.float64)
    hits[np.isin(np.arange(len(hits)), tuple(ignore))] = np.nan
    total = confusion.sum(0) + confusion.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Scores(
            dice=2 * hits / total,
            iou=hits / (total - hits),
            accuracy=float(np.trace(confusion) / confusion.sum()),
            has_background=has_background,
        )


def one_vs_rest_auc(probabilities: NDArray[np.floating], classes: NDArray[np.integer]) -> NDArray[np.float64]:
    """Area under the ROC curve of each class against all others, ``(K)``.

    It is the share of pairs of a sample of the class and another in which the one of the class has the higher
    probability; ties count half. NaN for a class without samples, or with all of them.

    Args:
        probabilities: ``(N, K)``, or any scores in the same order.
        classes: the true class of each sample, ``(N)``.

    Raises:
        InputError: the shapes do not fit, or a class has no column.
    """
    if probabilities.ndim != 2 or classes.shape != probabilities.shape[:1]:
        got = f"{probabilities.shape} and {classes.shape}"
        raise InputError("probabilities and classes", expected="shapes (N, K) and (N)", got=got)
    num_classes = probabilities.shape[1]
    if classes.size and not (classes.min() >= 0 and classes.max() < num_classes):
        raise InputError("classes", expected=f"0 to {num_classes - 1}", got=f"{classes.min()} to {classes.max()}")
    belongs = classes[:, None] == np.arange(num_classes)
    inside = belongs.sum(0).astype(np.float64)
    ranks = rankdata(probabilities, axis=0) if len(classes) else np.zeros(probabilities.shape)
    with np.errstate(invalid="ignore"):
        return ((ranks * belongs).sum(0) - inside * (inside + 1) / 2) / (inside * (len(classes) - inside))


def mean_known(values: NDArray[np.float64]) -> float:
    """Mean of the values that exist; NaN if none does."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def class_scores(probabilities: NDArray[np.floating], classes: NDArray[np.integer]) -> tuple[float, float]:
    """Accuracy, and the mean of the one-vs-all areas under the ROC curve (NaN if none exists).

    Args:
        probabilities: ``(N, K)``.
        classes: the true class of each sample, ``(N)``.
    """
    auc = one_vs_rest_auc(probabilities, classes)
    return float((probabilities.argmax(1) == classes).mean()), mean_known(auc)


def mean_of_slides(
    probabilities: NDArray[np.floating], classes: NDArray[np.integer], slides: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mean probabilities ``(S, K)`` of the crops of each slide, and its class ``(S)``; slides by ascending number.

    Args:
        probabilities: of the crops, ``(N, K)``.
        classes: class of each crop, that of its slide, ``(N)``.
        slides: number of the slide of each crop, ``(N)``.
    """
    found, first, index = np.unique(slides, return_index=True, return_inverse=True)
    sums = np.zeros((len(found), probabilities.shape[1]))
    np.add.at(sums, index, probabilities)
    return sums / np.bincount(index)[:, None], classes[first].astype(np.int64)
