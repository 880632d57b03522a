"""Sums over the batches and processes of an epoch."""

import torch
from torch import Tensor
from torchmetrics import Metric


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
