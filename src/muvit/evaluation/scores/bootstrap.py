"""Confidence intervals: over slides, by resampling them (percentile bootstrap), and over training seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from muvit.errors import InputError

Interval = tuple[float, float]
"""Lower and upper bound; NaN where there is none."""


@dataclass(frozen=True, kw_only=True)
class BootstrapConfig:
    """Settings of the intervals."""

    coverage: float = 0.95
    """Fraction of the resampled scores that the interval holds."""
    num_resamples: int = 1000
    """Number of resamples."""
    seed: int = 0
    """Seed of the resampling."""

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise InputError("coverage", expected="a share between 0 and 1", got=self.coverage)
        if self.num_resamples < 1 or self.seed < 0:
            got = f"{self.num_resamples} resamples and seed {self.seed}"
            raise InputError("num_resamples and seed", expected="at least one, and a seed >= 0", got=got)


def bootstrap_intervals(
    statistic: Callable[[NDArray[np.int64]], Mapping[str, float]],
    num_slides: int,
    config: BootstrapConfig | None = None,
) -> dict[str, Interval]:
    """Intervals of scores over slides.

    Slides are resampled, not pixels, since pixels of one slide are correlated: the interval covers the choice of slides
    of the same kind, not the variation between training runs.

    Args:
        statistic: scores by name of slides that occur so many times each, ``(num_slides)`` int64; NaN where a score
            does not exist.
        num_slides: number of slides.
        config: coverage, number of draws, seed.

    Returns:
        The interval of each score; NaN if there is a single slide.
    """
    config = BootstrapConfig() if config is None else config
    if num_slides < 2:
        return dict.fromkeys(statistic(np.ones(num_slides, np.int64)), (float("nan"), float("nan")))
    rng = np.random.default_rng(config.seed)
    times = rng.multinomial(num_slides, np.full(num_slides, 1 / num_slides), size=config.num_resamples)
    drawn = [statistic(weights) for weights in times]
    tail = 100 * (1 - config.coverage) / 2
    return {name: _bounds(np.array([scores[name] for scores in drawn]), tail) for name in drawn[0]}


def seed_interval(
    scores: Sequence[float], coverage: float = 0.95, *, within: Interval = (-inf, inf)
) -> Interval | None:
    """Interval of the mean of a score over training seeds, by Student's t; None for fewer than two or a missing score.

    Args:
        scores: one for each seed; of a difference between two models, the differences seed by seed.
        coverage: fraction of such intervals that hold the mean over all seeds, were scores normally distributed.
        within: lowest and highest possible score, such as 0 and 1, at which the interval ends.
    """
    values = np.asarray(scores, np.float64)
    if values.size < 2 or np.isnan(values).any():
        return None
    half = float(stdtrit(values.size - 1, (1 + coverage) / 2) * values.std(ddof=1) / np.sqrt(values.size))
    low, high = np.clip([values.mean() - half, values.mean() + half], *within).tolist()
    return low, high


def _bounds(values: NDArray[np.float64], tail: float) -> Interval:
    known = values[~np.isnan(values)]
    if not known.size:
        return float("nan"), float("nan")
    low, high = np.percentile(known, (tail, 100 - tail))
    return float(low), float(high)
