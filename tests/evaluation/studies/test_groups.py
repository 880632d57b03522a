from math import isnan

import numpy as np
import pytest

from muvit.errors import InputError
from muvit.evaluation.scores.segmentation import Evaluation, SlideCounts
from muvit.evaluation.studies.groups import draw_groups, study_groups
from muvit.metrics import scores

GROUPS = {"a": "DN", "b": "normal", "c": "DN", "unused": "56Nx"}


def evaluation(seed, names="abc"):
    rng = np.random.default_rng(seed)
    counted = [SlideCounts(name=name, confusion=rng.integers(1, 100, (2, 2))) for name in names]
    return Evaluation(class_names=("background", "glomerulus"), slides=tuple(counted))


def test_each_model_is_scored_on_each_group():
    models = {"DN": evaluation(0), "normal": evaluation(1)}
    shift = study_groups(models, GROUPS)
    assert shift.groups == ("DN", "normal")
    a, b, c = (slide.confusion for slide in models["DN"].slides)
    pooled = shift.matrix()
    assert pooled[0] == [scores(a + c).mean_dice, scores(b).mean_dice]
    mean = shift.matrix("mean_slide_dice")
    assert mean[0][0] == pytest.approx((scores(a).mean_dice + scores(c).mean_dice) / 2)
    assert mean[0][1] == pooled[0][1]
    rows = shift.rows()
    assert [(row["model"], row["group"], row["slides"]) for row in rows] == [
        ("DN", "DN", 2),
        ("DN", "normal", 1),
        ("normal", "DN", 2),
        ("normal", "normal", 1),
    ]
    assert rows[0]["mean_dice_low"] <= rows[0]["mean_dice"] <= rows[0]["mean_dice_high"]
    assert isnan(rows[1]["mean_dice_low"])  # of a single slide


def test_a_group_that_a_model_did_not_label_has_no_score():
    shift = study_groups({"DN": evaluation(0, "ab"), "normal": evaluation(1, "b")}, GROUPS)
    assert isnan(shift.matrix()[1][0]) and not isnan(shift.matrix()[0][0])
    assert len(shift.rows()) == 3
    for score in ("mean_dice", "mean_slide_dice"):
        assert np.asarray(draw_groups(shift, score)).std() > 0


def test_a_slide_without_a_group_is_refused():
    with pytest.raises(InputError, match="groups: expected a value for every slide, got none for 'd'"):
        study_groups({"DN": evaluation(0, "abd")}, GROUPS)
