"""What happens beside the training steps: keeping models, drawing examples."""

from pathlib import Path

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from muvit.data.crops.preprocessing import FILE, Preprocessing
from muvit.labels import IGNORE
from muvit.levels import level_name
from muvit.pictures import Picture, colorize, outline_boxes, panel, to_rgb
from muvit.training.segment import SegmentationTask
from muvit.training.task import BaseTask


class KeepModels(Callback):
    """Writes the model folders ``last`` (after every epoch) and ``best`` (best validation score so far).

    Args:
        folder: where they go.
        preprocessing: written into both; None if it is not known.
        metric: the logged score.
        lower_is_better: whether the score is a loss.
    """

    def __init__(
        self,
        folder: Path,
        preprocessing: Preprocessing | None,
        *,
        metric: str = "val_mdsc",
        lower_is_better: bool = False,
    ) -> None:
        self.folder, self.metric, self.sign = folder, metric, -1 if lower_is_better else 1
        self.extra_files = {} if preprocessing is None else {FILE: preprocessing.to_yaml()}
        self.best = float("-inf")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after the epoch's validation."""
        if not trainer.is_global_zero:
            return
        self._save(pl_module, "last")
        score = self.sign * float(trainer.callback_metrics.get(self.metric, float("nan")))
        if score > self.best:
            self.best = score
            self._save(pl_module, "best")

    def state_dict(self) -> dict[str, float]:
        """The best score, so that a resumed run keeps it."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue from a saved best score."""
        self.best = state_dict["best"]

    def _save(self, task: LightningModule, name: str) -> None:
        assert isinstance(task, BaseTask)
        task.model_to_keep().save(self.folder / name, overwrite=True, extra_files=self.extra_files)


def spread(dataset: Dataset, count: int) -> list[dict[str, Tensor]]:
    """Samples spread evenly over a data set."""
    size = len(dataset)  # type: ignore[arg-type]
    return [dataset[i] for i in sorted({int(i) for i in np.linspace(0, size - 1, count + 2)[1:-1]})]


def publish(picture: Image, trainer: Trainer, folder: Path, title: str) -> None:
    """Save a picture as ``epoch_<n>.png`` in ``folder`` and show it in TensorBoard."""
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"epoch_{trainer.current_epoch:04d}.png")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(title, np.asarray(picture), trainer.global_step, dataformats="HWC")


class ExamplePictures(Callback):
    """Draws the same few validation crops after each validation: views, truth, prediction; as PNG and in TensorBoard.

    Coarser views show the frame of the finest.

    Args:
        folder: receives ``epoch_<n>.png``.
        dataset: validation crops.
        count: number of crops, spread evenly over the data set.
        preprocessing: class colours.

    Of volumes, the middle slice is shown.
    """

    def __init__(self, folder: Path, dataset: Dataset, count: int, preprocessing: Preprocessing) -> None:
        self.folder, self.preprocessing = folder, preprocessing
        self.samples = spread(dataset, count)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, unless Lightning is only trying out the validation."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, SegmentationTask)
        batch = default_collate(self.samples)
        with torch.inference_mode():
            logits = pl_module.model.label_logits(batch["img"].to(pl_module.device), batch["bbox"].to(pl_module.device))
        guesses = logits.argmax(1).cpu().numpy()
        picture = panel([self._row(s, guess, pl_module) for s, guess in zip(self.samples, guesses, strict=True)])
        publish(picture, trainer, self.folder, "examples")

    def _row(self, sample: dict, guess: np.ndarray, task: SegmentationTask) -> list:
        colors, shown = self.preprocessing.class_colors, task.model.views
        pictures = [to_rgb(_middle(view.numpy(), shown.ndim)) for view in sample["img"]]
        finest, *coarser = sample["bbox"]
        framed = [outline_boxes(p, frame(finest, b, p.shape[:2])) for p, b in zip(pictures[1:], coarser, strict=True)]
        titles = [f"level {level_name(level)}" for level in shown.levels]
        views = list(zip(titles, [pictures[0], *framed], strict=True))
        truth, guess = (_middle(labels, shown.ndim) for labels in (sample["label"].numpy(), guess))
        return [
            *views,
            Picture("truth", colorize(truth, colors, ignore=(IGNORE,)), True),
            Picture("prediction", colorize(guess, colors), True),
        ]


def frame(inner: Tensor, outer: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Where a view lies in the picture of another, ``(1, 2, 2)`` in yx pixels of that picture.

    Args:
        inner: box ``(2, ndim)`` of the view, in world pixels.
        outer: box ``(2, ndim)`` of the view that the picture shows.
        shape: ``(H, W)`` of the picture.
    """
    lower, upper = outer[:, -2:]
    return ((inner[:, -2:] - lower) / (upper - lower) * torch.tensor(shape))[None].numpy()


def _middle(pixels: np.ndarray, ndim: int) -> np.ndarray:
    """The middle slice ``(..., H, W)`` of ``(..., *space)``."""
    return pixels[(..., *(n // 2 for n in pixels.shape[-ndim:-2]), slice(None), slice(None))]
