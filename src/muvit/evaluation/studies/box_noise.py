"""Dependence of a model on exact positions: Dice against noise on the boxes (MuViT supplement, figure S3).

Noise is added at inference only. The score with naive boxes, which hold no positions, is the expected lower bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from muvit.data.annotations.objects import config_of_names, read_config
from muvit.data.crops.crops import GridCrops
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.folders import LABELS, open_labelled_folder
from muvit.errors import InputError
from muvit.evaluation.charts import Line, draw_lines, new_figure, to_image
from muvit.evaluation.results import Row
from muvit.evaluation.scores.bootstrap import BootstrapConfig
from muvit.evaluation.scores.segmentation import Evaluation, SlideCounts
from muvit.inference.run.execution import resolve_device
from muvit.labels import IGNORE
from muvit.metrics import confusion_matrix
from muvit.models.segmentation_model import SegmentationModel
from muvit.progress import Progress

SIGMAS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""The paper's standard deviations, in world pixels."""


@dataclass(frozen=True, kw_only=True)
class NoiseStudy:
    """Scores of a model under noise on its boxes."""

    model: str
    """Name of the model."""
    sigmas: tuple[float, ...]
    """Standard deviations of the noise, world pixels."""
    noisy: tuple[Evaluation, ...]
    """Scores under each of them."""
    naive: Evaluation
    """Scores with naive boxes."""

    def rows(self, bootstrap: BootstrapConfig | None = None) -> list[Row]:
        """Lines of a table: ``model``, ``boxes`` (noisy or naive), ``sigma_px``, ``mean_dice``, ``low``, ``high``."""
        cases = [("noisy", sigma, scored) for sigma, scored in zip(self.sigmas, self.noisy, strict=True)]
        rows: list[Row] = []
        for boxes, sigma, scored in [*cases, ("naive", None, self.naive)]:
            low, high = scored.intervals(bootstrap)["mean_dice"]
            mean = scored.pooled.mean_dice
            rows.append(
                {"model": self.model, "boxes": boxes, "sigma_px": sigma, "mean_dice": mean, "low": low, "high": high}
            )
        return rows


def study_noise(
    name: str,
    model: SegmentationModel,
    preprocessing: Preprocessing,
    folder: Path,
    *,
    sigmas: Sequence[float] = SIGMAS,
    ignore: Sequence[int] = (),
    seed: int = 0,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> NoiseStudy:
    """Score a model on all tiles of labelled slides while noise is added to its boxes.

    Every entry of every box ``(L, 2, ndim)`` gets noise of its own, ``N(0, sigma^2)``. A tile draws it once and scales
    it by each sigma, whatever the batch size, so that curves are smooth and runs repeat. Corners that the noise swaps
    are put back in order, since a box must have an extent.

    Args:
        name: what to call the model.
        model: the model; it is moved to ``device`` and put into evaluation mode.
        preprocessing: how it saw crops in training.
        folder: with ``images`` and ``labels``.
        sigmas: standard deviations, world pixels.
        ignore: label values ignored in the scores.
        seed: of the noise.
        batch_size: tiles computed at once.
        device: where to compute; by default CUDA if there is any, else the CPU.
        progress: called after each batch of tiles.

    Raises:
        InputError, ReadError: slides, labels and model do not fit each other, or a sigma is negative.
    """
    if not sigmas or min(sigmas) < 0:
        raise InputError("sigmas", expected="standard deviations >= 0", got=list(sigmas))
    views = model.views
    config = preprocessing.crops(views.levels, num_classes=model.num_classes, ignore_labels=tuple(ignore))
    annotations = read_config(Path(folder) / LABELS) or config_of_names(dict(enumerate(preprocessing.class_names)))
    pairs = open_labelled_folder(folder, views.levels, config.labelled_levels, annotations, preprocessing.pixels)
    grids = [(truth.name, GridCrops([(image, truth)], config)) for image, truth in pairs]
    model.to(resolve_device(device)).eval()
    total, done = sum(len(grid) for _, grid in grids), 0
    counted: list[list[SlideCounts]] = [[] for _ in range(len(sigmas) + 1)]
    for number, (slide, grid) in enumerate(grids):
        confusions = np.zeros((len(counted), model.num_classes, model.num_classes), np.int64)
        for batch in DataLoader(_Noisy(grid, (seed, number)), batch_size=batch_size):
            confusions += _count(model, batch, sigmas)
            done += len(batch["img"])
            if progress is not None:
                progress(done, total)
        for case, confusion in zip(counted, confusions, strict=True):
            case.append(SlideCounts(name=slide, confusion=confusion))
    *noisy, naive = (
        Evaluation(
            class_names=preprocessing.class_names,
            slides=tuple(case),
            has_background=preprocessing.has_background,
            ignore=tuple(ignore),
        )
        for case in counted
    )
    return NoiseStudy(model=name, sigmas=tuple(sigmas), noisy=tuple(noisy), naive=naive)


def draw_noise(studies: Sequence[NoiseStudy]) -> Image.Image:
    """Curves of mDSC against the noise, with their intervals; dotted lines: with naive boxes."""
    figure, axes = new_figure(7, 4.5)
    lines = {}
    for study in studies:
        known = [row for row in study.rows() if row["boxes"] == "noisy"]
        mean, low, high = ([float(row[key] or 0) for row in known] for key in ("mean_dice", "low", "high"))
        lines[study.model] = Line(study.sigmas, mean, low, high)
    draw_lines(
        axes[0, 0],
        lines,
        xlabel="standard deviation of the noise on every coordinate of the boxes, px",
        ylabel="mDSC",
        xscale="zero_log2",
    )
    for study, line in zip(studies, list(axes[0, 0].lines), strict=True):
        naive = axes[0, 0].axhline(study.naive.pooled.mean_dice, color=line.get_color(), linestyle=":", linewidth=1.2)
        naive.set_label(f"{study.model}, naive boxes")
    axes[0, 0].legend(frameon=False)
    return to_image(figure)


class _Noisy(Dataset[dict[str, Tensor]]):
    """The tiles of a slide, each with the noise that it adds to its boxes."""

    def __init__(self, tiles: GridCrops, seed: tuple[int, int]) -> None:
        self.tiles, self.seed = tiles, seed

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.tiles[index]
        noise = np.random.default_rng((*self.seed, index)).standard_normal(sample["bbox"].shape)
        return sample | {"noise": torch.from_numpy(noise).to(sample["bbox"].dtype)}


@torch.inference_mode()
def _count(model: SegmentationModel, batch: dict[str, Tensor], sigmas: Sequence[float]) -> NDArray[np.int64]:
    """Confusion matrices ``(S + 1, K, K)`` of a batch: under each sigma, and with naive boxes."""
    device = next(model.parameters()).device
    img, bbox, noise = (batch[name].to(device) for name in ("img", "bbox", "noise"))
    boxes: list[Any] = [(bbox + sigma * noise).sort(dim=2).values for sigma in sigmas]
    label = batch["label"].numpy()
    counts = []
    for case in [*boxes, None]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predicted = model.label_logits(img, case).argmax(1).cpu().numpy()
        counts.append(confusion_matrix(label, predicted, model.num_classes, (IGNORE,)))
    return np.stack(counts)
