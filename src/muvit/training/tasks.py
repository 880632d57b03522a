"""Training tasks: one base with the hooks that all share, and segmentation, pre-training and classification."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchmetrics import CatMetric

from muvit.data.crops.stored import finish
from muvit.errors import InputError
from muvit.levels import level_name
from muvit.losses import SegmentationLoss
from muvit.metrics import class_scores, mean_of_slides, scores
from muvit.models.classifier import Classifier
from muvit.models.folder import FolderModel
from muvit.models.mae import MuViTMAE
from muvit.models.masking import TokenMask
from muvit.models.segmentation_model import SegmentationModel
from muvit.training.optim import (
    OptimConfig,
    PretrainOptimConfig,
    build_optimizer,
    build_plateau,
    build_pretrain_optimizer,
    build_schedule,
)
from muvit.training.pretrained import merge_lora
from muvit.training.totals import Confusion, Sums

_TRAINING_MASK, _VALIDATION_MASK, _MODEL = 0, 1, 2
"""Purposes of random numbers: masks, and dropout with random attention."""

AnyOptim = OptimConfig | PretrainOptimConfig


class BaseTask(LightningModule):
    """Hooks of a training step, whatever the model.

    Logs ``train_loss`` and ``grad_norm`` at every step: the norm of the gradient of all parameters before clipping.

    Args:
        model: the model to train.
        optim: optimiser settings.
        seed: of all random numbers of the steps.
        freeze_encoder: leave `encoder` as it is, in evaluation mode.
    """

    model: FolderModel
    optim: AnyOptim

    def __init__(self, model: FolderModel, optim: AnyOptim, *, seed: int = 0, freeze_encoder: bool = False) -> None:
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

    @property
    def accumulate(self) -> int:
        """Batches per step."""
        return 1 if self._trainer is None else self.trainer.accumulate_grad_batches

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; a frozen encoder stays in evaluation."""
        super().train(mode)
        if self.freeze_encoder and self.encoder is not None:
            self.encoder.eval()
        return self

    def model_to_keep(self) -> FolderModel:
        """The model that is saved: plain weights, with low-rank additions merged into them."""
        return merge_lora(self.model)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Tensor]:
        """Normalise and augment the pixels of the package's own data sets, on the device."""
        return finish(batch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout and random attention by step and process, so that a resumed run repeats them."""
        torch.manual_seed(self.random_number(_MODEL, self.batch_number(batch_idx), self.global_rank))

    def batch_number(self, batch_idx: int) -> int:
        """Number of a batch of an epoch among those of the run, of which every step takes as many."""
        return self.global_step * self.accumulate + batch_idx % self.accumulate

    def random_number(self, *purpose: int) -> int:
        """A seed that no other purpose has."""
        sequence = np.random.SeedSequence((self.seed, *purpose))
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Unscale the gradient (16-mixed), replace non-finite entries and clip, each if asked for; log its norm.

        Lightning refuses to clip for an optimizer that unscales by itself, as fused ones do. The gradient is unscaled
        here, before non-finite entries are replaced, so that the scaler notices an overflow and skips the step.
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

    def loss_and_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss and logits of one batch."""
        raise NotImplementedError

    def update_scores(self, logits: Tensor, batch: dict[str, Tensor]) -> None:
        """Add the predictions of one validation batch to the scores."""
        raise NotImplementedError

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Loss of one batch."""
        loss, _ = self.loss_and_logits(batch)
        self.log("train_loss", loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> Tensor | dict[str, Any]:
        """Logits of one batch, whose loss and predictions are added to those of the epoch."""
        loss, logits = self.loss_and_logits(batch)
        self.val_losses.update(loss.detach() * len(logits), len(logits))
        self.update_scores(logits, batch)
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss``, the mean over the samples of all processes."""
        total, count = self.val_losses.compute()
        self.val_losses.reset()
        self.log("val_loss", total / count)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine, stepped with every batch."""
        assert isinstance(self.optim, OptimConfig)
        optimizer = build_optimizer(self.model, self.encoder, self.optim)
        return self._with_cosine(optimizer, self.optim.warmup_fraction)

    def _with_cosine(
        self, optimizer: torch.optim.Optimizer, warmup_fraction: float, warmup_start: float = 0.0
    ) -> dict[str, Any]:
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(optimizer, steps, warmup_fraction, warmup_start)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SegmentationTask(BaseTask):
    """Trains a `SegmentationModel` on samples with ``img``, ``bbox`` and ``label``.

    Beside the values of `BaseTask`, logs after each validation ``val_loss``, ``val_mdsc``, ``val_mean_iou``,
    ``val_mean_foreground_iou``, ``val_accuracy`` and ``val_dice/<class>``, from one confusion matrix of all pixels.

    Args:
        model: the model to train.
        loss: from logits and labels to a scalar.
        optim: optimiser settings.
        class_names: name of each class.
        freeze_encoder: leave the encoder as it is, in evaluation mode.
        seed: of all random numbers of the steps.
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
        self.confusion = Confusion(len(self.class_names))

    @property
    def encoder(self) -> nn.Module | None:
        """The model's pre-trained part, if it has one."""
        return self.model.backbone

    def loss_and_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss and logits ``(B, K, *space)`` of one batch."""
        return self.model.training_loss(batch, self.loss)

    def update_scores(self, logits: Tensor, batch: dict[str, Tensor]) -> None:
        """Add the pixels of one batch to the confusion matrix."""
        self.confusion.update(logits.argmax(1), batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all validation pixels."""
        super().on_validation_epoch_end()
        confusion = self.confusion.compute().cpu().numpy()
        result = scores(confusion, ignore=self.ignore_labels, has_background=self.has_background)
        self.confusion.reset()
        # a class that is ignored, or neither occurs nor is predicted, has no score to log
        named = {f"val_dice/{name}": d for name, d in zip(self.class_names, result.dice, strict=True) if d == d}
        self.log_dict(named | {"val_accuracy": result.accuracy, "val_mean_iou": result.mean_iou})
        self.log("val_mean_foreground_iou", result.mean_foreground_iou)
        self.log("val_mdsc", result.mean_dice, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with a warm-up stepped with every batch, and then a cosine, or decay at plateaus."""
        if self.optim.schedule == "cosine":
            return super().configure_optimizers()
        optimizer = build_optimizer(self.model, self.encoder, self.optim)
        warmup, decay = build_plateau(optimizer, int(self.trainer.estimated_stepping_batches), self.optim)
        every = self.trainer.check_val_every_n_epoch
        plateau = {"scheduler": decay, "interval": "epoch", "frequency": every, "monitor": self.monitor}
        return [optimizer], [{"scheduler": warmup, "interval": "step"}, plateau]


class PretrainTask(BaseTask):
    """Trains a `MuViTMAE` on samples with ``img`` and ``bbox``.

    Pixels that are NaN or infinite become 0 before the model sees them, so that none reaches a loss or a gradient.
    Masks follow from the seed, the step and the sample's place among those of all processes, whatever their number;
    those of the validation are the same in every epoch.
    Logs ``train_loss`` at every step, and with each validation ``val_loss`` and ``val_loss/level_<level>``.

    Args:
        model: the model to train.
        optim: optimiser settings.
        batch_size: samples per step and device.
        seed: of the masks, and of all other random numbers of the steps.
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

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Refuse invalid batches while they are on the CPU, where reading values does not wait for the device."""
        if not isinstance(batch, dict) or not {"img", "bbox"} <= set(batch):
            got = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
            raise InputError("batch", expected="a dict with the keys 'img' and 'bbox'", got=got)
        img, bbox = batch["img"], batch["bbox"]
        if not img.is_floating_point() and "look" not in batch:
            raise InputError("img", expected="floating-point pixels", got=img.dtype, hint="Normalise the images.")
        if bbox.device.type == "cpu" and not torch.isfinite(bbox).all():
            raise InputError("bbox", expected="finite coordinates", got="NaN or infinity")
        return {name: batch[name] for name in ("img", "bbox", "look", "inside") if name in batch}

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Tensor]:
        """As `BaseTask`; then replace pixels that are not finite by 0."""
        batch = finish(batch)
        return batch | {"img": torch.nan_to_num(batch["img"], nan=0.0, posinf=0.0, neginf=0.0)}

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Loss of one batch."""
        result, _ = self._step(self.model, batch, _TRAINING_MASK, self.batch_number(index))
        self.log("train_loss", result["loss"].detach())
        return result["loss"]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the averaged weights after a step."""
        is_step = (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch
        if self.average is not None and is_step:
            assert self.optim.ema_decay is not None
            update = get_ema_multi_avg_fn(self.optim.ema_decay)
            update(list(self.average.parameters()), list(self.model.parameters()), None)

    def validation_step(self, batch: dict[str, Tensor], index: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Outputs of the model for one batch with its ``mask``; its errors are added to those of each level."""
        result, mask = self._step(self.model_to_keep(), batch, _VALIDATION_MASK, index)
        count = mask.is_masked.unflatten(1, (len(self.model.levels), -1)).sum((0, 2))
        # the loss of a level without masked tokens is NaN
        self.val_losses.update(torch.where(count > 0, result["loss_per_level"] * count, 0), count)
        return {**result, "mask": mask}

    def on_validation_epoch_end(self) -> None:
        """Log the losses over all masked tokens of all batches and processes."""
        per_level, loss = self.model.average(*self.val_losses.compute())
        self.val_losses.reset()
        self.log("val_loss", loss, prog_bar=True)
        for level, value in zip(self.model.levels, per_level, strict=True):
            self.log(f"val_loss/level_{level_name(level)}", value)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine, stepped with every batch."""
        total_batch = self.batch_size * self.num_processes * self.accumulate
        optimizer = build_pretrain_optimizer(self.model, self.optim, total_batch)
        epochs = self.trainer.max_epochs or 1
        return self._with_cosine(optimizer, self.optim.warmup_epochs / epochs, self.optim.warmup_start)

    def _step(
        self, model: MuViTMAE, batch: dict[str, Tensor], purpose: int, step: int
    ) -> tuple[dict[str, Tensor], TokenMask]:
        mask = self._mask(batch["img"], purpose, step)
        return model(batch["img"], batch["bbox"] if self.use_boxes else None, mask=mask), mask

    def _mask(self, img: Tensor, purpose: int, step: int) -> TokenMask:
        """This process's rows of a mask for the samples of all processes, which alternate."""
        if self._masks is None or self._masks.device != self.device:
            self._masks = torch.Generator(self.device)
        self._masks.manual_seed(self.random_number(purpose, step))
        rows = self.num_processes * max(self.batch_size, len(img))
        whole = self.model.draw_mask(rows, img.shape[3:], self._masks)
        return TokenMask(whole.order[self.global_rank :: self.num_processes][: len(img)], whole.num_visible)


class ClassificationTask(BaseTask):
    """Trains a `Classifier` on samples with ``img``, ``bbox``, ``class`` and ``slide``.

    The loss is the cross entropy of crops. Beside the values of `BaseTask`, logs after each validation ``val_loss``,
    ``val_accuracy`` and ``val_auc`` of slides, by the mean probabilities of their crops, and ``val_crop_accuracy`` and
    ``val_crop_auc``. The AUC is the mean of the one-vs-all ones.

    Args:
        model: the classifier.
        optim: optimiser settings.
        freeze_encoder: leave the encoder as it is, in evaluation mode.
        seed: of all random numbers of the steps.
    """

    model: Classifier
    optim: OptimConfig

    def __init__(self, model: Classifier, optim: OptimConfig, *, freeze_encoder: bool = False, seed: int = 0) -> None:
        super().__init__(model, optim, seed=seed, freeze_encoder=freeze_encoder)
        # (N, K + 2): probabilities, class and slide of each crop; checking for NaN would wait for the device
        self.predictions = CatMetric(nan_strategy="disable")

    @property
    def encoder(self) -> nn.Module:
        """The encoder of the classifier."""
        return self.model.encoder

    def loss_and_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss and logits ``(B, K)`` of one batch."""
        logits = self.model(batch["img"], batch["bbox"])
        return nn.functional.cross_entropy(logits.float(), batch["class"]), logits

    def update_scores(self, logits: Tensor, batch: dict[str, Tensor]) -> None:
        """Keep the probabilities of one batch."""
        truth = torch.stack([batch["class"], batch["slide"]], dim=1)
        self.predictions.update(torch.cat([logits.float().softmax(1), truth.float()], dim=1))

    def on_validation_epoch_end(self) -> None:
        """Log the scores of crops and of slides."""
        super().on_validation_epoch_end()
        table = self.predictions.compute().double().cpu().numpy()
        self.predictions.reset()
        crops, classes, slides = table[:, :-2], table[:, -2].astype(np.int64), table[:, -1].astype(np.int64)
        for prefix, (probabilities, truth) in {
            "val_crop": (crops, classes),
            "val": mean_of_slides(crops, classes, slides),
        }.items():
            accuracy, auc = class_scores(probabilities, truth)
            self.log(f"{prefix}_accuracy", accuracy)
            if auc == auc:  # undefined where all slides are of one class
                self.log(f"{prefix}_auc", auc, prog_bar=prefix == "val")
