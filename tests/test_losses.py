import math

import numpy as np
import pytest
import torch

from muvit.errors import InputError
from muvit.labels import IGNORE
from muvit.losses import SegmentationLoss, boundary_loss, dice_loss, signed_distance


def logits_of(probabilities):
    """Logits ``(1, K, N)`` whose softmax is ``probabilities``, one row per pixel."""
    return torch.tensor(probabilities).log().T[None]


THREE = logits_of([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])
TRUTH = torch.tensor([[0, 1, 2]])


def test_dice_is_one_minus_the_mean_overlap_of_the_foreground_classes():
    # class 1: q = (.2, .6, .25), one pixel true; class 2: q = (.1, .3, .5), one pixel true; background left out
    expected = 1 - ((2 * 0.6) / (1.05 + 1) + (2 * 0.5) / (0.9 + 1)) / 2
    assert dice_loss(THREE, TRUTH).item() == pytest.approx(expected, abs=1e-5)


def test_without_a_background_the_dice_loss_counts_every_class():
    # class 0: q = (.7, .1, .25), one pixel true
    others = (2 * 0.6) / (1.05 + 1) + (2 * 0.5) / (0.9 + 1)
    expected = 1 - ((2 * 0.7) / (1.05 + 1) + others) / 3
    assert dice_loss(THREE, TRUTH, has_background=False).item() == pytest.approx(expected, abs=1e-5)
    assert SegmentationLoss(0, 1, has_background=False)(THREE, TRUTH).item() == pytest.approx(expected, abs=1e-5)


def test_dice_sums_over_batch_and_pixels_before_it_divides():
    logits = torch.cat([logits_of([[0.9, 0.1], [0.4, 0.6]]), logits_of([[0.2, 0.8], [0.3, 0.7]])])
    truth = torch.tensor([[0, 1], [1, 1]])
    assert dice_loss(logits, truth).item() == pytest.approx(1 - 2 * (0.6 + 0.8 + 0.7) / (2.2 + 3), abs=1e-5)


def test_loss_is_cross_entropy_plus_a_tenth_of_dice():
    entropy = -(math.log(0.7) + math.log(0.6) + math.log(0.5)) / 3
    dice = dice_loss(THREE, TRUTH).item()
    assert SegmentationLoss()(THREE, TRUTH).item() == pytest.approx(entropy + 0.1 * dice, abs=1e-5)
    assert SegmentationLoss(2, 0)(THREE, TRUTH).item() == pytest.approx(2 * entropy, abs=1e-5)
    assert SegmentationLoss(0, 3)(THREE, TRUTH).item() == pytest.approx(3 * dice, abs=1e-5)


def test_ignored_pixels_count_nowhere():
    torch.manual_seed(0)
    logits, truth = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    truth[:, :, 2:] = IGNORE
    loss = SegmentationLoss(class_weights=(1, 2, 3))
    expected = loss(logits[..., :2], truth[..., :2])
    torch.testing.assert_close(loss(logits, truth), expected)
    disturbed = logits.clone()
    disturbed[..., 2:] = 50 * torch.randn(2, 3, 4, 2)
    torch.testing.assert_close(loss(disturbed, truth), expected)


def test_class_weights_make_a_weighted_mean_of_the_cross_entropy_only():
    entropy = -(1 * math.log(0.7) + 2 * math.log(0.6) + 5 * math.log(0.5)) / (1 + 2 + 5)
    loss = SegmentationLoss(class_weights=(1, 2, 5))(THREE, TRUTH).item()
    assert loss == pytest.approx(entropy + 0.1 * dice_loss(THREE, TRUTH).item(), abs=1e-5)


@pytest.mark.parametrize("class_weights", [None, (1.0, 2.0, 3.0)])
def test_a_batch_without_labels_costs_nothing_and_teaches_nothing(class_weights):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = SegmentationLoss(1, 0.1, class_weights)(logits, torch.full((2, 4, 4), IGNORE))
    assert loss.item() == 0
    loss.backward()
    assert (logits.grad == 0).all()


def test_labels_of_zero_weight_only_are_finite():
    logits = torch.randn(1, 2, 3, requires_grad=True)
    SegmentationLoss(1, 0, (0, 1))(logits, torch.zeros(1, 3, dtype=torch.int64)).backward()
    assert torch.isfinite(logits.grad).all()


def test_a_class_that_neither_occurs_nor_is_predicted_scores_full():
    logits = torch.tensor([[[50.0, -50], [-50, 50], [-50, -50]]])
    assert dice_loss(logits, torch.tensor([[0, 1]])).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("space", [(5,), (3, 4), (2, 3, 2)])
