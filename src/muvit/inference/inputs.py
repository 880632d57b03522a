"""Checks of a model and a slide before inference; the slide is then given all levels that the model sees."""

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
    """The slide with all levels of a model; those that it does not store are computed as they are read.

    Prediction, features and classification begin with this call.

    Args:
        views: the views that the model takes.
        slide: the image as it was opened; one that is prepared already comes back as it is.
        preprocessing: how the model saw crops in training.

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
