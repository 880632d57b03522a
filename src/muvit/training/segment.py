"""Training a segmenter: one shared step, scores from a confusion matrix."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from muvit.labels import IGNORE
from muvit.losses import SegmentationLoss
from muvit.metrics import scores
from muvit.segmentation import Segmenter
from muvit.training.optim import OptimConfig, build_optimizer, build_schedule


class SegmentationTask(LightningModule):
    """Trains a `Segmenter` on samples with ``img``, ``bbox`` and ``label``.

    Logs ``train_loss`` at every step, and after each validation ``val_loss``, ``val_mdsc`` and ``val_dice/<class>``.

    Args:
        model: the segmenter.
        loss: from logits and labels to a scalar.
        optim: optimiser settings.
        class_names: name of each class, background first.
    """

    def __init__(
        self, model: Segmenter, loss: SegmentationLoss, optim: OptimConfig, class_names: Sequence[str]
    ) -> None:
        super().__init__()
        self.model, self.loss, self.optim, self.class_names = model, loss, optim, tuple(class_names)
        self.confusion = MulticlassConfusionMatrix(len(self.class_names), ignore_index=IGNORE, validate_args=False)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Loss of one batch."""
        return self._step(batch, "train")[0]

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Loss of one batch, and its pixels into the confusion matrix."""
        _, logits = self._step(batch, "val")
        self.confusion.update(logits.argmax(1), batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all validation pixels."""
        result = scores(self.confusion.compute().cpu().numpy())
        self.confusion.reset()
        # a class that neither occurs nor is predicted has no score to log
        named = {f"val_dice/{name}": d for name, d in zip(self.class_names, result.dice, strict=True) if d == d}
        self.log_dict(named)
        self.log("val_mdsc", result.mean_dice, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine, stepped with every batch."""
        optimizer = build_optimizer(self.model, self.model.encoder, self.optim)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(optimizer, steps, self.optim.warmup_fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _step(self, batch: dict[str, Tensor], stage: str) -> tuple[Tensor, Tensor]:
        logits = self.model(batch["img"], batch["bbox"])
        loss = self.loss(logits, batch["label"])
        on_train = stage == "train"
        self.log(f"{stage}_loss", loss.detach(), on_step=on_train, on_epoch=not on_train, batch_size=len(logits))
        return loss, logits


def precision_for(accelerator: str) -> str:
    """bfloat16 mixed precision on a GPU, full precision elsewhere."""
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    return "bf16-mixed" if on_gpu else "32-true"