def test_gradients_are_those_of_finite_differences(space):
    torch.manual_seed(0)
    truth = torch.randint(3, (2, *space))
    truth[0, 0] = IGNORE
    logits = torch.randn(2, 3, *space, requires_grad=True)
    loss = SegmentationLoss(1, 0.7, (1, 2, 3))
    loss(logits, truth).backward()
    direction = torch.randn_like(logits)
    direction /= direction.norm()
    step = 0.02 * direction
    with torch.no_grad():
        slope = (loss(logits + step, truth) - loss(logits - step, truth)) / (2 * 0.02)
    assert (logits.grad * direction).sum().item() == pytest.approx(slope.item(), abs=1e-4)


def test_half_precision_logits_are_summed_in_full_precision():
    torch.manual_seed(0)
    logits, truth = torch.randn(1, 3, 64, 64).bfloat16(), torch.randint(3, (1, 64, 64))
    loss = SegmentationLoss()(logits, truth)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, SegmentationLoss()(logits.float(), truth))


def test_gradient_descent_on_the_logits_ends_at_the_labels():
    torch.manual_seed(0)
    logits, truth = torch.zeros(1, 3, 4, 4, requires_grad=True), torch.randint(3, (1, 4, 4))
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        loss = SegmentationLoss(1, 1)(logits, truth)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
    assert torch.equal(logits.argmax(1), truth)


@pytest.mark.parametrize("weights", [(-1, 1), (1, -0.1), (0, 0)])
def test_weights_that_weigh_nothing_are_refused(weights):
    with pytest.raises(InputError, match="weights >= 0, not both 0"):
        SegmentationLoss(*weights)


@pytest.mark.parametrize("class_weights", [(), (1, -2), (0, 0), (1, float("nan"))])
def test_class_weights_that_weigh_nothing_are_refused(class_weights):
    with pytest.raises(InputError, match="class_weights"):
        SegmentationLoss(class_weights=class_weights)


# -- boundary loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9,), (7, 8), (4, 5, 3)])
def test_the_signed_distance_is_that_of_the_nearest_pixel_of_the_other_kind(shape):
    labels = np.random.default_rng(0).integers(0, 3, shape)
    labels[(*(slice(0, 2),) * len(shape),)] = IGNORE
    pixels = list(np.ndindex(*shape))
    found = signed_distance(labels, 1)
    for pixel in pixels:
        is_inside = labels[pixel] == 1
        others = [other for other in pixels if labels[other] != IGNORE and (labels[other] == 1) != is_inside]
        nearest = min(math.dist(pixel, other) for other in others) - 0.5
        expected = 0 if labels[pixel] == IGNORE else -nearest if is_inside else nearest
        assert found[pixel] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("label", [0, 1])
def test_a_class_without_a_border_has_no_distance(label):
    assert not signed_distance(np.zeros((3, 4), int), label).any()


def test_the_boundary_loss_is_the_mean_of_distance_times_probability():
    # class 1 is the second pixel, class 2 the third
    first, second = (0.5 * 0.2 - 0.5 * 0.6 + 0.5 * 0.25), (1.5 * 0.1 + 0.5 * 0.3 - 0.5 * 0.5)
    assert boundary_loss(THREE, TRUTH).item() == pytest.approx((first + second) / (3 * 2), abs=1e-6)
    zeroth = -0.5 * 0.7 + 0.5 * 0.1 + 1.5 * 0.25
    expected = (zeroth + first + second) / (3 * 3)
    assert boundary_loss(THREE, TRUTH, has_background=False).item() == pytest.approx(expected, abs=1e-6)
    both = SegmentationLoss(1, 0, boundary_weight=0.5)(THREE, TRUTH) - SegmentationLoss(1, 0)(THREE, TRUTH)
    assert both.item() == pytest.approx(0.5 * (first + second) / 6, abs=1e-6)


def test_the_boundary_loss_punishes_pixels_the_more_the_farther_they_lie_from_their_class():
    truth = torch.zeros(1, 12, dtype=torch.int64)
    truth[:, :3] = 1
    logits = torch.zeros(1, 2, 12, requires_grad=True)
    boundary_loss(logits, truth).backward()
    slope = logits.grad[0, 1]
    assert (slope[:3] < 0).all() and (slope[3:] > 0).all()
    assert (slope.diff() > 0).all()


def test_the_boundary_loss_ignores_unlabelled_pixels():
    torch.manual_seed(0)
    logits, truth = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    truth[:, :, 2:] = IGNORE
    expected = boundary_loss(logits[..., :2], truth[..., :2])
    torch.testing.assert_close(boundary_loss(logits, truth), expected)
    assert boundary_loss(logits, torch.full_like(truth, IGNORE)).item() == 0
    with pytest.raises(InputError, match=r"boundary_weight: expected a weight >= 0, got -1"):
        SegmentationLoss(boundary_weight=-1)
