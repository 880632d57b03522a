"""Pictures of what a masked autoencoder sees and what it makes of it (after the paper's figure 2)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from muvit.levels import Level, level_name
from muvit.models.mae import MuViTMAE
from muvit.pictures import MASK_GREY, RGB, Picture, fit, outline_boxes, to_rgb
from muvit.pictures import panel as arrange
from muvit.training.callbacks import publish, spread
from muvit.training.reconstruct import PretrainTask

SIDE_PX = 256
"""Side of each picture."""


class ReconstructionPictures(Callback):
    """Draws the same few validation crops after each validation; as PNG and in TensorBoard.

    Args:
        folder: receives ``epoch_<n>.png``.
        dataset: validation crops.
        count: number of crops, spread evenly over the data set.
    """

    def __init__(self, folder: Path, dataset: Dataset, count: int) -> None:
        self.folder, self.samples = folder, spread(dataset, count)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, unless Lightning is only trying out the validation."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, PretrainTask)
        rows = reconstruction_rows(pl_module.model_to_keep(), self.samples, use_boxes=pl_module.use_boxes)
        publish(arrange(rows, size=SIDE_PX), trainer, self.folder, "reconstructions")


def reconstruction_rows(
    model: MuViTMAE, samples: Sequence[dict[str, Tensor]], *, seed: int = 0, use_boxes: bool = True
) -> list[list[Picture]]:
    """Mask and reconstruct samples, for `pictures.panel`: a row for each sample and level.

    Each row shows the view with the boxes of all finer views, the same with masked patches grey, the reconstruction,
    and its absolute error, white where it reaches the contrast of the sample. Of volumes, the middle slice is shown.

    Args:
        model: the model; it is put into evaluation mode and back.
        samples: dicts with ``img`` ``(L, C, *space)`` and ``bbox`` ``(L, 2, ndim)``.
        seed: of the masks.
        use_boxes: false hides the boxes from the model.
    """
    batch = default_collate([{"img": s["img"], "bbox": s["bbox"]} for s in samples])
    device = next(model.parameters()).device
    img, bbox = torch.nan_to_num(batch["img"], posinf=0.0, neginf=0.0).to(device), batch["bbox"].to(device)
    generator, was_training = torch.Generator(device).manual_seed(seed), model.training
    with torch.inference_mode():
        mask = model.draw_mask(len(img), img.shape[3:], generator)
        result = model.eval()(img, bbox if use_boxes else None, mask=mask)
        restored = model.restored_patches(result["output"], result["input"], mask)
        hidden = mask.is_masked[..., None].expand_as(restored)
        pictures = (img, model.to_views(hidden, img.shape[3:]), model.to_views(restored, img.shape[3:]))
    model.train(was_training)
    views, masks, restored_views = map(_slices, pictures)
    return [
        row
        for b in range(len(img))
        for row in _rows(model.levels, views[b], masks[b, :, 0], restored_views[b], batch["bbox"][b])
    ]


def _rows(
    levels: Sequence[Level], views: np.ndarray, masks: np.ndarray, restored: np.ndarray, bbox: Tensor
) -> Iterator[list[Picture]]:
    """Pictures of each view of a sample: ``views`` and ``restored`` ``(L, C, H, W)``, ``masks`` ``(L, H, W)``."""
    low, high = np.percentile(views, (1, 99.8), axis=(0, 2, 3), keepdims=True)
    # side by side, so that all of a sample have one contrast: a view of empty glass looks empty
    sheet = to_rgb(np.concatenate([*views, *restored.clip(low, high)], axis=-1))
    shown = np.split(sheet, 2 * len(views), axis=1)
    errors = (np.abs(restored - views) / np.maximum(high - low, np.finfo(np.float32).tiny)).mean(1)
    for i, level in enumerate(levels):
        yield _row(
            f"level {level_name(level)}", shown[i], masks[i], shown[len(views) + i], errors[i], _finer_boxes(bbox, i)
        )


def _row(
    title: str, shown: RGB, mask: np.ndarray, shown_restored: RGB, error: np.ndarray, boxes: np.ndarray
) -> list[Picture]:
    """Pictures of one view; ``boxes`` ``(N, 2, 2)`` as shares of its sides."""
    masked = np.where(mask[..., None], np.uint8(255 * MASK_GREY), shown)
    grey = np.repeat((255 * error.clip(0, 1)).round().astype(np.uint8)[..., None], 3, axis=-1)
    return [
        Picture(title, _outlined(shown, boxes)),
        Picture("masked", _outlined(masked, boxes, is_labels=True), True),
        Picture("reconstruction", shown_restored),
        Picture("error", grey),
    ]


def _outlined(picture: RGB, boxes: np.ndarray, *, is_labels: bool = False) -> RGB:
    enlarged = fit(picture, SIDE_PX, is_labels=is_labels)
    return outline_boxes(enlarged, boxes * np.array(enlarged.shape[:2])) if len(boxes) else enlarged


def _finer_boxes(bbox: Tensor, level: int) -> np.ndarray:
    """Boxes of the views finer than view ``level``, as shares of its sides, ``(level, 2, 2)`` yx."""
    lower, upper = bbox[level, 0], bbox[level, 1]
    return ((bbox[:level] - lower) / (upper - lower))[..., -2:].double().cpu().numpy()


def _slices(views: Tensor) -> np.ndarray:
    """Middle slices ``(B, L, C, H, W)`` of views ``(B, L, C, *space)``."""
    while views.ndim > 5:
        views = views[:, :, :, views.shape[3] // 2]
    return views.float().cpu().numpy() if views.is_floating_point() else views.cpu().numpy()
