"""Segmentation losses (MuViT section 3.4, equation 5)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from muvit.errors import InputError
from muvit.labels import IGNORE, foreground


def dice_loss(logits: Tensor, target: Tensor, *, has_background: bool = True, eps: float = 1e-6) -> Tensor:
    """Soft Dice loss over the foreground classes, sums over batch and pixels.

    ``1 - mean_c (2 sum q_c y_c + eps) / (sum q_c + sum y_c + eps)``, q the softmax, y one-hot, c = 1 .. K-1, or
    0 .. K-1 where no class is background.

    Args:
        logits: ``(B, K, *space)``.
        target: ``(B, *space)`` int64, `IGNORE` where unlabelled.
        has_background: whether class 0 is background.
        eps: keeps the score of a class without pixels finite; it is 1 if the class is not predicted either.
    """
    valid = target != IGNORE
    num_classes = logits.shape[1]
    truth = one_hot(target.where(valid, 0), num_classes).movedim(-1, 1) * valid[:, None]
    predicted = logits.float().softmax(dim=1) * valid[:, None]
    axes = (0, *range(2, logits.ndim))
    overlap, total = (predicted * truth).sum(axes), predicted.sum(axes) + truth.sum(axes)
    return 1 - ((2 * overlap + eps) / (total + eps))[foreground(has_background)].mean()


class SegmentationLoss(nn.Module):
    """``ce_weight * cross entropy + dice_weight * Dice``, on the finest level (MuViT sections 3.4 and 4.2).

    Args:
        ce_weight: weight of the cross entropy.
        dice_weight: weight of the Dice loss (0.1 in the paper's supplement).
        class_weights: weight of each class in the cross entropy; (1, 2) for KPIS.
        has_background: whether class 0 is background, which the Dice loss leaves out.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        ce_weight: float = 1.0,
        dice_weight: float = 0.1,
        class_weights: Sequence[float] | None = None,
        *,
        has_background: bool = True,
    ) -> None:
        super().__init__()
        if min(ce_weight, dice_weight) < 0 or ce_weight + dice_weight == 0:
            raise InputError(
                "ce_weight, dice_weight", expected="weights >= 0, not both 0", got=f"{ce_weight}, {dice_weight}"
            )
        self.ce_weight, self.dice_weight, self.has_background = ce_weight, dice_weight, has_background
        weights = None if class_weights is None else torch.tensor(tuple(class_weights), dtype=torch.float32)
        if weights is not None and not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
            raise InputError("class_weights", expected="weights >= 0, not all 0", got=class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of ``logits`` ``(B, K, *space)`` against ``target`` ``(B, *space)`` int64."""
        entropy = cross_entropy(logits.float(), target, self.class_weights, ignore_index=IGNORE, reduction="sum")
        valid = target != IGNORE
        weight = valid if self.class_weights is None else self.class_weights[target.where(valid, 0)] * valid
        # mean over the labelled pixels; the loss of a batch without any is 0 instead of NaN
        entropy = entropy / weight.sum().clamp(min=torch.finfo(torch.float32).tiny)
        dice = dice_loss(logits, target, has_background=self.has_background)
        return self.ce_weight * entropy + self.dice_weight * dice
