"""The hooks that all training tasks share: seeds of a step, its gradient, the frozen encoder, what is logged."""

from typing import Any, Self

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torchmetrics import Metric

from muvit.models.folder import FolderModel
from muvit.training.optim import OptimConfig, PretrainOptimConfig

_MODEL = 2  # purpose of random numbers: dropout and random attention; tasks have others of their own


class BaseTask(LightningModule):
    """What a training step is made of, whatever the model.

    Logs ``grad_norm`` at every step: the norm of the gradient of all parameters before it is clipped.

    Args:
        model: what to train.
        optim: optimiser settings.
        seed: of everything random in the steps.
        freeze_encoder: leave `encoder` as it is, in evaluation mode.
    """

    model: FolderModel
    optim: OptimConfig | PretrainOptimConfig

    def __init__(
        self,
        model: FolderModel,
        optim: OptimConfig | PretrainOptimConfig,
        *,
        seed: int = 0,
        freeze_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.optim, self.seed, self.freeze_encoder = model, optim, seed, freeze_encoder
        self.val_losses = Sums()

    @property
    def encoder(self) -> nn.Module | None:
        """The part of the model with a learning rate of its own, which may be frozen; None if there is no such part."""
        return None

    @property
    def num_processes(self) -> int:
        """Processes that train together."""
        return 1 if self._trainer is None else self.trainer.world_size

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; a frozen encoder stays in evaluation."""
        super().train(mode)
        if self.freeze_encoder and self.encoder is not None:
            self.encoder.eval()
        return self

    def model_to_keep(self) -> FolderModel:
        """The model that is saved."""
        return self.model

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Tie dropout and random attention to step and process, so that a resumed run repeats them."""
        torch.manual_seed(self.random_number(_MODEL, self.global_step, self.global_rank))

    def random_number(self, *purpose: int) -> int:
        """A seed that no other purpose has."""
        sequence = np.random.SeedSequence((self.seed, *purpose))
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Unscale the gradient (16-mixed), clear what is not finite and clip, each if asked for; log its norm.

        Lightning refuses to clip for an optimizer that unscales by itself, as fused ones do. Unscaled here, before
        anything is cleared, the gradient tells the scaler of an overflow, and the step is left out.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if self.optim.zero_nonfinite_gradients:
            for gradient in gradients:
                gradient.nan_to_num_(0.0, 0.0, 0.0)
        self.log("grad_norm", self._clip(gradients))

    def _clip(self, gradients: list[Tensor]) -> Tensor:
        """Norm of the gradient before clipping."""
        if self.optim.gradient_clip is None:
            return get_total_norm(gradients)
        return clip_grad_norm_(self.parameters(), self.optim.gradient_clip)

    def log_loss(self, stage: str, loss: Tensor, batch_size: int) -> None:
        """Log ``train_loss`` at every step; keep that of the validation for `on_validation_epoch_end`."""
        if stage == "train":
            self.log("train_loss", loss.detach())
        else:
            self.val_losses.update(loss.detach() * batch_size, batch_size)

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss``, the mean over the samples of all processes."""
        total, count = self.val_losses.compute()
        self.val_losses.reset()
        self.log("val_loss", total / count)


class Sums(Metric):
    """Sums of values and of what they are divided by, over all batches and processes.

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
