"""What class a slide is of: the mean of a classifier's probabilities over crops of it."""

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
from muvit.inference.predict import resolve_device
from muvit.models.classifier import Classifier
from muvit.models.segmentation_model import encoder_views
from muvit.models.trained import TrainedModel, as_trained
from muvit.progress import Progress


@dataclass(frozen=True, kw_only=True)
class SlideClass:
    """What a classifier makes of a slide."""

    name: str
    """Name of the slide."""
    crops: NDArray[np.float32]
    """Probabilities of each crop, ``(N, K)``."""

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Mean over the crops, ``(K)``."""
        return self.crops.mean(0, dtype=np.float64)


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
        model: the classifier; it is moved to ``device`` and put into evaluation mode. A `TrainedModel`, as
            `muvit.load_model` returns, brings its preprocessing.
        slide: the image; levels of the model that it does not store are computed from those that it does.
        preprocessing: how the model saw crops in training; by default that of a `TrainedModel`.
        num_crops: random crops; None takes every tile once.
        seed: of the crops.
        batch_size: crops computed at once.
        device: where to compute; by default CUDA if there is any, else the CPU.
        progress: called after each batch.

    Raises:
        InputError: slide, model and preprocessing do not fit each other.
        ReadError: the slide cannot be read.
    """
    trained = as_trained(model, preprocessing, Classifier)
    classifier, encoder = trained.model, trained.model.config.encoder
    slide = prepare_slide(encoder_views(encoder), slide, trained.preprocessing)
    crops = trained.preprocessing.crops(encoder.levels)
    drawn = (
        ClassifiedTiles([slide], None, crops)
        if num_crops is None
        else ClassifiedCrops([slide], None, crops, num_samples=num_crops, seed=seed)
    )
    target = resolve_device(device)
    classifier.to(target).eval()
    shares: list[NDArray[np.float32]] = []
    done = 0
    with torch.inference_mode():
        for batch in DataLoader(drawn, batch_size=batch_size):
            with torch.autocast(target.type, torch.bfloat16, enabled=target.type == "cuda"):
                logits = classifier(batch["img"].to(target), batch["bbox"].to(target))
            shares.append(logits.float().softmax(1).cpu().numpy())
            done += len(logits)
            if progress is not None:
                progress(done, len(drawn))
    return SlideClass(name=slide.name, crops=np.concatenate(shares))
