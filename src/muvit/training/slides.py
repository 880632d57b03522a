"""The slides of a recipe, and what it takes from them: the number of channels and the classes."""

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from muvit.data.annotations.objects import AnnotationConfig
from muvit.data.annotations.open import config_of, is_annotation
from muvit.data.crops.balance import locate_classes
from muvit.data.folders import list_slides, open_images, open_pairs
from muvit.data.splits import Amounts, SlideSets, choose_folds, choose_slides, class_areas
from muvit.data.tables import SlideFiles, is_table, read_column, values_of
from muvit.errors import InputError
from muvit.levels import Level
from muvit.models.baselines import BaselineConfig
from muvit.models.layers.rope import periods_of_views
from muvit.models.relay.config import RelayConfig
from muvit.models.segmenter import SegmenterConfig
from muvit.training.recipes import (
    ClassifyDataConfig,
    ClassifyRecipe,
    DataConfig,
    PretrainRecipe,
    Recipe,
    check_validation,
)

_LOG = logging.getLogger(__name__)

AnyRecipe = TypeVar("AnyRecipe", Recipe, PretrainRecipe, ClassifyRecipe)


def complete(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe with the values of its preset, and with channels, classes and image size of its model, from the
    training slides where it has none.

    Raises:
        ReadError: a folder or slide cannot be read.
        InputError: the labels do not determine the number of classes.
    """
    recipe = _with_preset(recipe)
    channels = _channels(recipe)
    if not isinstance(recipe, Recipe):
        encoder = replace(recipe.model.encoder, in_channels=channels)
        return replace(recipe, model=replace(recipe.model, encoder=encoder))
    model, data = recipe.model, recipe.data
    if data.split is not None or recipe.run.folds is not None or is_table(data.train):
        data = replace(data, annotations=_annotations(data))
        recipe = replace(recipe, data=data)
    classes = count_classes(data, model.levels[0]) if model.num_classes is None else model.num_classes
    if isinstance(model, SegmenterConfig):
        own = replace(model, encoder=replace(model.encoder, in_channels=channels), num_classes=classes)
        return replace(recipe, model=own)
    facts: dict[str, Any] = {
        "in_channels": channels,
        "num_classes": classes,
        "size": model.size or all_axes(data.crop_size, model.ndim),
    }
    return replace(recipe, model=replace(model, **facts))


def _with_preset(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe with the values of the preset ``modern``, if that is its own, where it has the paper's."""
    if recipe.preset == "paper" or isinstance(recipe.model, BaselineConfig | RelayConfig):
        return recipe
    encoder = recipe.model.encoder
    periods = periods_of_views(encoder.levels, encoder.patch, all_axes(recipe.data.crop_size, encoder.ndim))
    values = {"level_embed_std": 0.02} | ({} if encoder.rotary_param == "base" else {"rotary_base": periods})
    model, data = replace(recipe.model, encoder=_changed(encoder, **values)), recipe.data
    if isinstance(model, SegmenterConfig) and isinstance(data, DataConfig) and len(model.levels) > 1:
        model = _changed(model, decode="all")
        data = replace(data, label_levels="all") if model.decode == "all" else data
    return replace(recipe, model=model, data=data)


def _changed(config: Any, **values: Any) -> Any:
    """A dataclass with other values for those fields that are left at their defaults."""
    defaults = {field.name: field.default for field in fields(config)}
    return replace(config, **{name: v for name, v in values.items() if getattr(config, name) == defaults[name]})


def _channels(recipe: AnyRecipe) -> int:
    model = recipe.model if isinstance(recipe, Recipe) else recipe.model.encoder
    if model.in_channels is not None:
        return model.in_channels
    first = list_slides(Path(recipe.data.train), labelled=False)[:1]
    channels = open_images(first, pixels=replace(recipe.data.pixels, pixel_size_um=None))[0].num_channels
    _LOG.info("%s: images of %d channel(s)", recipe.data.train, channels)
    return channels


def count_classes(data: DataConfig, level: Level) -> int:
    """Number of classes: of the names that are given or stored with the labels, or of the values in a coarse scan.

    Args:
        data: the labels and the names.
        level: level at which labels are used.

    Raises:
        ReadError: a folder or label image cannot be read.
        InputError: there are fewer than two classes, or the values of a scan are not 0, 1, 2 and so on.
    """
    if data.class_names is not None:
        return len(data.class_names)
    values: set[int] = set()
    for i, (_, label) in enumerate(
        open_pairs(list_slides(Path(data.train)), (), (level,), data.annotations, data.pixels)
    ):
        values |= set(label.label_names) or {found.value for found in locate_classes(i, label, level)}
    classes = sorted(values - set(data.ignore_labels))
    if len(classes) < 2 or classes != list(range(len(classes))):
        raise InputError(
            f"labels of {data.train}",
            expected="values 0, 1 and so on, to count the classes",
            got=", ".join(map(str, classes)) or "none",
            hint="Set model.num_classes, or name other values in data.ignore_labels.",
        )
    _LOG.info("%s: labels of %d classes", data.train, len(classes))
    return len(classes)


def _annotations(data: DataConfig) -> AnnotationConfig | None:
    """Classes of annotations, as found on all slides where they are not stated: the same however slides are divided."""
    slides = [] if data.annotations is not None else list_slides(Path(data.train))
    drawn = [slide for slide in slides if slide.labels is not None and is_annotation(slide.labels)]
    return config_of(open_pairs(drawn, pixels=data.pixels)[0][1]) if drawn else data.annotations


def recipe_slides(recipe: AnyRecipe) -> SlideSets:
    """The slides of a run.

    Raises:
        ReadError, InputError: as `choose_slides`, or a cross-validation has several runs and none is named.
    """
    if recipe.run.folds is not None:
        if recipe.run.fold is None:
            raise InputError("run.fold", expected="one of the folds, to train a single model", got=None)
        return recipe_folds(recipe)[recipe.run.fold]
    data = recipe.data
    val = None if data.val is None else Path(data.val)
    sets = choose_slides(
        Path(data.train), val, data.split, labelled=isinstance(recipe, Recipe), amounts=_amounts(recipe)
    )
    if not isinstance(recipe, PretrainRecipe):
        check_validation(recipe, is_validated=bool(sets["val"]))
    return sets


def recipe_folds(recipe: AnyRecipe, source: Path | None = None) -> list[SlideSets]:
    """The slides of each run of a cross-validation; of a table ``source`` that states them, if it is given."""
    assert recipe.run.folds is not None
    split = None if source is not None else recipe.data.split
    return choose_folds(source or Path(recipe.data.train), recipe.run.folds, split, amounts=_amounts(recipe))


def _amounts(recipe: AnyRecipe) -> Amounts | None:
    """Classes by which slides are divided."""
    if isinstance(recipe, Recipe):
        data = recipe.data
        return partial(
            class_areas,
            level=recipe.model.levels[0],
            annotations=data.annotations,
            ignore=data.ignore_labels,
            pixels=data.pixels,
        )
    return partial(_one_hot, recipe.data) if isinstance(recipe, ClassifyRecipe) else None


def _one_hot(data: ClassifyDataConfig, slides: Sequence[SlideFiles]) -> NDArray[np.float64]:
    names = slide_classes(data, [slide.name for slide in slides])
    return np.array([[float(name == own) for name in sorted(set(names))] for own in names])


def slide_classes(data: ClassifyDataConfig, names: Sequence[str]) -> list[str]:
    """The class of each slide, from the table that states them.

    Raises:
        ReadError: the table cannot be read.
        InputError: a slide has no class, or several.
    """
    return list(values_of(names, read_column(data.classes, data.column), f"{data.classes}, {data.column}").values())


def all_axes(size: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """A size along every axis, from one number for all."""
    return (size,) * ndim if isinstance(size, int) else size
