"""Classification of slides: the mean of a classifier's probabilities over crops."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from muvit.data.crops.classified import ClassifiedCrops, ClassifiedTiles
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.slide import Slide
from muvit.inference.inputs import prepare_slide
from muvit.inference.run.execution import Execution
from muvit.models.classifier import Classifier
from muvit.models.segmentation_model import encoder_views
from muvit.models.trained import TrainedModel, as_trained
from muvit.progress import Progress


@dataclass(frozen=True, kw_only=True)
class SlideClass:
    """Probabilities of the classes of a slide."""

    name: str
    """Name of the slide."""
    crops: NDArray[np.float32]
    """Probabilities of each crop, ``(N, K)``."""

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Mean over the crops, ``(K)``."""
        return self.crops.mean(0, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Classification:
    """A classifier and the crops of a slide, checked."""

    model: Classifier
    """The classifier."""
    name: str
    """Name of the slide."""
    crops: ClassifiedCrops | ClassifiedTiles
    """Random crops, or all tiles."""
    device: torch.device
    """Device of the computation."""
    batch_size: int
    """Crops computed at once."""


def classify_slide(
    model: Classifier | TrainedModel[Any],
    slide: Slide,
    preprocessing: Preprocessing | None = None,
    *,
    num_crops: int | None = 64,
    seed: int = 0,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> SlideClass:
    """Classify a slide by random crops of it, cut as in training, or by all of its tiles.

    On CUDA the model runs under bfloat16 autocast, elsewhere in its own precision.

    Args:
        model: the classifier; it is moved to ``device`` and put into evaluation mode. A `TrainedModel`,
            as `muvit.load_model` returns, brings its preprocessing.
        slide: the image; levels of the model that it does not store are computed from those that it does.
        preprocessing: crop size, normalisation and padding as in training; by default those of a `TrainedModel`.
        num_crops: random crops; None takes every tile once.
        seed: of the crops.
        batch_size: crops computed at once.
        device: where to compute; by default CUDA if there is any, else the CPU.
        progress: called after each batch.

    Raises:
        InputError: slide, model and preprocessing do not fit each other.
        ReadError: the slide cannot be read.
    """
    planned = plan_classification(
        model, slide, preprocessing, num_crops=num_crops, seed=seed, batch_size=batch_size, device=device
    )
    return run_classification(planned, progress=progress)


def plan_classification(
    model: Classifier | TrainedModel[Any],
    slide: Slide,
    preprocessing: Preprocessing | None = None,
    *,
    num_crops: int | None = 64,
    seed: int = 0,
    batch_size: int = 8,
    device: str | torch.device | None = None,
) -> Classification:
    """The first half of `classify_slide`: all checks."""
    trained = as_trained(model, preprocessing, Classifier)
    execution = Execution(device=None if device is None else str(device), batch_size=batch_size)
    encoder = trained.model.config.encoder
    slide = prepare_slide(encoder_views(encoder), slide, trained.preprocessing)
    settings = trained.preprocessing.crops(encoder.levels)
    crops = (
        ClassifiedTiles([slide], None, settings)
        if num_crops is None
        else ClassifiedCrops([slide], None, settings, num_samples=num_crops, seed=seed)
    )
    return Classification(
        model=trained.model, name=slide.name, crops=crops, device=execution.devices[0], batch_size=batch_size
    )


@torch.inference_mode()
def run_classification(planned: Classification, *, progress: Progress | None = None) -> SlideClass:
    """The second half of `classify_slide`."""
    model, device = planned.model, planned.device
    model.to(device).eval()
    probabilities: list[NDArray[np.float32]] = []
    done = 0
    for batch in DataLoader(planned.crops, batch_size=planned.batch_size):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(batch["img"].to(device), batch["bbox"].to(device))
        probabilities.append(logits.float().softmax(1).cpu().numpy())
        done += len(logits)
        if progress is not None:
            progress(done, len(planned.crops))
    return SlideClass(name=planned.name, crops=np.concatenate(probabilities))
