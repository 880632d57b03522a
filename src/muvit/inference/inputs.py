"""Checks of models, slides and targets before inference; slides get all levels of the model."""

from pathlib import Path

import numpy as np
import torch

from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.derived import complete_slide
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.models.segmentation_model import Views

PIXEL_SIZE_TOLERANCE = 0.1
"""Largest relative difference between the pixel sizes of training and slide that counts as equal."""


def prepare_slide(views: Views, slide: Slide, preprocessing: Preprocessing) -> Slide:
    """The slide with all levels of a model; levels that it does not store are computed as they are read.

    Planning of a prediction, of features and of a classification begins with this call.

    Args:
        views: the views that the model takes.
        slide: the image as it was opened.
        preprocessing: crops in training, with their pixel size.

    Raises:
        InputError: axes, channels or pixel size are not those of training, or a level cannot be computed.
    """
    if slide.ndim != views.ndim:
        expected = f"{views.ndim} spatial axes, as the model has"
        raise InputError(slide.path, expected=expected, got=f"shape {slide.shape}")
    if slide.num_channels != views.in_channels:
        got = f"{slide.num_channels}: {', '.join(slide.channel_names)}"
        raise InputError(f"channels of {slide.path}", expected=f"{views.in_channels}, as the model has", got=got)
    _check_pixel_size(slide, preprocessing.pixel_size_um)
    return complete_slide(slide, views.levels)


def check_target(slide: Slide, output: Path | str) -> None:
    """Refuse an output whose folder holds the image.

    Raises:
        InputError: it does.
    """
    if slide.path.resolve().is_relative_to(Path(output).resolve()):
        raise InputError("output", expected="a folder that does not hold the image", got=output)


def check_weights(model: torch.nn.Module) -> None:
    """Refuse a model with a weight that is not finite.

    Raises:
        InputError: a weight is NaN or infinite; names it.
    """
    for name, weight in model.state_dict().items():
        if not torch.isfinite(weight).all():
            raise InputError(f"weights of the model, {name}", expected="finite numbers", got="NaN or infinity")


def _check_pixel_size(slide: Slide, trained: tuple[float, ...] | None) -> None:
    own = slide.pixel_size_um
    if trained is None or own is None:
        return
    if len(trained) != len(own) or not np.allclose(own, trained, rtol=PIXEL_SIZE_TOLERANCE, atol=0):
        raise InputError(
            f"pixel size of {slide.path}",
            expected=f"{trained} um, as in training (within {PIXEL_SIZE_TOLERANCE:.0%})",
            got=f"{own} um",
            hint="Resample the image, or remove pixel_size_um from preprocessing.yaml to skip this check.",
        )
