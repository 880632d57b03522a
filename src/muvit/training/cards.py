"""Model cards of training: what a run knows of its models."""

from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import yaml

from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.splits import SlideSets
from muvit.levels import level_name
from muvit.models.card import ModelCard
from muvit.models.folder import FolderModel, plain
from muvit.models.segmentation_model import SegmentationModel, encoder_views
from muvit.models.trained import encoder_of
from muvit.training.recipes import ClassifyRecipe, PretrainRecipe, Recipe
from muvit.version import __version__

_SPLITS = {"train": "train on", "val": "validate on", "test": "test on"}


def describe_model(
    model: FolderModel,
    preprocessing: Preprocessing | None,
    recipe: Recipe | PretrainRecipe | ClassifyRecipe | None,
    slides: SlideSets,
    scores: Mapping[str, float],
    *,
    epoch: int,
) -> ModelCard:
    """The card of a model in training.

    Args:
        model: the model.
        preprocessing: its preprocessing, if it is known.
        recipe: settings of the run, if there are any; of absolute paths in it, only the end is written.
        slides: slides of the run.
        scores: validation scores; those that are not finite are left out.
        epoch: number of the last epoch, from 0.
    """
    views = model.views if isinstance(model, SegmentationModel) else encoder_views(encoder_of(model, "model").config)
    facts: dict[str, Any] = {"data": {}, "provenance": {"muvit": __version__, "torch": torch.__version__.split("+")[0]}}
    if recipe is not None:
        facts["data"] = {f"slides to {_SPLITS[split]}": len(files) for split, files in slides.items() if files}
        facts["data"]["from"] = _without_places(recipe.data.train)
        facts["provenance"] |= {"seed": recipe.run.seed, "epochs of the run": recipe.run.epochs}
        facts["recipe"] = yaml.safe_dump(_without_places(plain(asdict(recipe))), sort_keys=False, allow_unicode=True)
    facts["provenance"]["epochs trained"] = epoch + 1
    if preprocessing is not None:
        facts |= {"crop_size": preprocessing.crop_size, "pixel_size_um": preprocessing.pixel_size_um}
        facts["classes"] = preprocessing.class_names
    return ModelCard(
        title=f"{model.config.kind} of levels {', '.join(map(level_name, views.levels))}",
        kind=model.config.kind,
        levels=views.levels,
        channels=views.in_channels,
        parameters=sum(weights.numel() for weights in model.parameters()),
        scores={name: value for name, value in scores.items() if isfinite(value)},
        **facts,
    )


def _without_places(settings: Any) -> Any:
    """Settings in which absolute paths are shortened to their last two parts, since cards are for others."""
    if isinstance(settings, dict):
        return {name: _without_places(value) for name, value in settings.items()}
    if isinstance(settings, str) and Path(settings).is_absolute():
        return str(Path(*Path(settings).parts[-2:]))
    return settings
