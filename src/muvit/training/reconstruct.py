"""Pre-training a masked autoencoder: one shared step, masks that a resumed run draws again."""

import copy
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchmetrics import MeanMetric

from muvit.errors import InputError
from muvit.geometry import level_name
from muvit.models.mae import MuViTMAE
from muvit.training.optim import PretrainOptimConfig, build_pretrain_optimizer, build_schedule

_TRAIN, _VALIDATE, _MODEL = 0, 1, 2


class PretrainTask(LightningModule):
    """Trains a `MuViTMAE` on samples with ``img`` and ``bbox``.

    Pixels that are NaN or infinite become 0 before the model sees them, so that none reaches a loss or a gradient.
    Masks follow from the seed, the step and the process alone; those of the validation are the same in every epoch.
    Logs ``train_loss`` at every step, and with each validation ``val_loss`` and ``val_loss/level_<level>``.

    Args:
        model: the model.
        optim: optimiser settings.
        batch_size: samples per step and device.
        seed: of the masks, and of whatever else is random in the model.
        use_boxes: false hides the boxes from the model, which then places all levels around one common centre.
    """

    def __init__(
        self,
        model: MuViTMAE,
        optim: PretrainOptimConfig,
        *,
        batch_size: int,
        seed: int = 0,
        use_boxes: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.optim, self.batch_size, self.seed, self.use_boxes = model, optim, batch_size, seed, use_boxes
        self.average = None if optim.ema_decay is None else copy.deepcopy(model).requires_grad_(False)
        self.level_losses = nn.ModuleList(MeanMetric(nan_strategy="ignore") for _ in model.levels)
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

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Tie dropout and random attention to the step, so that a resumed run repeats them."""
        torch.manual_seed(self._number(_MODEL, self.global_step))

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Loss of one batch."""
        return self._step(self.model, batch, "train", _TRAIN, self.global_step)["loss"]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the averaged weights."""
        if self.average is not None:
            assert self.optim.ema_decay is not None
            update = get_ema_multi_avg_fn(self.optim.ema_decay)
            update(list(self.average.parameters()), list(self.model.parameters()), None)

    def validation_step(self, batch: dict[str, Tensor], index: int, dataloader_idx: int = 0) -> None:
        """Loss of one batch, overall and of each level."""
        result = self._step(self.model_to_keep(), batch, "val", _VALIDATE, index)
        for level, metric, loss in zip(self.model.levels, self.level_losses, result["loss_per_level"], strict=True):
            assert isinstance(metric, MeanMetric)
            metric.update(loss)
            self.log(f"val_loss/level_{level_name(level)}", metric, add_dataloader_idx=False)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine, stepped with every batch."""
        optimizer = build_pretrain_optimizer(self.model, self.optim, self.batch_size * self.trainer.world_size)
        steps, epochs = int(self.trainer.estimated_stepping_batches), self.trainer.max_epochs or 1
        schedule = build_schedule(optimizer, steps, self.optim.warmup_epochs / epochs, self.optim.warmup_start)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _step(
        self, model: MuViTMAE, batch: dict[str, Tensor], stage: str, purpose: int, step: int
    ) -> dict[str, Tensor]:
        if self._masks is None or self._masks.device != self.device:
            self._masks = torch.Generator(self.device)
        self._masks.manual_seed(self._number(purpose, step))
        bbox = batch["bbox"] if self.use_boxes else None
        result = model(batch["img"], bbox, mask=model.draw_mask(len(batch["img"]), batch["img"].shape[3:], self._masks))
        on_train, size = stage == "train", len(batch["img"])
        self.log(
            f"{stage}_loss",
            result["loss"].detach(),
            on_step=on_train,
            on_epoch=not on_train,
            prog_bar=not on_train,
            sync_dist=not on_train,
            batch_size=size,
            add_dataloader_idx=False,
        )
        return result

    def _number(self, purpose: int, step: int) -> int:
        """A seed that no other purpose, step or process has."""
        sequence = np.random.SeedSequence((self.seed, purpose, self.global_rank, step))
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
