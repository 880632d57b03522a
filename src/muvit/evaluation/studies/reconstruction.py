"""Reconstruction errors of masked autoencoders at each level, with true and with naive boxes (MuViT table 2).

All models get the same crops and the same masks: three quarters of every level, the same tokens in every model that
has the level.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from muvit.data.crops.crops import NestedCrops
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.folders import open_folder
from muvit.errors import InputError
from muvit.evaluation.charts import draw_bars, new_figure, to_image
from muvit.evaluation.results import Row
from muvit.inference.run.execution import resolve_device
from muvit.levels import Level, level_factors, level_name
from muvit.models.layers.patch import patch_grid
from muvit.models.mae import MuViTMAE
from muvit.models.masking import draw_consistent_mask
from muvit.progress import Progress

Boxes = Literal["true", "naive"]


@dataclass(frozen=True, kw_only=True)
class PretrainedModel:
    """A masked autoencoder and how it was trained."""

    model: MuViTMAE
    """The model."""
    preprocessing: Preprocessing
    """Preprocessing of its crops."""
    trained_boxes: Boxes = "true"
    """Boxes that it was trained with."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Errors of one model."""

    name: str
    """Name of the model."""
    trained_boxes: Boxes
    """Boxes that it was trained with."""
    boxes: Boxes
    """Boxes that it got here."""
    errors: Mapping[Level, float]
    """Mean squared error of the masked patches by level."""

    @property
    def title(self) -> str:
        """Name and boxes, for a legend."""
        return f"{self.name}, {self.boxes} boxes" + ("" if self.boxes == self.trained_boxes else " at inference")

    def rows(self) -> list[Row]:
        """Lines of a table, one for each level."""
        fixed = {"model": self.name, "trained_boxes": self.trained_boxes, "boxes": self.boxes}
        return [fixed | {"level": level_name(level), "mse": error} for level, error in self.errors.items()]


def study_reconstruction(
    models: Mapping[str, PretrainedModel],
    images: Path,
    *,
    num_crops: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> list[Reconstruction]:
    """Mean squared error of masked patches of each level, for each model.

    Every model is tried with the boxes that it was trained with, and one that was trained with true boxes also with
    naive ones. Crops nest over the levels of all models together, of which each model sees its own.

    Args:
        models: by name.
        images: folder with ``images``, best ones that no model was trained on.
        num_crops: random nested crops.
        batch_size: crops computed at once; masks depend on it.
        seed: of crops and masks.
        device: where to compute; by default CUDA if there is any, else the CPU.
        progress: called after each batch.

    Raises:
        InputError: models saw crops, or count errors, in different ways, or slides do not fit them.
        ReadError: a slide cannot be read.
    """
    found = {level for entry in models.values() for level in entry.model.levels}
    ndim = next(iter(models.values())).model.config.encoder.ndim
    levels = tuple(sorted(found, key=lambda level: level_factors(level, ndim)))
    crops = _crops(models, levels, images, num_crops, seed)
    target = resolve_device(device)
    cases = [
        (name, entry, boxes)
        for name, entry in models.items()
        for boxes in (("true", "naive") if entry.trained_boxes == "true" else ("naive",))
    ]
    loader = DataLoader(crops, batch_size=batch_size)
    sums = [torch.zeros(len(entry.model.levels), dtype=torch.float64) for _, entry, _ in cases]
    for entry in models.values():
        entry.model.to(target).eval()
    done = 0
    for number, batch in enumerate(loader):
        for case, (_, entry, boxes) in enumerate(cases):
            chosen = [levels.index(level) for level in entry.model.levels]
            views = {name: batch[name][:, chosen].to(target) for name in ("img", "bbox")}
            sums[case] += _errors(entry.model, views, boxes, seed + number) * len(batch["img"])
            done += 1
            if progress is not None:
                progress(done, len(cases) * len(loader))
    return [
        Reconstruction(
            name=name,
            trained_boxes=entry.trained_boxes,
            boxes=boxes,  # type: ignore[arg-type]
            errors=dict(zip(entry.model.levels, (total / num_crops).tolist(), strict=True)),
        )
        for (name, entry, boxes), total in zip(cases, sums, strict=True)
    ]


def draw_reconstruction(results: Sequence[Reconstruction]) -> Image.Image:
    """Bars of the error of each level, for each model and its boxes."""
    most_first = sorted(results, key=lambda result: -len(result.errors))
    levels = list(dict.fromkeys(level for result in most_first for level in result.errors))
    figure, axes = new_figure(7, max(3.0, 0.2 * len(levels) * len(results) + 1.5))
    series = {result.title: [result.errors.get(level, float("nan")) for level in levels] for result in results}
    draw_bars(
        axes[0, 0],
        [f"level {level_name(level)}" for level in levels],
        series,
        label="mean squared error of masked patches",
    )
    axes[0, 0].legend(frameon=False)
    return to_image(figure)


def _crops(
    models: Mapping[str, PretrainedModel], levels: tuple[Level, ...], images: Path, num_crops: int, seed: int
) -> NestedCrops:
    first_name, first = next(iter(models.items()))
    for name, entry in models.items():
        for what, own, others in (
            ("crops of size", entry.preprocessing.crop_size, first.preprocessing.crop_size),
            ("normalisation", entry.preprocessing.normalization, first.preprocessing.normalization),
            ("padding", entry.preprocessing.padding, first.preprocessing.padding),
            ("pixel size", entry.preprocessing.pixels, first.preprocessing.pixels),
            ("loss", entry.model.config.loss, first.model.config.loss),
        ):
            if own != others:
                raise InputError(name, expected=f"{what} {others}, as {first_name} has", got=own)
    slides = [
        (slide, None) for slide in open_folder(Path(images) / "images", levels, first.preprocessing.pixels).values()
    ]
    return NestedCrops(slides, first.preprocessing.crops(levels), samples_per_epoch=num_crops, seed=seed)


@torch.inference_mode()
def _errors(model: MuViTMAE, views: Mapping[str, Tensor], boxes: str, seed: int) -> Tensor:
    """Error of each level ``(L)``, float64 on the CPU."""
    img, bbox = views["img"], views["bbox"] if boxes == "true" else None
    mask = draw_consistent_mask(
        len(img),
        model.levels,
        prod(patch_grid(img.shape[3:], model.config.encoder.patch)),
        ratio=model.config.masking_ratio,
        generator=torch.Generator().manual_seed(seed),
        device=img.device,
    )
    with torch.autocast(img.device.type, torch.bfloat16, enabled=img.device.type == "cuda"):
        return model(img, bbox, mask=mask)["loss_per_level"].double().cpu()
