"""Losses of the context branches (Relay Tokens): against the labels, and against the local prediction."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from muvit.labels import IGNORE
from muvit.models.relay.placement import pool


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """``- sum_c t_c log softmax(z)_c``, mean over batch and pixels; a target of zeros costs nothing, but counts.

    Args:
        logits: ``(B, K, *space)``.
        target: ``(B, K, *space)``, shares of the classes.
    """
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def pooled_labels(label: Tensor, num_classes: int, cells: Sequence[int]) -> Tensor:
    """Shares ``(B, K, *cells)`` of the classes in cells of labels ``(B, *space)``; all 0 where a pixel is ignored."""
    ignored = label == IGNORE
    shares = pool(one_hot(label.where(~ignored, 0), num_classes).movedim(-1, 1).float(), cells)
    return shares * (pool(ignored[:, None].float(), cells) == 0)


def pooled_prediction(logits: Tensor, cells: Sequence[int]) -> Tensor:
    """Mean probabilities ``(B, K, *cells)`` in the cells of logits ``(B, K, *space)``; gradients flow through them."""
    return pool(logits.softmax(dim=1), cells)


def labelled_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of ``(B, K, *space)``, mean over the labelled pixels of ``(B, *space)``; 0 if there are none."""
    total = cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
    return total / torch.count_nonzero(label != IGNORE).clamp(min=1)
