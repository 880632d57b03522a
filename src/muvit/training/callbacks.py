"""Lightning callbacks: models that are saved, and pictures of validation crops."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from muvit.data.crops.preprocessing import FILE, Preprocessing
from muvit.data.splits import SlideSets
from muvit.labels import IGNORE
from muvit.levels import Level, level_name
from muvit.models.hub import CARD
from muvit.models.mae import MuViTMAE
from muvit.models.masking import TokenMask
from muvit.pictures import MASK_GREY, RGB, Color, Picture, colorize, fit, outline_boxes, panel, to_rgb
from muvit.training.cards import describe_model
from muvit.training.recipes import ClassifyRecipe, PretrainRecipe, Recipe
from muvit.training.tasks import BaseTask, ClassificationTask, PretrainTask, SegmentationTask
from muvit.view_pictures import frame, middle_slice

SIDE_PX = 256
"""Side of each picture."""


class SaveBestAndLast(Callback):
    """Writes the model folders ``last`` (after every epoch) and ``best`` (best validation score so far).

    Args:
        folder: folder of the run.
        preprocessing: written into both; None if it is not known.
        metric: the logged score.
        lower_is_better: whether the score is a loss.
        recipe: settings of the run, for the model cards; None if there is none.
        slides: slides of the run, likewise.
    """

    def __init__(
        self,
        folder: Path,
        preprocessing: Preprocessing | None,
        *,
        metric: str = "val_mdsc",
        lower_is_better: bool = False,
        recipe: Recipe | PretrainRecipe | ClassifyRecipe | None = None,
        slides: SlideSets | None = None,
    ) -> None:
        self.folder, self.metric, self.sign = folder, metric, -1 if lower_is_better else 1
        self.preprocessing, self.recipe, self.slides = preprocessing, recipe, slides or {}
        self.extra_files = {} if preprocessing is None else {FILE: preprocessing.to_yaml()}
        self.best = float("-inf")
        self.is_improved = False
        """Whether the weights of the last epoch became the best ones."""

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints, that of earlier versions."""
        return "KeepModels"

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; Lightning calls this after the validation of the epoch."""
        score = self.sign * float(trainer.callback_metrics.get(self.metric, float("nan")))
        self.is_improved = score > self.best
        self.best = score if self.is_improved else self.best
        if not trainer.is_global_zero:
            return
        self._save(trainer, pl_module, "last")
        if self.is_improved:
            self._save(trainer, pl_module, "best")

    def state_dict(self) -> dict[str, float]:
        """The best score, so that a resumed run keeps it."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue from a saved best score."""
        self.best = state_dict["best"]

    def _save(self, trainer: Trainer, task: LightningModule, name: str) -> None:
        assert isinstance(task, BaseTask)
        model = task.model_to_keep()
        scores = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        card = describe_model(model, self.preprocessing, self.recipe, self.slides, scores, epoch=trainer.current_epoch)
        files = self.extra_files | {CARD: card.to_markdown()}
        model.save(self.folder / name, overwrite=True, extra_files=files)


