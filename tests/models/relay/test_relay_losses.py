from math import log

import pytest
import torch
from torch.nn.functional import avg_pool2d, cross_entropy, one_hot

from muvit.errors import InputError
from muvit.labels import IGNORE
from muvit.models.relay.config import RelayConfig
from muvit.models.relay.decoders import labelled_cross_entropy, pooled_labels, soft_cross_entropy
from muvit.models.relay.segmenter import RelaySegmenter

LN2, LN3, LN4 = log(2), log(3), log(4)


def segmenter(**changes):
    """Two views of 4 x 4 pixels, levels 1 and 2: the local view is 2 x 2 pixels of the context."""
    fields = {
        "backbone": "vit_tiny_patch16_224",
        "timm_options": {"patch_size": 4, "embed_dim": 8, "num_heads": 1, "depth": 1},
        "in_channels": 1,
        "num_classes": 2,
        "levels": (1, 2),
        "size": (4, 4),
    }
    return RelaySegmenter(RelayConfig(**fields | changes))


def example():
    """Logits of both branches, and a batch. Labels by block: all 1, half 1, all 0, one pixel ignored."""
    label = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, IGNORE, 1], [0, 0, 1, 1]])
    local, context = torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), 9.0)
    local[0, 0, :2, :2] = LN3  # probabilities 3/4, 1/4
    # the central 2 x 2 pixels of the context: odds 1:1, 1:3, 3:1, 1:1
    context[0, :, 1:3, 1:3] = torch.tensor([[[0, 0], [LN3, 0]], [[0, LN3], [0, 0]]])
    bbox = torch.tensor([[[[2.0, 2.0], [6.0, 6.0]], [[0.0, 0.0], [8.0, 8.0]]]])
    batch = {"img": torch.zeros(1, 2, 1, 4, 4), "bbox": bbox, "label": label[None]}
    return local, context, batch


# -sum_c t_c log q_c of the four blocks, their mean; -log 3/4 = LN4 - LN3, -log 1/4 = LN4
CONTEXT = (LN2 + ((LN4 - LN3) + LN4) / 2 + (LN4 - LN3) + 0) / 4
CONSISTENCY = (LN2 + ((LN4 - LN3) + LN4) / 2 + ((LN4 - LN3) + LN4) / 2 + LN2) / 4


def loss_of(model, logits, batch, monkeypatch):
    monkeypatch.setattr(model, "branch_logits", lambda *args, **kwargs: list(logits))
    return model.training_loss(batch, lambda z, y: z.new_tensor(10.0))[0].item()


