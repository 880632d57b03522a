"""Totals over the batches and processes of an epoch, kept without waiting for the device."""

import torch
from torch import Tensor
from torchmetrics import Metric

from muvit.labels import IGNORE


class Sums(Metric):
    """Sums of values and of their weights, over all batches and processes.

    Lightning's own mean over processes truncates the mean of their numbers of samples to an integer.

    Args:
        *shape: of either sum.
    """

    total: Tensor
    count: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(shape), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor | int) -> None:
        """Add the sums of a batch."""
        self.total += total
        self.count += count

    def compute(self) -> tuple[Tensor, Tensor]:
        """Both sums."""
        return self.total, self.count


class Confusion(Metric):
    """Confusion matrix over all batches and processes, counted without waiting for the device.

    That of torchmetrics picks the labelled pixels by a mask, and the host waits for their number.

    Args:
        num_classes: classes, background included.
    """

    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Count the pixels of integer labels ``(B, *space)``; those whose true label is `IGNORE` are left out."""
        size = self.num_classes**2
        cell = torch.where(truth == IGNORE, size, truth * self.num_classes + prediction).flatten()
        found = torch.zeros(size + 1, dtype=torch.int64, device=cell.device)
        found.scatter_add_(0, cell, torch.ones_like(cell))  # ignored pixels fall into the last cell
        self.counts += found[:size].view_as(self.counts)

    def compute(self) -> Tensor:
        """Pixels ``(K, K)`` int64: rows the true class, columns the predicted one."""
        return self.counts
