import warnings
from math import isnan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_jaccard_index,
)

from muvit.errors import InputError
from muvit.metrics import class_scores, confusion_matrix, mean_of_slides, one_vs_rest_auc, scores

NUM_CLASSES = 4


@st.composite
def label_pairs(draw):
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    high = draw(st.integers(1, NUM_CLASSES))
    return rng.integers(0, high, shape).astype(np.uint8), rng.integers(0, NUM_CLASSES, shape).astype(np.int16)


@settings(deadline=None)
@given(label_pairs(), st.sets(st.integers(0, NUM_CLASSES - 1), max_size=2))
def test_confusion_counts_pixels_one_by_one(labels, ignore):
    truth, guess = labels
    expected = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    for t, g in zip(truth.flat, guess.flat, strict=True):
        if t not in ignore:
            expected[t, g] += 1
    counted = confusion_matrix(truth, guess, NUM_CLASSES, tuple(ignore))
    assert counted.dtype == np.int64
    assert (counted == expected).all()


@settings(deadline=None)
@given(label_pairs())
def test_scores_are_the_overlaps_of_pixel_sets(labels):
    truth, guess = labels
    result = scores(confusion_matrix(truth, guess, NUM_CLASSES))
    dice = []
    for c in range(NUM_CLASSES):
        p, g = guess == c, truth == c
        if not (p | g).any():
            assert isnan(result.dice[c])
            assert isnan(result.iou[c])
            continue
        assert result.dice[c] == pytest.approx(2 * (p & g).sum() / (p.sum() + g.sum()))
        assert result.iou[c] == pytest.approx((p & g).sum() / (p | g).sum())
        dice += [result.dice[c]] * (c > 0)
    assert result.accuracy == pytest.approx((truth == guess).mean())
    assert result.mean_dice == (pytest.approx(np.mean(dice)) if dice else pytest.approx(np.nan, nan_ok=True))


def test_scores_equal_those_of_torchmetrics():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, NUM_CLASSES, (50, 60))
    guess = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, NUM_CLASSES, truth.shape))
    truth[rng.random(truth.shape) < 0.1] = 14
    counted = confusion_matrix(truth, guess, NUM_CLASSES, ignore=(14,))
    result = scores(counted)
    tensors = torch.from_numpy(guess), torch.from_numpy(truth)
    per_class = {"num_classes": NUM_CLASSES, "average": "none", "ignore_index": 14}
    assert (counted == multiclass_confusion_matrix(*tensors, NUM_CLASSES, ignore_index=14).numpy()).all()
    assert np.allclose(result.dice, multiclass_f1_score(*tensors, **per_class))
    assert np.allclose(result.iou, multiclass_jaccard_index(*tensors, **per_class))
    iou = multiclass_jaccard_index(*tensors, **per_class)
    assert result.mean_iou == pytest.approx(
        float(multiclass_jaccard_index(*tensors, **per_class | {"average": "macro"}))
    )
    assert result.mean_foreground_iou == pytest.approx(float(iou[1:].mean()))
    micro = multiclass_accuracy(*tensors, **per_class | {"average": "micro"})
    assert result.accuracy == pytest.approx(float(micro))


def test_confusions_of_parts_add_up():
    rng = np.random.default_rng(4)
    truth, guess = rng.integers(0, NUM_CLASSES, (2, 40, 40))
    parts = [confusion_matrix(truth[s], guess[s], NUM_CLASSES) for s in (slice(0, 13), slice(13, None))]
    assert (sum(parts) == confusion_matrix(truth, guess, NUM_CLASSES)).all()


def test_means_leave_out_background_and_absent_classes():
    truth, guess = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    result = scores(confusion_matrix(truth, guess, NUM_CLASSES))
    assert result.dice[:3] == pytest.approx([4 / 6, 4 / 5, 0])
    assert isnan(result.dice[3])
    assert result.mean_dice == pytest.approx((4 / 5 + 0) / 2)


def test_class_0_counts_in_the_mean_iou_and_is_foreground_where_there_is_no_background():
    confusion = np.array([[60, 1, 0], [0, 4, 4], [1, 0, 4]])
    result = scores(confusion)
    assert result.mean_foreground_iou == pytest.approx(4 / 9)  # .444
    assert result.mean_iou == pytest.approx((60 / 62 + 8 / 9) / 3)  # .619
    assert result.mean_dice == pytest.approx(result.dice[1:].mean())
    every = scores(confusion, has_background=False)
    assert every.mean_iou == every.mean_foreground_iou == result.mean_iou
    assert every.mean_dice == pytest.approx(result.dice.mean())


def test_nothing_counted_gives_no_scores_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = scores(confusion_matrix(np.array([5, 5]), np.array([0, 1]), NUM_CLASSES, ignore=(5,)))
    assert isnan(result.accuracy)
    assert isnan(result.mean_dice)
    assert isnan(result.mean_iou)


@pytest.mark.parametrize(
    ("truth", "guess", "message"),
    [
        ([0, 1], [0, 1, 2], r"prediction: expected the shape of the truth, \(2,\)"),
        ([0, 4], [0, 1], "truth: expected labels 0 to 3, got labels 0 to 4"),
        ([0, 1], [-1, 1], "prediction: expected labels 0 to 3, got labels -1 to 1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(truth, guess, message):
    with pytest.raises(InputError, match=message):
        confusion_matrix(np.array(truth), np.array(guess), NUM_CLASSES)


def test_huge_unsigned_labels_do_not_wrap_around():
    with pytest.raises(InputError, match="truth"):
        confusion_matrix(np.array([2**64 - 1], np.uint64), np.array([0], np.uint64), NUM_CLASSES)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.booleans())
def test_areas_under_roc_curves_equal_those_of_scikit_learn(seed, num_classes, has_ties):
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    classes = np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, 30)])
    shares = rng.dirichlet(np.ones(num_classes), len(classes))
    shares = shares.round(1) if has_ties else shares
    expected = [sklearn.roc_auc_score(classes == c, shares[:, c]) for c in range(num_classes)]
    assert one_vs_rest_auc(shares, classes) == pytest.approx(np.array(expected))
    accuracy, auc = class_scores(shares, classes)
    assert accuracy == (shares.argmax(1) == classes).mean()
    assert auc == pytest.approx(np.mean(expected))


def test_areas_that_do_not_exist_are_left_out():
    shares = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    assert np.isnan(one_vs_rest_auc(shares, np.array([0, 1]))).tolist() == [False, False, True]
    assert class_scores(shares, np.array([0, 1])) == (1, 1)
    assert isnan(class_scores(shares, np.array([0, 0]))[1])


def test_probabilities_and_classes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"expected shapes \(N, K\) and \(N\)"):
        one_vs_rest_auc(np.ones((3, 2)), np.zeros(2, int))
    with pytest.raises(InputError, match="classes: expected 0 to 1, got 0 to 2"):
        one_vs_rest_auc(np.ones((2, 2)), np.array([0, 2]))


def test_crops_are_averaged_over_their_slide():
    shares = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.8]])
    means, classes = mean_of_slides(shares, np.array([1, 0, 1, 1]), np.array([7, 3, 7, 7]))
    assert means == pytest.approx(np.array([[0.0, 1.0], [1.7 / 3, 1.3 / 3]]))
    assert classes.tolist() == [0, 1]