@pytest.mark.parametrize("context_weight, consistency_weight", [(0.1, 0.1), (1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_the_losses_equal_an_example_by_hand(monkeypatch, context_weight, consistency_weight):
    local, context, batch = example()
    model = segmenter(context_weight=context_weight, consistency_weight=consistency_weight)
    expected = 10 + context_weight * CONTEXT + consistency_weight * CONSISTENCY
    assert loss_of(model, (local, context), batch, monkeypatch) == pytest.approx(expected, rel=1e-6)


def test_the_losses_follow_the_place_of_the_local_view(monkeypatch):
    local, context, batch = example()
    moved = batch | {"bbox": batch["bbox"].clone()}
    moved["bbox"][:, 0] += torch.tensor([-2.0, 2.0])  # one pixel of the context up and to the right
    shifted = context.roll((-1, 1), (2, 3))
    model = segmenter()
    expected = loss_of(model, (local, context), batch, monkeypatch)
    assert loss_of(model, (local, shifted), moved, monkeypatch) == pytest.approx(expected, rel=1e-6)
    assert loss_of(model, (local, context), moved, monkeypatch) != pytest.approx(expected, abs=1e-2)


def test_blocks_outside_the_context_view_cost_nothing(monkeypatch):
    local, context, batch = example()
    batch["bbox"][:, 1] += torch.tensor([0.0, 4.0])  # begins where the right half of the local view does
    context = context.roll(-2, 3)
    left = LN2 + LN4 - LN3  # the blocks that are lost: all 1 at odds 1:1, all 0 at odds 3:1
    model = segmenter(context_weight=1.0, consistency_weight=0.0)
    assert loss_of(model, (local, context), batch, monkeypatch) == pytest.approx(10 + CONTEXT - left / 4, rel=1e-6)
    left = LN2 + ((LN4 - LN3) + LN4) / 2
    model = segmenter(context_weight=0.0, consistency_weight=1.0)
    assert loss_of(model, (local, context), batch, monkeypatch) == pytest.approx(10 + CONSISTENCY - left / 4, rel=1e-6)


def test_the_consistency_term_teaches_both_branches(monkeypatch):
    local, context, batch = example()
    local.requires_grad_()
    context.requires_grad_()
    model = segmenter(context_weight=0.0)
    monkeypatch.setattr(model, "branch_logits", lambda *args, **kwargs: [local, context])
    model.training_loss(batch, lambda z, y: z.new_tensor(0.0))[0].backward()
    assert local.grad[0, :, :2, 2:].all()  # where the context is not undecided
    assert context.grad[0, :, 1, 1:3].all() and not context.grad[0, :, 0].any()  # inside and outside the local view


def test_the_full_target_is_the_label_of_the_whole_context_view(monkeypatch):
    local, context, batch = example()
    labels = torch.randint(2, (1, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    labels[0, 1, 0] = IGNORE
    context = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    model = segmenter(context_target="full", context_weight=1.0, consistency_weight=0.0)
    expected = 10 + cross_entropy(context[:, :, 1:], labels[:, 1, 1:]).item()
    assert loss_of(model, (local, context), batch | {"labels": labels}, monkeypatch) == pytest.approx(expected)
    with pytest.raises(InputError, match=r"labels: expected those of every view.* Set data.label_levels to all"):
        loss_of(model, (local, context), batch, monkeypatch)


def test_every_context_level_adds_losses_with_its_own_factor(monkeypatch):
    model = segmenter(levels=(1, 2, 4), context_weight=1.0, consistency_weight=0.0)
    local, context, batch = example()
    coarsest = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[[[-4.0, 0.0], [12.0, 16.0]]]])  # the local view is its one pixel at (1.5, 0.5) cells
    batch["bbox"] = torch.cat([batch["bbox"], box], dim=1)
    # all 16 pixels are one block, one of them is ignored
    assert loss_of(model, (local, context, coarsest), batch, monkeypatch) == pytest.approx(10 + CONTEXT, rel=1e-6)
    batch["label"] = batch["label"].where(batch["label"] != IGNORE, 1)
    at_place = coarsest[0, :, 1:3, 0:2].mean((1, 2)).log_softmax(0)
    label = batch["label"].float().mean()
    without_ignored = CONTEXT + LN2 / 4  # the fourth block: all 1, odds 1:1
    expected = 10 + without_ignored - (label * at_place[1] + (1 - label) * at_place[0]).item()
    assert loss_of(model, (local, context, coarsest), batch, monkeypatch) == pytest.approx(expected, rel=1e-5)


def test_no_weight_no_loss(monkeypatch):
    local, _, batch = example()
    model = segmenter(context_weight=0.0, consistency_weight=0.0)
    assert loss_of(model, (local,), batch, monkeypatch) == 10


def test_soft_cross_entropy_of_hard_targets_is_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator)
    label = torch.randint(3, (2, 4, 4), generator=generator)
    shares = one_hot(label, 3).movedim(-1, 1).float()
    torch.testing.assert_close(soft_cross_entropy(logits, shares), cross_entropy(logits, label))


def test_labels_are_pooled_to_shares_and_blocks_with_an_ignored_pixel_to_nothing():
    label = torch.randint(3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    shares = avg_pool2d(one_hot(label, 3).movedim(-1, 1).float(), 4)
    torch.testing.assert_close(pooled_labels(label, 3, (2, 2)), shares)
    label[0, 1, 6] = IGNORE
    shares[0, :, 0, 1] = 0
    torch.testing.assert_close(pooled_labels(label, 3, (2, 2)), shares)


def test_a_view_without_labels_costs_nothing():
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = labelled_cross_entropy(logits, torch.full((1, 4, 4), IGNORE))
    loss.backward()
    assert loss == 0 and not logits.grad.any()
