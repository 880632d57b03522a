"""Scores of whole label slides, counted block by block, with intervals over slides."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muvit.data.slides.derived import match_grid, with_levels
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.evaluation.scores.bootstrap import BootstrapConfig, Interval, bootstrap_intervals
from muvit.evaluation.scores.boundaries import BoundaryConfig, BoundaryCounts, blocks, compare_boundaries, count_blocks
from muvit.labels import BACKGROUND
from muvit.levels import Level, check_levels, level_name, plain_level
from muvit.metrics import Scores, confusion_matrix, mean_known, scores
from muvit.progress import Progress


@dataclass(frozen=True, kw_only=True)
class SlideCounts:
    """Pixel counts of one slide."""

    name: str
    """Name of the true slide."""
    confusion: NDArray[np.int64]
    """Pixels ``(K, K)``: rows the true class, columns the predicted one."""
    coarse: tuple[NDArray[np.int64], ...] = ()
    """The same at each of the coarser levels that were scored."""
    boundaries: BoundaryCounts | None = None
    """Pixels along the outlines of the classes, if boundaries were compared."""
    hausdorff: NDArray[np.float64] | None = None
    """95th percentile of the Hausdorff distance of each class ``(K)``, NaN where it does not exist."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores on a set of slides, of each slide and of all together."""

    class_names: tuple[str, ...]
    """Name of each class."""
    slides: tuple[SlideCounts, ...]
    """Pixel counts of each slide."""
    has_background: bool = True
    """Whether class 0 is background, left out of the means over the foreground."""
    ignore: tuple[int, ...] = ()
    """True values that were left out; a class among them has no score, even if it is predicted."""
    missing: tuple[str, ...] = ()
    """Names of true slides that had no prediction, and are not among ``slides``."""
    levels: tuple[Level, ...] = ()
    """Coarser levels that were scored beside the finest."""
    boundary: BoundaryConfig | None = None
    """Settings of the comparison of boundaries; None if they were not compared."""

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Pixels of all slides together, ``(K, K)``: rows the true class, columns the predicted one."""
        return np.sum([slide.confusion for slide in self.slides], axis=0)

    @property
    def pooled(self) -> Scores:
        """Overlap scores of all pixels together, as if the slides were one (Synthetic and Mouse, MuViT section 4.2)."""
        return self._overlap(self.confusion)

    @cached_property
    def slide_scores(self) -> tuple[Scores, ...]:
        """Overlap scores on each slide alone."""
        return tuple(self._overlap(slide.confusion) for slide in self.slides)

    @property
    def scored(self) -> list[int]:
        """The classes that have scores: those that are not ignored."""
        return [value for value in range(len(self.class_names)) if value not in self.ignore]

    @property
    def foreground(self) -> list[int]:
        """The classes that have scores and are not background."""
        return [value for value in self.scored if value != BACKGROUND or not self.has_background]

    def names(self, values: Sequence[int]) -> list[str]:
        """Names of classes."""
        return [self.class_names[value] for value in values]

    @property
    def mean_slide_dice(self) -> float:
        """Mean over the slides of each slide's mDSC (KPIS); slides without any foreground are left out."""
        return self.summary()["mean_slide_dice"]

    def select(self, names: Sequence[str]) -> "Evaluation":
        """The same on some of the slides, without what is missing."""
        return replace(self, missing=(), slides=tuple(slide for slide in self.slides if slide.name in names))

    def summary(self, times: NDArray[np.int64] | None = None) -> dict[str, float]:
        """All scores of the slides together, by name; one that does not exist is NaN.

        ``dice/<class>``, ``iou/<class>`` and ``accuracy`` of the pooled pixels; ``mean_dice`` (mDSC) and
        ``mean_foreground_iou``, their means over the foreground; ``mean_iou`` (mIoU), that over all classes; and
        ``mean_slide_dice``. Of a coarser level 8 ``dice_level_8/<class>`` and ``mean_dice_level_8``. With boundaries
        also ``boundary_f1/<class>`` of all outlines together, ``hd95/<class>``, the mean over the slides that have one,
        and the means of both over the foreground. Ignored classes are left out.

        Args:
            times: how often each slide counts, ``(S)``; by default once.
        """
        times = np.ones(len(self.slides), np.int64) if times is None else times
        confusion = np.tensordot(times, [slide.confusion for slide in self.slides], 1)
        pooled = self._overlap(confusion)
        values = {
            "mean_dice": pooled.mean_dice,
            "mean_iou": pooled.mean_iou,
            "mean_foreground_iou": pooled.mean_foreground_iou,
            "accuracy": pooled.accuracy,
            "mean_slide_dice": _mean(np.array([alone.mean_dice for alone in self.slide_scores]), times),
        }
        per_class = {"dice": pooled.dice, "iou": pooled.iou}
        for level, scored in zip(self.levels, self._pool_levels(times), strict=True):
            values[f"mean_dice_level_{level_name(level)}"] = scored.mean_dice
            per_class[f"dice_level_{level_name(level)}"] = scored.dice
        if self.boundary is not None:
            per_class |= {"boundary_f1": self._pool_boundaries(times).f1, "hd95": self._mean_hausdorff(times)}
            values |= {f"mean_{name}": mean_known(per_class[name][self.foreground]) for name in ("boundary_f1", "hd95")}
        for name, numbers in per_class.items():
            values |= {f"{name}/{self.class_names[c]}": float(numbers[c]) for c in self.scored}
        return values

    def intervals(self, config: BootstrapConfig | None = None) -> dict[str, Interval]:
        """Bootstrap interval over the slides of every score of `summary`; NaN if there is a single slide."""
        return bootstrap_intervals(self.summary, len(self.slides), config)

    def to_dict(self, bootstrap: BootstrapConfig | None = None) -> dict[str, Any]:
        """Plain data for JSON; a score that does not exist is None.

        Args:
            bootstrap: how the intervals are drawn.
        """
        bootstrap = BootstrapConfig() if bootstrap is None else bootstrap
        intervals = self.intervals(bootstrap) if len(self.slides) > 1 else {}
        result = {
            "class_names": list(self.class_names),
            "has_background": self.has_background,
            "ignore": list(self.ignore),
            "missing": list(self.missing),
            "pooled": self._score_dict(self.summary()),
            "mean_slide_dice": _number(self.mean_slide_dice),
            "intervals": {name: [_number(v) for v in interval] for name, interval in intervals.items()},
            "coverage": bootstrap.coverage,
            "slides": {slide.name: self._score_dict(self.select([slide.name]).summary()) for slide in self.slides},
            "confusion": self.confusion.tolist(),
        }
        if self.boundary is not None:
            result["boundary"] = {"tolerance": self.boundary.tolerance, "unit": self.boundary.unit}
        return result

    def table(self) -> list[dict[str, str | float]]:
        """Dice as rows for a table, one per slide and a last one, ``all``, of all pixels together.

        Columns: ``slide``, the foreground classes by name, ``mDSC``. A score that does not exist is NaN.
        """
        names = [*(slide.name for slide in self.slides), "all"]
        shown = self.foreground
        return [
            {"slide": name}
            | dict(zip(self.names(shown), row.dice[shown].tolist(), strict=True))
            | {"mDSC": row.mean_dice}
            for name, row in zip(names, (*self.slide_scores, self.pooled), strict=True)
        ]

    def level_table(self) -> list[dict[str, str | float]]:
        """Dice of all pixels together at each level as rows for a table, the finest level first.

        Columns: ``level``, the foreground classes by name, ``mDSC``. A score that does not exist is NaN.
        """
        shown, found = self.foreground, [self.pooled, *self._pool_levels(np.ones(len(self.slides), np.int64))]
        return [
            {"level": level_name(level)}
            | dict(zip(self.names(shown), row.dice[shown].tolist(), strict=True))
            | {"mDSC": row.mean_dice}
            for level, row in zip((1, *self.levels), found, strict=True)
        ]

    def class_table(self) -> list[dict[str, str | float]]:
        """Scores of all pixels together as rows for a table, one per class, then their means.

        Columns: ``class``, ``Dice``, ``IoU``, with boundaries also ``boundary F1`` and ``HD95``. The last rows are
        ``mean of foreground``, if there is a background, and ``mean``, of all classes. A score that does not exist is
        NaN.
        """
        values = self.summary()
        titles = {"Dice": "dice", "IoU": "iou"}
        titles |= {} if self.boundary is None else {"boundary F1": "boundary_f1", "HD95": "hd95"}
        rows = {name: [name] for name in self.names(self.scored)}
        rows |= {"mean of foreground": self.names(self.foreground)} if self.has_background else {}
        rows |= {"mean": self.names(self.scored)}
        return [
            {"class": title}
            | {column: mean_known(np.array([values[f"{score}/{c}"] for c in of])) for column, score in titles.items()}
            for title, of in rows.items()
        ]

    def rows(self, bootstrap: BootstrapConfig | None = None) -> list[dict[str, str | float]]:
        """Every score as a row of a CSV file.

        Columns: ``slide`` (``all`` for all together), ``score``, ``class``, ``value``, and for all together the bounds
        ``low`` and ``high`` of its interval. A slide without a prediction has the score ``missing``.
        """
        table = [_row(name, "missing", float("nan")) for name in self.missing]
        for slide in self.slides:
            alone = self.select([slide.name]).summary()
            table += [_row(slide.name, name, v) for name, v in alone.items() if name != "mean_slide_dice"]
        intervals = self.intervals(bootstrap)
        return table + [_row("all", name, value, intervals[name]) for name, value in self.summary().items()]

    def _overlap(self, confusion: NDArray[np.int64]) -> Scores:
        return scores(confusion, ignore=self.ignore, has_background=self.has_background)

    def _pool_levels(self, times: NDArray[np.int64]) -> list[Scores]:
        """Overlap scores of all pixels together at each of the coarser levels."""
        at_levels = zip(*(slide.coarse for slide in self.slides), strict=True)
        return [self._overlap(np.tensordot(times, confusions, 1)) for confusions in at_levels]

    def _pool_boundaries(self, times: NDArray[np.int64]) -> BoundaryCounts:
        counted = [slide.boundaries for slide in self.slides if slide.boundaries is not None]
        return BoundaryCounts(
            **{
                name: np.tensordot(times, [getattr(counts, name) for counts in counted], 1)
                for name in BoundaryCounts.__dataclass_fields__
            }
        )

    def _mean_hausdorff(self, times: NDArray[np.int64]) -> NDArray[np.float64]:
        distances = np.array([slide.hausdorff for slide in self.slides])
        return np.array([_mean(column, times) for column in distances.T])

    def _score_dict(self, values: Mapping[str, float]) -> dict[str, Any]:
        """A summary with the classes of a score in a dictionary of their own."""
        nested: dict[str, Any] = {}
        for name, value in values.items():
            score, _, class_name = name.partition("/")
            if class_name:
                nested.setdefault(score, {})[class_name] = _number(value)
            else:
                nested[score] = _number(value)
        del nested["mean_slide_dice"]  # which is no score of pooled pixels, nor of a single slide
        return nested


