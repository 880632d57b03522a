"""Details of the best validation of a run: its worst and best crops, and its pixels by class."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.crops.slide_crops import SlideCrops
from muvit.durable import write_whole
from muvit.labels import IGNORE
from muvit.metrics import confusion_matrix, scores
from muvit.models.masking import TokenMask
from muvit.pictures import Picture, panel
from muvit.training.callbacks import SIDE_PX, SaveBestAndLast, labelled_row, reconstruction_rows
from muvit.training.tasks import PretrainTask, SegmentationTask

VALIDATION, WORST_AND_BEST = "validation.json", "worst_and_best.png"
"""Files of a run with the pixels of its best validation by class, and among its pictures with crops of it."""


class Ranked(NamedTuple):
    """A validation crop and its score."""

    score: float
    number: int
    sample: dict[str, Tensor]
    result: Any
    """Prediction, or mask, that a picture shows beside the sample."""


class BestValidation(Callback):
    """Draws the worst and best crops of the best validation into ``pictures/worst_and_best.png``. Base of two.

    With several processes these are the crops that the first one has validated.

    Args:
        folder: of the run.
        crops: validation crops.
        kept: says whether a validation is the best so far.
        count: worst crops, and best ones, to show.
    """

    score_name = "score"
    """Name of the score in captions."""
    lower_is_better = False
    """Whether the score is a loss."""

    def __init__(self, folder: Path, crops: SlideCrops, kept: SaveBestAndLast, *, count: int = 2) -> None:
        self.folder, self.crops, self.kept, self.count = folder, crops, kept, count

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to rank."""
        self.seen = 0
        self.worst: list[Ranked] = []
        self.best: list[Ranked] = []

    def next_number(self, trainer: Trainer) -> int:
        """Number of the next crop of this process, as `CropsData.val_dataloader` divides them among the processes."""
        number = trainer.global_rank + trainer.world_size * self.seen
        self.seen += 1
        return number

    def rank(self, score: float, number: int, sample: dict[str, Tensor], result: Any) -> None:
        """Keep a crop if it is among the worst or best; one without a score (NaN) is neither.

        Args:
            score: of the crop.
            number: of the crop.
            sample: its entries that the picture needs.
            result: prediction, or mask, that the picture shows beside the sample.
        """
        worse = -1 if self.lower_is_better else 1
        for ranked, sign in ((self.worst, worse), (self.best, -worse)):
            if score == score and (len(ranked) < self.count or sign * score < sign * ranked[-1].score):
                kept = {name: entry.cpu() for name, entry in sample.items()}
                ranked.append(Ranked(score, number, kept, result))
                ranked.sort(key=lambda crop: sign * crop.score)
                del ranked[self.count :]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, if the weights of this epoch are the best; `SaveBestAndLast` has its turn before."""
        if self.kept.is_improved and trainer.is_global_zero:
            self.draw(pl_module)

    def draw(self, task: LightningModule) -> None:
        """Draw the crops, worst first."""
        rows: list[list[Picture]] = []
        captions: list[str] = []
        for title, crop in [*(("worst", crop) for crop in self.worst), *(("best", crop) for crop in self.best)]:
            own = self.rows(task, crop)
            rows += own
            caption = f"{title}: {self.crops.slide_of(crop.number).name}, {self.score_name} {crop.score:.3f}"
            captions += [caption, *[""] * (len(own) - 1)]
        if rows:
            (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
            panel(rows, size=SIDE_PX, captions=captions).save(self.folder / "pictures" / WORST_AND_BEST)

    def rows(self, task: LightningModule, crop: Ranked) -> list[list[Picture]]:
        """Rows of pictures of a crop, for `muvit.pictures.panel`."""
        raise NotImplementedError


class BestLabels(BestValidation):
    """Truth and prediction of the worst and best crops by mDSC; also writes the pixels of each slide by class.

    ``validation.json`` holds the confusion matrix of each slide.

    Args:
        folder: of the run.
        crops: validation crops.
        preprocessing: classes and their colours.
        kept: says whether a validation is the best so far.
        ignore_labels: label values without a score.
        count: worst crops, and best ones, to show.
    """

    score_name = "mDSC"

    def __init__(
        self,
        folder: Path,
        crops: SlideCrops,
        preprocessing: Preprocessing,
        kept: SaveBestAndLast,
        ignore_labels: Sequence[int] = (),
        *,
        count: int = 2,
    ) -> None:
        super().__init__(folder, crops, kept, count=count)
        self.preprocessing = preprocessing
        self.ignore, self.num_classes = tuple(ignore_labels), len(preprocessing.class_names)
        self.slides = {str(image.path): number for number, image in enumerate(crops.images)}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to rank and to count."""
        super().on_validation_epoch_start(trainer, pl_module)
        self.confusion = np.zeros((len(self.slides), self.num_classes, self.num_classes), np.int64)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count the pixels of each crop, and rank it."""
        predictions, labels = outputs.argmax(1).cpu().numpy(), batch["label"].cpu().numpy()
        for i, (prediction, label) in enumerate(zip(predictions, labels, strict=True)):
            number = self.next_number(trainer)
            confusion = confusion_matrix(label, prediction, self.num_classes, (IGNORE,))
            self.confusion[self.slides[str(self.crops.slide_of(number).path)]] += confusion
            score = scores(confusion, ignore=self.ignore, has_background=self.preprocessing.has_background).mean_dice
            self.rank(score, number, {name: batch[name][i] for name in ("img", "bbox", "label")}, prediction)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, if the weights of this epoch are the best; `SaveBestAndLast` has its turn before."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self.kept.is_improved:
            return
        confusion = trainer.strategy.reduce(torch.from_numpy(self.confusion).to(pl_module.device), reduce_op="sum")
        if not trainer.is_global_zero:
            return
        content = {
            "epoch": trainer.current_epoch,
            "class_names": list(self.preprocessing.class_names),
            "has_background": self.preprocessing.has_background,
            "ignore": list(self.ignore),
            "slides": [
                {"name": image.name, "confusion": own}
                for image, own in zip(self.crops.images, confusion.tolist(), strict=True)
            ],
        }
        write_whole(self.folder / VALIDATION, (json.dumps(content) + "\n").encode())

    def rows(self, task: LightningModule, crop: Ranked) -> list[list[Picture]]:
        """One row: views, truth and prediction."""
        assert isinstance(task, SegmentationTask)
        colors = self.preprocessing.class_colors
        return [labelled_row(crop.sample, crop.result, task.model.views.levels, colors)] if colors else []


class BestReconstructions(BestValidation):
    """The worst and best crops by the loss of the masked tokens, as they were masked; see `reconstruction_rows`."""

    score_name, lower_is_better = "loss", True

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Rank each crop."""
        assert isinstance(pl_module, PretrainTask)
        output, truth, order = outputs["output"], outputs["input"], outputs["mask"].order
        for i in range(len(output)):
            mask = TokenMask(order[i : i + 1], outputs["mask"].num_visible)
            loss = pl_module.model.loss(output[i : i + 1], truth[i : i + 1], mask)[1]
            sample = {name: batch[name][i] for name in ("img", "bbox")}
            self.rank(float(loss), self.next_number(trainer), sample, mask)

    def rows(self, task: LightningModule, crop: Ranked) -> list[list[Picture]]:
        """One row for each level."""
        assert isinstance(task, PretrainTask)
        return reconstruction_rows(task.model_to_keep(), [crop.sample], mask=crop.result, use_boxes=task.use_boxes)
