"""Training a segmenter: one shared step, scores from a confusion matrix."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from muvit.labels import IGNORE
from muvit.losses import SegmentationLoss
from muvit.metrics import scores
from muvit.segmentation import SegmentationModel
from muvit.training.initial import merged
from muvit.training.optim import OptimConfig, build_optimizer, build_plateau, build_schedule


class SegmentationTask(LightningModule):
    """Trains a `SegmentationModel` on samples with ``img``, ``bbox`` and ``label``.

    Logs ``train_loss`` at every step, and after each validation ``val_loss``, ``val_mdsc``, ``val_mean_iou``,
    ``val_mean_foreground_iou``, ``val_accuracy`` and ``val_dice/<class>``.

    Args:
        model: what to train.
        loss: from logits and labels to a scalar.
        optim: optimiser settings.
        class_names: name of each class.
        freeze_encoder: leave the encoder as it is, in evaluation mode.
        seed: of whatever is random in the model.
        monitor: the logged score that a plateau schedule follows.
        has_background: whether class 0 is background.
    """

    def __init__(
        self,
        model: SegmentationModel,
        loss: SegmentationLoss,
        optim: OptimConfig,
        class_names: Sequence[str],
        *,
        freeze_encoder: bool = False,
        seed: int = 0,
        monitor: str = "val_mdsc",
        has_background: bool = True,
    ) -> None:
        super().__init__()
        self.freeze_encoder, self.seed, self.monitor = freeze_encoder, seed, monitor
        self.has_background = has_background
        self.model, self.loss, self.optim, self.class_names = model, loss, optim, tuple(class_names)
        self.confusion = MulticlassConfusionMatrix(len(self.class_names), ignore_index=IGNORE, validate_args=False)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; a frozen encoder stays in evaluation."""
        super().train(mode)
        if self.freeze_encoder and self.model.backbone is not None:
            self.model.backbone.eval()
        return self

    def model_to_keep(self) -> SegmentationModel:
        """The model that is saved: plain weights, adapters merged into them."""
        return merged(self.model)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Tie dropout and random attention to the step, so that a resumed run repeats them."""
        sequence = np.random.SeedSequence((self.seed, self.global_rank, self.global_step))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Loss of one batch."""
        return self._step(batch, "train")[0]

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Loss of one batch, and its pixels into the confusion matrix."""
        _, logits = self._step(batch, "val")
        self.confusion.update(logits.argmax(1), batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all validation pixels."""
        result = scores(self.confusion.compute().cpu().numpy(), has_background=self.has_background)
        self.confusion.reset()
        # a class that neither occurs nor is predicted has no score to log
        named = {f"val_dice/{name}": d for name, d in zip(self.class_names, result.dice, strict=True) if d == d}
        self.log_dict(named)
        self.log("val_accuracy", result.accuracy)
        self.log("val_mean_iou", result.mean_iou)
        self.log("val_mean_foreground_iou", result.mean_foreground_iou)
        self.log("val_mdsc", result.mean_dice, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with a warm-up stepped with every batch, and a cosine or falls at plateaus after it."""
        optimizer = build_optimizer(self.model, self.model.backbone, self.optim)
        steps = int(self.trainer.estimated_stepping_batches)
        if self.optim.schedule == "cosine":
            schedule = build_schedule(optimizer, steps, self.optim.warmup_fraction)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        warmup, fall = build_plateau(optimizer, steps, self.optim)
        falls = {
            "scheduler": fall,
            "interval": "epoch",
            "frequency": self.trainer.check_val_every_n_epoch,
            "monitor": self.monitor,
        }
        return [optimizer], [{"scheduler": warmup, "interval": "step"}, falls]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clear what is not finite from the gradients, if asked for; runs before they are clipped."""
        if self.optim.zero_nonfinite_gradients:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)

    def _step(self, batch: dict[str, Tensor], stage: str) -> tuple[Tensor, Tensor]:
        loss, logits = self.model.training_loss(batch, self.loss)
        on_train = stage == "train"
        self.log(f"{stage}_loss", loss.detach(), on_step=on_train, on_epoch=not on_train, batch_size=len(logits))
        return loss, logits