def evaluate_slides(
    pairs: Sequence[tuple[Slide, Slide]],
    num_classes: int,
    *,
    ignore: Sequence[int] = (),
    class_names: Sequence[str] | None = None,
    has_background: bool = True,
    levels: Sequence[Level] = (),
    boundary: BoundaryConfig | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare label slides pixel by pixel at the finest level of the true labels.

    Predictions on another grid, as of a model with a pixel size, are read on that of the true labels, if both state
    their pixel sizes.

    Args:
        pairs: predicted and true labels of each slide.
        num_classes: classes, background included.
        ignore: true values that are left out, so that such a class has no score, beside the `Slide.ignored_labels` of
            the true labels.
        class_names: one per class, by default their numbers.
        has_background: whether class 0 is background.
        levels: coarser levels to score as well: true and predicted labels are both read there, where a pixel is the
            majority vote of the finest ones that it covers (or what the store of other make has there). What is wrong
            along outlines alone is right again from some level on.
        boundary: how to compare the outlines of the classes; None leaves them out.
        progress: called after each block.

    Raises:
        InputError: there are no pairs, two slides have one name, a pair differs in shape, a slide holds no labels, or a
            counted label is no class; names the file. Or a level is neither stored nor a whole multiple of one that is,
            or not coarser than the finest. Also what `compare_boundaries` raises.
    """
    names = tuple(map(str, range(num_classes))) if class_names is None else tuple(class_names)
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise InputError("class_names", expected=f"{num_classes} different names", got=names)
    if not pairs:
        raise InputError("slides", expected="at least one prediction with its truth", got="none")
    pairs = [(match_grid(prediction, truth), truth) for prediction, truth in pairs]
    seen: dict[str, Slide] = {}
    for prediction, truth in pairs:
        _check_pair(prediction, truth)
        if truth.name in seen:
            raise InputError(truth.path, expected="slides of different names", got=f"also {seen[truth.name].path}")
        seen[truth.name] = truth
    ignore = (*ignore, *{value for _, truth in pairs for value in truth.ignored_labels})
    coarse = _coarser_levels(levels, pairs[0][1].ndim)
    pairs = [
        (with_levels(prediction, coarse, "label"), with_levels(truth, coarse, "label")) for prediction, truth in pairs
    ]
    total = sum(count_blocks(_common_shape(*pair, level)) for pair in pairs for level in (1, *coarse))
    done, counted = 0, []
    for prediction, truth in pairs:
        confusions = np.zeros((1 + len(coarse), num_classes, num_classes), np.int64)
        for level, confusion in zip((1, *coarse), confusions, strict=True):
            for part in _confusions(prediction, truth, num_classes, ignore, level):
                confusion += part
                done += 1
                if progress is not None:
                    progress(done, total)
        slide = SlideCounts(name=truth.name, confusion=confusions[0], coarse=tuple(confusions[1:]))
        if boundary is not None:
            outlines, hausdorff = compare_boundaries(prediction, truth, num_classes, boundary, ignore)
            slide = replace(slide, boundaries=outlines, hausdorff=hausdorff)
        counted.append(slide)
    return Evaluation(
        class_names=names,
        slides=tuple(counted),
        has_background=has_background,
        ignore=tuple(ignore),
        levels=coarse,
        boundary=boundary,
    )


def _coarser_levels(levels: Sequence[Level], ndim: int) -> tuple[Level, ...]:
    """Levels to score beside the finest, which is scored in any case and may stand among them."""
    coarse = tuple(level for level in map(plain_level, levels) if level != 1)
    check_levels((1, *coarse), ndim)
    return coarse


def _check_pair(prediction: Slide, truth: Slide) -> None:
    for slide in (prediction, truth):
        if slide.num_channels != 1 or slide.dtype.kind not in "iu":
            got = f"{slide.num_channels} channels of {slide.dtype}"
            raise InputError(slide.path, expected="labels: one channel of integers", got=got)
    if prediction.shape != truth.shape:
        raise InputError(
            prediction.path, expected=f"shape {truth.shape}, as {truth.path} has", got=f"shape {prediction.shape}"
        )


def _common_shape(prediction: Slide, truth: Slide, level: Level) -> tuple[int, ...]:
    """Pixels of a level that both have; stores of other make may leave out a last one that is not full."""
    return tuple(map(min, truth.level_shape(level), prediction.level_shape(level)))


def _confusions(
    prediction: Slide, truth: Slide, num_classes: int, ignore: Sequence[int], level: Level
) -> Iterator[NDArray[np.int64]]:
    """Confusion matrix of each block of a level."""
    for start, size in blocks(_common_shape(prediction, truth, level)):
        true, predicted = (slide.read(level, start, size)[0] for slide in (truth, prediction))
        counted = ~np.isin(true, tuple(ignore))
        for slide, labels in ((truth, true), (prediction, predicted)):
            wrong = labels[counted & ((labels < 0) | (labels >= num_classes))]
            if wrong.size:
                raise InputError(
                    f"{slide.path}, block at {start}",
                    expected=f"labels 0 to {num_classes - 1}" + (f" or {tuple(ignore)} (ignored)" if ignore else ""),
                    got=int(wrong[0]),
                )
        yield confusion_matrix(true, predicted, num_classes, ignore)


def _row(slide: str, name: str, value: float, interval: Interval | None = None) -> dict[str, str | float]:
    score, _, class_name = name.partition("/")
    low, high = (float("nan"), float("nan")) if interval is None else interval
    return {"slide": slide, "score": score, "class": class_name, "value": value, "low": low, "high": high}


def _mean(values: NDArray[np.float64], times: NDArray[np.int64] | None = None) -> float:
    """Mean of the known values, each counted so many times."""
    weights = ~np.isnan(values) if times is None else np.where(np.isnan(values), 0, times)
    return float(np.average(np.nan_to_num(values), weights=weights)) if weights.sum() else float("nan")


def _number(value: float) -> float | None:
    return None if isnan(value) else value
