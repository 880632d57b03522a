"""Content of a report and its wording."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from muvit.errors import InputError, ShapeError
from muvit.evaluation.scores.bootstrap import Interval
from muvit.pictures import RGB, Color


def format_score(value: float) -> str:
    """A score with three decimals."""
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def format_count(number: int) -> str:
    """A large number in thousands or millions."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def format_duration(seconds: float) -> str:
    """A time in the units that suit it."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s"


def join_lines(parts: Iterable[str]) -> str:
    """Parts of a page, one per line."""
    return "\n".join(parts)


def list_names(names: Sequence[str]) -> str:
    """Names in a sentence: ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


_LOG = logging.getLogger(__name__)


@contextmanager
def warn_if_it_fails(what: str) -> Iterator[None]:
    """Turn an error into one warning: a page without this part is better than none."""
    try:
        yield
    except Exception as error:
        _LOG.warning("%s could not be drawn and is left out: %s", what, error)


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """A model and its scores: of one training, or means over trainings with several seeds."""

    name: str
    description: str
    """Difference from the others, one sentence."""
    dice: Mapping[str, float]
    """Dice of each scored foreground class by name, 0 to 1; NaN where a class neither occurs nor is predicted."""
    mean_dice: float
    """mDSC: mean over the foreground classes."""
    by_seed: Sequence[float] = ()
    """mDSC of each training, if there are several."""
    behind: Interval | None = None
    """Interval, over the test slides, of the mDSC of the model in question minus this one's; None if there is none."""
    behind_by_seed: Interval | None = None
    """The same over training seeds; None for a single one."""
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    """Training steps and values of each curve by name, as ``train_loss``, of the first seed; models share names to be
    drawn together."""
    seconds: float
    """Time of one training."""
    parameters: int
    """Trainable parameters."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A test image with its true and predicted labels, all of one size."""

    title: str
    image: RGB
    """``(H, W, 3)``, as `muvit.pictures.to_rgb` gives it."""
    truth: NDArray[np.integer]
    """``(H, W)``."""
    predictions: Mapping[str, NDArray[np.integer]]
    """``(H, W)`` of each model, by its name."""


def check_results(models: Sequence[ModelResult], class_names: Sequence[str], class_colors: Sequence[Color]) -> None:
    """Refuse results that do not belong together.

    Raises:
        InputError: there are no models, two of one name, or names, classes and colours do not fit together.
        ShapeError: a curve has not as many values as steps.
    """
    names = [model.name for model in models]
    if not models or len(set(names)) != len(names):
        raise InputError("models", expected="at least one, of different names", got=names)
    for model in models:
        classes = list(models[0].dice)
        if list(model.dice) != classes:
            raise InputError(f"dice of {model.name!r}", expected=f"the classes {classes}", got=list(model.dice))
        for curve, (steps, values) in model.curves.items():
            if len(steps) != len(values):
                raise ShapeError(f"{curve} of {model.name!r}", expected=f"{len(steps)} values", got=len(values))
    if len(class_names) != len(class_colors):
        raise InputError("class_colors", expected=f"{len(class_names)} colours, one per class", got=len(class_colors))


def check_example(example: Example, models: Sequence[ModelResult]) -> None:
    """Refuse an example without a prediction by each model, or with labels of another size.

    Raises:
        InputError: predictions and models differ.
        ShapeError: labels are not of the size of the image.
    """
    names = [model.name for model in models]
    if set(example.predictions) != set(names):
        expected, got = f"one of each model, {names}", [*example.predictions]
        raise InputError(f"predictions of {example.title!r}", expected=expected, got=got)
    shape = example.image.shape[:2]
    for name, labels in {"truth": example.truth, **example.predictions}.items():
        if labels.shape != shape:
            raise ShapeError(f"{name} of {example.title!r}", expected=f"{shape}, as its image", got=labels.shape)
