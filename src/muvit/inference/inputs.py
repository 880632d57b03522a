"""Checks of models, slides and targets before inference; slides get the pixels and all levels of the model."""

from pathlib import Path

import torch

from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.derived import complete_slide
from muvit.data.slides.pixel_size import have_similar_pixels
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.models.segmentation_model import Views


def prepare_slide(views: Views, slide: Slide, preprocessing: Preprocessing) -> Slide:
    """The slide with the pixel size and all levels of a model; what it does not store is computed as it is read.

    A model that was trained at a fixed pixel size (``data.pixel_size_um``) reads every slide at it. Other models read
    slides at their own, unless that differs from the size of the training slides by more than 10 %.

    Planning of a prediction, of features and of a classification begins with this call.

    Args:
        views: the views that the model takes.
        slide: the image as it was opened.
        preprocessing: crops in training, with their pixel size.

    Raises:
        InputError: axes or channels are not those of training, the pixel size is wanted and not known, or a level
            cannot be computed.
    """
    if slide.ndim != views.ndim:
        expected = f"{views.ndim} spatial axes, as the model has"
        raise InputError(slide.path, expected=expected, got=f"shape {slide.shape}")
    if slide.num_channels != views.in_channels:
        got = f"{slide.num_channels}: {', '.join(slide.channel_names)}"
        hint = "Choose those of training (--channels)." if slide.num_channels > views.in_channels else ""
        expected = f"{views.in_channels}, as the model has"
        raise InputError(f"channels of {slide.path}", expected=expected, got=got, hint=hint)
    size = preprocessing.pixel_size_um
    if not preprocessing.is_resampled and have_similar_pixels(slide, size):
        size = None
    return complete_slide(slide, views.levels, pixel_size_um=size)


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
