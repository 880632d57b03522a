"""Training a segmenter: one shared step, scores from a confusion matrix."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from muvit.labels import IGNORE
from muvit.losses import SegmentationLoss
from muvit.metrics import scores
from muvit.models.segmentation_model import SegmentationModel
from muvit.training.optim import OptimConfig, build_optimizer, build_plateau, build_schedule
from muvit.training.pretrained import merged
from muvit.training.task import BaseTask


class SegmentationTask(BaseTask):
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
        ignore_labels: label values without a score, even where a model predicts them.
    """

    model: SegmentationModel
    optim: OptimConfig

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
        ignore_labels: Sequence[int] = (),
    ) -> None:
        super().__init__(model, optim, seed=seed, freeze_encoder=freeze_encoder)
        self.loss, self.class_names, self.monitor = loss, tuple(class_names), monitor
        self.has_background, self.ignore_labels = has_background, tuple(ignore_labels)
        self.confusion = MulticlassConfusionMatrix(len(self.class_names), ignore_index=IGNORE, validate_args=False)

    @property
    def encoder(self) -> nn.Module | None:
        """The model's pre-trained part, if it has one."""
        return self.model.backbone

    def model_to_keep(self) -> SegmentationModel:
        """The model that is saved: plain weights, adapters merged into them."""
        return merged(self.model)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Loss of one batch."""
        return self._step(batch, "train")[0]

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Loss of one batch, and its pixels into the confusion matrix."""
        _, logits = self._step(batch, "val")
        self.confusion.update(logits.argmax(1), batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all validation pixels."""
        super().on_validation_epoch_end()
        result = scores(
            self.confusion.compute().cpu().numpy(), ignore=self.ignore_labels, has_background=self.has_background
        )
        self.confusion.reset()
        # a class that is ignored, or neither occurs nor is predicted, has no score to log
        named = {f"val_dice/{name}": d for name, d in zip(self.class_names, result.dice, strict=True) if d == d}
        self.log_dict(named)
        self.log("val_accuracy", result.accuracy)
        self.log("val_mean_iou", result.mean_iou)
        self.log("val_mean_foreground_iou", result.mean_foreground_iou)
        self.log("val_mdsc", result.mean_dice, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with a warm-up stepped with every batch, and a cosine or falls at plateaus after it."""
        optimizer = build_optimizer(self.model, self.encoder, self.optim)
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

    def _step(self, batch: dict[str, Tensor], stage: str) -> tuple[Tensor, Tensor]:
        loss, logits = self.model.training_loss(batch, self.loss)
        self.log_loss(stage, loss, len(logits))
        return loss, logits