class ValidationPictures(Callback):
    """Draws the same few validation crops after each validation; as PNG and in TensorBoard. Base of three.

    Args:
        folder: receives ``epoch_<n>.png``.
        dataset: validation crops.
        count: number of crops, spread evenly over the data set.
    """

    title = "examples"
    """Name of the pictures in TensorBoard."""

    def __init__(self, folder: Path, dataset: Dataset, count: int) -> None:
        size = len(dataset)  # type: ignore[arg-type]
        self.folder = folder
        self.samples = [dataset[i] for i in sorted({int(i) for i in np.linspace(0, size - 1, count + 2)[1:-1]})]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, unless Lightning only tests the validation before training."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        picture = panel(self.rows(pl_module), size=SIDE_PX)
        self.folder.mkdir(parents=True, exist_ok=True)
        picture.save(self.folder / f"epoch_{trainer.current_epoch:04d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(self.title, np.asarray(picture), trainer.global_step, dataformats="HWC")

    def rows(self, task: LightningModule) -> Sequence[Sequence[Picture]]:
        """Rows of pictures, for `muvit.pictures.panel`."""
        raise NotImplementedError


class ExamplePictures(ValidationPictures):
    """Views, truth and prediction of validation crops; coarser views show the frame of the finest.

    Args:
        folder: receives ``epoch_<n>.png``.
        dataset: validation crops.
        count: number of crops, spread evenly over the data set.
        preprocessing: class colours.

    Of volumes, the middle slice is shown.
    """

    def __init__(self, folder: Path, dataset: Dataset, count: int, preprocessing: Preprocessing) -> None:
        super().__init__(folder, dataset, count)
        self.preprocessing = preprocessing

    def rows(self, task: LightningModule) -> list[list[Picture]]:
        """One row for each crop."""
        assert isinstance(task, SegmentationTask)
        batch = default_collate(self.samples)
        with torch.inference_mode():
            logits = task.model.label_logits(batch["img"].to(task.device), batch["bbox"].to(task.device))
        predictions = logits.argmax(1).cpu().numpy()
        levels, colors = task.model.views.levels, self.preprocessing.class_colors
        return [labelled_row(s, p, levels, colors) for s, p in zip(self.samples, predictions, strict=True)]


def labelled_row(
    sample: dict[str, Tensor], prediction: np.ndarray, levels: Sequence[Level], colors: Sequence[Color]
) -> list[Picture]:
    """Views of a sample, coarser ones with the frame of the finest, true labels and predicted ones.

    Args:
        sample: ``img`` ``(L, C, *space)``, ``bbox`` ``(L, 2, ndim)`` and ``label`` ``(*space)``.
        prediction: ``(*space)``, classes.
        levels: of the views.
        colors: of the classes.
    """
    ndim = prediction.ndim
    pictures = [to_rgb(middle_slice(view.numpy(), ndim)) for view in sample["img"]]
    finest, *coarser = sample["bbox"]
    framed = [outline_boxes(p, frame(finest, b, p.shape[:2])) for p, b in zip(pictures[1:], coarser, strict=True)]
    truth = middle_slice(sample["label"].numpy(), ndim)
    return [
        *map(Picture, _level_titles(levels), [pictures[0], *framed]),
        Picture("truth", colorize(truth, colors, ignore=(IGNORE,)), True),
        Picture("prediction", colorize(middle_slice(prediction, ndim), colors), True),
    ]


class ExampleClasses(ValidationPictures):
    """Views of validation crops, with true and predicted class.

    Args:
        folder: receives ``epoch_<n>.png``.
        dataset: validation crops.
        count: number of crops, spread evenly over the data set.
        class_names: name of each class.
    """

    def __init__(self, folder: Path, dataset: Dataset, count: int, class_names: Sequence[str]) -> None:
        super().__init__(folder, dataset, count)
        self.class_names = class_names

    def rows(self, task: LightningModule) -> list[list[Picture]]:
        """One row for each crop; the title of the first view states the classes."""
        assert isinstance(task, ClassificationTask)
        batch, encoder = default_collate(self.samples), task.model.config.encoder
        with torch.inference_mode():
            logits = task.model(batch["img"].to(task.device), batch["bbox"].to(task.device))
        rows = []
        for sample, probabilities in zip(self.samples, logits.float().softmax(1).cpu().numpy(), strict=True):
            truth, best = self.class_names[int(sample["class"])], int(probabilities.argmax())
            verdict = f"{truth}? {self.class_names[best]} {probabilities[best]:.0%}"
            views = [to_rgb(middle_slice(view.numpy(), encoder.ndim)) for view in sample["img"]]
            rows.append(list(map(Picture, [verdict, *_level_titles(encoder.levels)[1:]], views)))
        return rows


class ReconstructionPictures(ValidationPictures):
    """Validation crops, masked and reconstructed; see `reconstruction_rows`."""

    title = "reconstructions"

    def rows(self, task: LightningModule) -> list[list[Picture]]:
        """One row for each crop and level."""
        assert isinstance(task, PretrainTask)
        return reconstruction_rows(task.model_to_keep(), self.samples, use_boxes=task.use_boxes)


def reconstruction_rows(
    model: MuViTMAE,
    samples: Sequence[dict[str, Tensor]],
    *,
    seed: int = 0,
    mask: TokenMask | None = None,
    use_boxes: bool = True,
) -> list[list[Picture]]:
    """Mask and reconstruct samples, for `muvit.pictures.panel`: a row for each sample and level (figure 2 of MuViT).

    Each row shows the view with the boxes of all finer views, the same with masked patches grey, the reconstruction,
    and its absolute error, white where it reaches the contrast of the sample. Of volumes, the middle slice is shown.

    Args:
        model: the model; it is put into evaluation mode and back.
        samples: dicts with ``img`` ``(L, C, *space)`` and ``bbox`` ``(L, 2, ndim)``.
        seed: of the masks.
        mask: of all samples; None draws one.
        use_boxes: false hides the boxes from the model.
    """
    batch = default_collate([{"img": s["img"], "bbox": s["bbox"]} for s in samples])
    device = next(model.parameters()).device
    img, bbox = torch.nan_to_num(batch["img"], posinf=0.0, neginf=0.0).to(device), batch["bbox"].to(device)
    generator, was_training = torch.Generator(device).manual_seed(seed), model.training
    with torch.inference_mode():
        mask = model.draw_mask(len(img), img.shape[3:], generator) if mask is None else mask
        result = model.eval()(img, bbox if use_boxes else None, mask=mask)
        restored = model.restored_patches(result["output"], result["input"], mask)
        hidden = mask.is_masked[..., None].expand_as(restored)
        pictures = (img.float(), model.to_views(hidden, img.shape[3:]), model.to_views(restored, img.shape[3:]).float())
    model.train(was_training)
    views, masks, restored_views = (middle_slice(p.cpu().numpy(), img.ndim - 3) for p in pictures)
    return [
        row
        for b in range(len(img))
        for row in _reconstruction(model.levels, views[b], masks[b, :, 0], restored_views[b], batch["bbox"][b])
    ]


def _reconstruction(
    levels: Sequence[Level], views: np.ndarray, masks: np.ndarray, restored: np.ndarray, bbox: Tensor
) -> Iterator[list[Picture]]:
    """Pictures of each view of a sample: ``views`` and ``restored`` ``(L, C, H, W)``, ``masks`` ``(L, H, W)``."""
    low, high = np.percentile(views, (1, 99.8), axis=(0, 2, 3), keepdims=True)
    # side by side, so that all of a sample have one contrast: a view of empty glass looks empty
    sheet = to_rgb(np.concatenate([*views, *restored.clip(low, high)], axis=-1))
    shown = np.split(sheet, 2 * len(views), axis=1)
    errors = (np.abs(restored - views) / np.maximum(high - low, np.finfo(np.float32).tiny)).mean(1)
    for i, title in enumerate(_level_titles(levels)):
        masked = np.where(masks[i][..., None], np.uint8(255 * MASK_GREY), shown[i])
        grey = np.repeat((255 * errors[i].clip(0, 1)).round().astype(np.uint8)[..., None], 3, axis=-1)
        yield [
            Picture(title, _outlined(shown[i], bbox, i)),
            Picture("masked", _outlined(masked, bbox, i, is_labels=True), True),
            Picture("reconstruction", shown[len(views) + i]),
            Picture("error", grey),
        ]


def _outlined(picture: RGB, bbox: Tensor, level: int, *, is_labels: bool = False) -> RGB:
    """The picture of the view with index ``level``, enlarged, with the boxes of all finer views."""
    enlarged = fit(picture, SIDE_PX, is_labels=is_labels)
    boxes = [frame(finer, bbox[level], enlarged.shape[:2]) for finer in bbox[:level].cpu()]
    return outline_boxes(enlarged, np.concatenate(boxes)) if boxes else enlarged


def _level_titles(levels: Sequence[Level]) -> list[str]:
    return [f"level {level_name(level)}" for level in levels]
