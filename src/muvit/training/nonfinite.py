"""Losses and weights that become NaN or infinite, found before anything of them is saved."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from muvit.errors import InputError
from muvit.training.datamodules import CropsData
from muvit.training.tasks import BaseTask

_LOOK_EVERY = 16
_LOWER = "The models that were saved before are kept; mend the pixels, or lower optim.lr."


class StopAtNonFinite(Callback):
    """Ends a run whose loss or weights become NaN or infinite; what was saved before stays.

    The loss is looked at on the device, and asked for where that does not wait: after each step on a CPU, else after
    every 16th, and before anything is saved. With ``optim.zero_nonfinite_gradients`` only weights count: such a step
    changes nothing.

    Args:
        data: the batches, to name the slide and window of a sample; None for those of a user's own loader.
    """

    def __init__(self, data: CropsData | None = None) -> None:
        self.data = data
        self._first: Tensor | None = None  # number of the first batch whose loss was not finite, or -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss."""
        assert isinstance(pl_module, BaseTask)
        if pl_module.optim.zero_nonfinite_gradients:
            return
        loss = outputs["loss"].detach()
        if self._first is None:
            self._first = torch.full((), -1, device=loss.device)
        number = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx
        self._first = torch.where(~loss.isfinite() & (self._first < 0), number, self._first)
        if loss.device.type == "cpu" or batch_idx % _LOOK_EVERY == 0:
            self._check_loss(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the loss and the weights before the models of the epoch are saved."""
        self.check(trainer, pl_module)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to go on with what is not finite.

        Raises:
            InputError: the loss of a step was not finite, or weights are not; names the step, and slide and window.
        """
        self._check_loss(trainer)
        tensors = [tensor for tensor in pl_module.state_dict().values() if tensor.is_floating_point()]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            expected = "weights that are finite numbers"
            raise InputError(f"step {trainer.global_step}", expected=expected, got="NaN or infinity", hint=_LOWER)

    def _check_loss(self, trainer: Trainer) -> None:
        first = -1 if self._first is None else int(self._first)
        if first < 0:
            return
        epoch, batch = divmod(first, int(trainer.num_training_batches))
        step = epoch * -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        step += batch // trainer.accumulate_grad_batches + 1
        subject = f"step {step} (batch {batch} of epoch {epoch})"
        hint = _LOWER if self.data is None else f"{self._extreme_sample(trainer, self.data, epoch, batch)} {_LOWER}"
        raise InputError(subject, expected="a finite loss", got="NaN or infinity", hint=hint)

    def _extreme_sample(self, trainer: Trainer, data: CropsData, epoch: int, batch: int) -> str:
        """One sentence on the sample of a batch with the largest pixel value."""
        crops, size = data.train_crops, data.data.batch_size
        first = epoch * len(crops) + trainer.global_rank + batch * size * trainer.world_size
        samples = {i: crops[i] for i in range(first, first + size * trainer.world_size, trainer.world_size)}
        peaks = {i: float(sample["img"].abs().max()) for i, sample in samples.items()}
        largest = max(peaks, key=lambda i: peaks[i])
        window = " to ".join(str(corner) for corner in samples[largest]["bbox"][0].round().int().tolist())
        slide = crops.slide_of(largest).path
        return f"Its largest value, {peaks[largest]:.3g}, is in {slide}, in the window {window} of the finest level."
