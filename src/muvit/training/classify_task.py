"""Training a classifier: one shared step, scores of crops and of slides; and pictures of what it guesses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from torchmetrics import CatMetric

from muvit.levels import level_name
from muvit.metrics import class_scores, mean_of_slides
from muvit.models.classifier import Classifier
from muvit.pictures import panel, to_rgb
from muvit.training.callbacks import publish, spread
from muvit.training.optim import OptimConfig, build_optimizer, build_schedule
from muvit.training.pretrained import merged
from muvit.training.task import BaseTask


class ClassificationTask(BaseTask):
    """Trains a `Classifier` on samples with ``img``, ``bbox``, ``class`` and ``slide``.

    The loss is the cross entropy of crops. Logs ``train_loss`` at every step, and after each validation ``val_loss``,
    ``val_accuracy`` and ``val_auc`` of slides, by the mean probabilities of their crops, and ``val_crop_accuracy`` and
    ``val_crop_auc``. The AUC is the mean of the one-vs-all ones.

    Args:
        model: the classifier.
        optim: optimiser settings.
        freeze_encoder: leave the encoder as it is, in evaluation mode.
        seed: of whatever is random in the model.
    """

    model: Classifier
    optim: OptimConfig

    def __init__(self, model: Classifier, optim: OptimConfig, *, freeze_encoder: bool = False, seed: int = 0) -> None:
        super().__init__(model, optim, seed=seed, freeze_encoder=freeze_encoder)
        # (N, K + 2): probabilities, class and slide of each crop; looking for NaN would wait for the device
        self.guesses = CatMetric(nan_strategy="disable")

    @property
    def encoder(self) -> nn.Module:
        """The encoder of the classifier."""
        return self.model.encoder

    def model_to_keep(self) -> Classifier:
        """The model that is saved: plain weights, adapters merged into them."""
        return merged(self.model)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Loss of one batch."""
        return self._step(batch, "train")[0]

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Loss of one batch, and its probabilities."""
        _, logits = self._step(batch, "val")
        facts = torch.stack([batch["class"], batch["slide"]], dim=1)
        self.guesses.update(torch.cat([logits.float().softmax(1), facts.float()], dim=1))

    def on_validation_epoch_end(self) -> None:
        """Log the scores of crops and of slides."""
        super().on_validation_epoch_end()
        table = self.guesses.compute().double().cpu().numpy()
        self.guesses.reset()
        shares, classes, slides = table[:, :-2], table[:, -2].astype(np.int64), table[:, -1].astype(np.int64)
        for prefix, (guess, truth) in {
            "val_crop": (shares, classes),
            "val": mean_of_slides(shares, classes, slides),
        }.items():
            accuracy, auc = class_scores(guess, truth)
            self.log(f"{prefix}_accuracy", accuracy)
            if auc == auc:  # undefined where all slides are of one class
                self.log(f"{prefix}_auc", auc, prog_bar=prefix == "val")

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine, stepped with every batch."""
        optimizer = build_optimizer(self.model, self.encoder, self.optim)
        schedule = build_schedule(optimizer, int(self.trainer.estimated_stepping_batches), self.optim.warmup_fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _step(self, batch: Mapping[str, Tensor], stage: str) -> tuple[Tensor, Tensor]:
        logits = self.model(batch["img"], batch["bbox"])
        loss = nn.functional.cross_entropy(logits.float(), batch["class"])
        self.log_loss(stage, loss, len(logits))
        return loss, logits


class ExampleClasses(Callback):
    """Draws the same few validation crops after each validation, with their true and guessed classes.

    Args:
        folder: receives ``epoch_<n>.png``.
        dataset: validation crops.
        count: number of crops, spread evenly over the data set.
        class_names: name of each class.
    """

    def __init__(self, folder: Path, dataset: Dataset, count: int, class_names: Sequence[str]) -> None:
        self.folder, self.class_names, self.samples = folder, class_names, spread(dataset, count)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, unless Lightning is only trying out the validation."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, ClassificationTask)
        batch = default_collate(self.samples)
        with torch.inference_mode():
            logits = pl_module.model(batch["img"].to(pl_module.device), batch["bbox"].to(pl_module.device))
        guesses, levels = logits.float().softmax(1).cpu().numpy(), pl_module.model.config.encoder.levels
        rows = []
        for sample, guess in zip(self.samples, guesses, strict=True):
            truth, best = self.class_names[int(sample["class"])], int(guess.argmax())
            verdict = f"{truth}? {self.class_names[best]} {guess[best]:.0%}"
            titles = [verdict, *(f"level {level_name(level)}" for level in levels[1:])]
            rows.append(
                [(title, to_rgb(_middle(view.numpy()))) for title, view in zip(titles, sample["img"], strict=True)]
            )
        publish(panel(rows), trainer, self.folder, "examples")


def _middle(view: np.ndarray) -> np.ndarray:
    """Middle slice ``(C, H, W)`` of a view ``(C, *space)``."""
    while view.ndim > 3:
        view = view[:, view.shape[1] // 2]
    return view
