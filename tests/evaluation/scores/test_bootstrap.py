from math import isnan

import numpy as np
import pytest

from muvit.errors import InputError
from muvit.evaluation.scores.bootstrap import BootstrapConfig, bootstrap_intervals, seed_interval


def mean_of(values):
    return lambda times: {"mean": float(np.average(values, weights=times))}


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_intervals(mean_of(values), 400, BootstrapConfig(num_resamples=4000))["mean"]
    error = values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_intervals_follow_from_the_seed_and_widen_with_the_coverage():
    values = np.random.default_rng(0).random(9)
    first, again, other, wide = (
        bootstrap_intervals(mean_of(values), 9, BootstrapConfig(seed=seed, coverage=coverage))["mean"]
        for seed, coverage in ((0, 0.9), (0, 0.9), (1, 0.9), (0, 0.99))
    )
    assert first == again != other
    assert wide[0] < first[0] < first[1] < wide[1]


def test_one_slide_tells_nothing_about_others():
    interval = bootstrap_intervals(mean_of([2.0]), 1)["mean"]
    assert all(map(isnan, interval))


def test_draws_without_a_score_are_left_out():
    def statistic(times):  # a class that occurs in the last slide only
        return {"some": 0.5 if times[-1] else float("nan"), "none": float("nan")}

    intervals = bootstrap_intervals(statistic, 5)
    assert intervals["some"] == (0.5, 0.5)
    assert all(map(isnan, intervals["none"]))


@pytest.mark.parametrize("fields", [{"coverage": 1.0}, {"num_resamples": 0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        BootstrapConfig(**fields)


def test_the_interval_over_seeds_is_students():
    scores = [0.90, 0.92, 0.94, 0.93, 0.91]
    low, high = seed_interval(scores)
    # t of 4 degrees of freedom at 97.5 %: 2.776
    half = 2.7764 * np.std(scores, ddof=1) / np.sqrt(5)
    assert (low, high) == pytest.approx((0.92 - half, 0.92 + half), abs=1e-6)
    wide = seed_interval(scores, coverage=0.99)
    assert wide[0] < low < high < wide[1]
    assert seed_interval([0.9]) is None
    assert seed_interval([0.96, 0.95, 0.9], within=(0, 1))[1] == 1 < seed_interval([0.96, 0.95, 0.9])[1]
    assert seed_interval([0.9, float("nan")]) is None
