"""Segmentation losses (MuViT section 3.4, equation 5)."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
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


def boundary_loss(logits: Tensor, target: Tensor, *, has_background: bool = True) -> Tensor:
    """Distance of the predicted classes from the true ones (Kervadec et al. 2019, arXiv 1812.07032, section 2).

    ``mean_x sum_c phi_c(x) q_c(x) / C``, q the softmax, phi as of `signed_distance`, over the labelled pixels and the
    ``C`` foreground classes, or all where no class is background. It is negative where predictions are right, and
    linear in q, so it needs the cross entropy or the Dice loss beside it.

    Args:
        logits: ``(B, K, *space)``.
        target: ``(B, *space)`` int64, `IGNORE` where unlabelled.
        has_background: whether class 0 is background.
    """
    classes = range(logits.shape[1])[foreground(has_background)]
    # computed on the CPU: on a GPU, the step waits for its labels here
    labels = target.cpu().numpy()
    distance = np.stack([[signed_distance(crop, label) for label in classes] for crop in labels])
    phi = torch.from_numpy(distance).to(logits.device, non_blocking=True)
    predicted = logits.float().softmax(dim=1)[:, foreground(has_background)]
    return (phi * predicted).sum() / (len(classes) * (target != IGNORE).sum().clamp(min=1))


def signed_distance(labels: NDArray[np.integer], label: int) -> NDArray[np.float32]:
    """Distance of every pixel from the border of a class, in pixels, negative inside.

    The border runs between pixels: beside it the distance is 0.5 or -0.5 (in the code of Kervadec et al. 1 or 0). It is
    0 at unlabelled pixels, which neither belong to the class nor bound it, and everywhere if there is no border.

    Args:
        labels: ``space``, `IGNORE` where unlabelled.
        label: of the class.
    """
    from scipy.ndimage import distance_transform_edt  # takes a second to import

    inside, outside = labels == label, (labels != label) & (labels != IGNORE)
    if not (inside.any() and outside.any()):
        return np.zeros(labels.shape, np.float32)
    to_class, to_others = distance_transform_edt(~inside), distance_transform_edt(~outside)
    distance: NDArray[np.float32] = ((to_class - 0.5) * outside - (to_others - 0.5) * inside).astype(np.float32)
    return distance


class SegmentationLoss(nn.Module):
    """Weighted sum of cross entropy, Dice and boundary loss, on the finest level (MuViT sections 3.4 and 4.2).

    Args:
        ce_weight: weight of the cross entropy.
        dice_weight: weight of the Dice loss (0.1 in the paper's supplement).
        boundary_weight: weight of `boundary_loss`, which the MuViT paper does not have.
        class_weights: weight of each class in the cross entropy; (1, 2) for KPIS.
        has_background: whether class 0 is background, which Dice and boundary loss leave out.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        ce_weight: float = 1.0,
        dice_weight: float = 0.1,
        class_weights: Sequence[float] | None = None,
        *,
        boundary_weight: float = 0.0,
        has_background: bool = True,
    ) -> None:
        super().__init__()
        if min(ce_weight, dice_weight) < 0 or ce_weight + dice_weight == 0:
            raise InputError(
                "ce_weight, dice_weight", expected="weights >= 0, not both 0", got=f"{ce_weight}, {dice_weight}"
            )
        if boundary_weight < 0:
            raise InputError("boundary_weight", expected="a weight >= 0", got=boundary_weight)
        self.ce_weight, self.dice_weight, self.boundary_weight = ce_weight, dice_weight, boundary_weight
        self.has_background = has_background
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
        loss = self.ce_weight * entropy + self.dice_weight * dice
        if self.boundary_weight:
            loss = loss + self.boundary_weight * boundary_loss(logits, target, has_background=self.has_background)
        return loss
