"""Pre-training a masked autoencoder: one shared step, masks that a resumed run draws again."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from muvit.errors import InputError
from muvit.levels import level_name
from muvit.models.mae import MuViTMAE
from muvit.models.masking import TokenMask
from muvit.training.optim import PretrainOptimConfig, build_pretrain_optimizer, build_schedule
from muvit.training.task import BaseTask, Sums

_TRAIN, _VALIDATE = 0, 1


class PretrainTask(BaseTask):
    """Trains a `MuViTMAE` on samples with ``img`` and ``bbox``.

    Pixels that are NaN or infinite become 0 before the model sees them, so that none reaches a loss or a gradient.
    Masks follow from the seed, the step and the sample's place among those of all processes, whatever their number;
    those of the validation are the same in every epoch.
    Logs ``train_loss`` at every step, and with each validation ``val_loss`` and ``val_loss/level_<level>``.

    Args:
        model: the model.
        optim: optimiser settings.
        batch_size: samples per step and device.
        seed: of the masks, and of whatever else is random in the model.
        use_boxes: false hides the boxes from the model, which then places all levels around one common centre.
    """

    model: MuViTMAE
    optim: PretrainOptimConfig

    def __init__(
        self,
        model: MuViTMAE,
        optim: PretrainOptimConfig,
        *,
        batch_size: int,
        seed: int = 0,
        use_boxes: bool = True,
    ) -> None:
        super().__init__(model, optim, seed=seed)
        self.batch_size, self.use_boxes = batch_size, use_boxes
        self.average = None if optim.ema_decay is None else copy.deepcopy(model).requires_grad_(False)
        self.val_losses = Sums(len(model.levels))
        self._masks: torch.Generator | None = None

    def model_to_keep(self) -> MuViTMAE:
        """The model that is validated and saved: with averaged weights, if they are averaged."""
        return self.model if self.average is None else self.average

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Refuse what no model can take, while looking at it costs no waiting for the device."""
        if not isinstance(batch, dict) or not {"img", "bbox"} <= set(batch):
            got = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
            raise InputError("batch", expected="a dict with the keys 'img' and 'bbox'", got=got)
        img, bbox = batch["img"], batch["bbox"]
        if not img.is_floating_point():
            raise InputError("img", expected="floating-point pixels", got=img.dtype, hint="Normalise the images.")
        if bbox.device.type == "cpu" and not torch.isfinite(bbox).all():
            raise InputError("bbox", expected="finite coordinates", got="NaN or infinity")
        return {"img": img, "bbox": bbox}

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Replace pixels that are not finite by 0."""
        return batch | {"img": torch.nan_to_num(batch["img"], nan=0.0, posinf=0.0, neginf=0.0)}

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Loss of one batch."""
        result, _ = self._step(self.model, batch, _TRAIN, self.global_step)
        self.log_loss("train", result["loss"], len(batch["img"]))
        return result["loss"]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the averaged weights."""
        if self.average is not None:
            assert self.optim.ema_decay is not None
            update = get_ema_multi_avg_fn(self.optim.ema_decay)
            update(list(self.average.parameters()), list(self.model.parameters()), None)

    def validation_step(self, batch: dict[str, Tensor], index: int, dataloader_idx: int = 0) -> None:
        """Add the errors of one batch to those of each level."""
        result, mask = self._step(self.model_to_keep(), batch, _VALIDATE, index)
        count = mask.is_masked.unflatten(1, (len(self.model.levels), -1)).sum((0, 2))
        # the loss of a level without masked tokens is NaN
        self.val_losses.update(torch.where(count > 0, result["loss_per_level"] * count, 0), count)

    def on_validation_epoch_end(self) -> None:
        """Log the losses over all masked tokens, whatever the batches and processes that they were in."""
        per_level, loss = self.model.average(*self.val_losses.compute())
        self.val_losses.reset()
        self.log("val_loss", loss, prog_bar=True)
        for level, value in zip(self.model.levels, per_level, strict=True):
            self.log(f"val_loss/level_{level_name(level)}", value)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine, stepped with every batch."""
        optimizer = build_pretrain_optimizer(self.model, self.optim, self.batch_size * self.num_processes)
        steps, epochs = int(self.trainer.estimated_stepping_batches), self.trainer.max_epochs or 1
        schedule = build_schedule(optimizer, steps, self.optim.warmup_epochs / epochs, self.optim.warmup_start)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _step(
        self, model: MuViTMAE, batch: dict[str, Tensor], purpose: int, step: int
    ) -> tuple[dict[str, Tensor], TokenMask]:
        mask = self._mask(batch["img"], purpose, step)
        return model(batch["img"], batch["bbox"] if self.use_boxes else None, mask=mask), mask

    def _mask(self, img: Tensor, purpose: int, step: int) -> TokenMask:
        """This process's rows of a mask for the samples of all processes, which take turns."""
        if self._masks is None or self._masks.device != self.device:
            self._masks = torch.Generator(self.device)
        self._masks.manual_seed(self.random_number(purpose, step))
        rows = self.num_processes * max(self.batch_size, len(img))
        whole = self.model.draw_mask(rows, img.shape[3:], self._masks)
        return TokenMask(whole.order[self.global_rank :: self.num_processes][: len(img)], whole.num_visible)
