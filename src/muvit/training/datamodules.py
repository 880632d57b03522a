"""Batches of crops from the slides of a recipe."""

import logging
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset

from muvit.data.annotations.objects import AnnotationConfig
from muvit.data.annotations.open import config_of
from muvit.data.crops.balance import EpochSampler, locate_classes
from muvit.data.crops.classified import ClassifiedCrops, ClassifiedTiles
from muvit.data.crops.crops import GridCrops, NestedCrops
from muvit.data.crops.dataset import collate
from muvit.data.crops.normalize import (
    Normalization,
    lacks_measured_values,
    measured_normalization,
    normalization_from_dict,
)
from muvit.data.crops.preprocessing import CropConfig, Preprocessing
from muvit.data.crops.slide_crops import LabelledSlide, SlideCrops
from muvit.data.folders import IMAGES, class_legend, open_folder, open_labelled_folder
from muvit.data.slides.derived import check_pixel_sizes
from muvit.data.slides.slide import Slide
from muvit.data.tables import read_column, values_of
from muvit.errors import InputError
from muvit.levels import Level
from muvit.models.relay.config import RelayConfig
from muvit.models.segmentation_model import Views, encoder_views
from muvit.models.segmenter import SegmenterConfig
from muvit.pictures import class_colors
from muvit.training.recipes import ClassifyRecipe, CropsConfig, DataConfig, PretrainRecipe, Recipe, RunConfig

_LOG = logging.getLogger(__name__)

AnyRecipe = TypeVar("AnyRecipe", Recipe, PretrainRecipe, ClassifyRecipe)


def complete(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe with channels, classes and image size of its model, from the training slides where it has none.

    Raises:
        ReadError: a folder or slide cannot be read.
        InputError: the labels do not determine the number of classes.
    """
    channels = _channels(recipe)
    if not isinstance(recipe, Recipe):
        encoder = replace(recipe.model.encoder, in_channels=channels)
        return replace(recipe, model=replace(recipe.model, encoder=encoder))
    model, data = recipe.model, recipe.data
    classes = count_classes(data, model.levels[0]) if model.num_classes is None else model.num_classes
    if isinstance(model, SegmenterConfig):
        own = replace(model, encoder=replace(model.encoder, in_channels=channels), num_classes=classes)
        return replace(recipe, model=own)
    facts: dict[str, Any] = {
        "in_channels": channels,
        "num_classes": classes,
        "size": model.size or _all_axes(data.crop_size, model.ndim),
    }
    return replace(recipe, model=replace(model, **facts))


def _channels(recipe: AnyRecipe) -> int:
    model = recipe.model if isinstance(recipe, Recipe) else recipe.model.encoder
    if model.in_channels is not None:
        return model.in_channels
    channels = next(iter(open_folder(Path(recipe.data.train) / IMAGES).values())).num_channels
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
    for i, (_, label) in enumerate(open_labelled_folder(Path(data.train), (), (level,), data.annotations, data.size)):
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


def _all_axes(size: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    return (size,) * ndim if isinstance(size, int) else size


class CropsData(LightningDataModule):
    """Training and validation crops of a recipe as batches; base of three.

    Args:
        data: the slides and the crops.
        run: seed of all random numbers, and number of processes.
    """

    crops: CropConfig
    train_crops: NestedCrops

    def __init__(self, data: CropsConfig, run: RunConfig) -> None:
        super().__init__()
        self.data, self.seed, self.num_processes = data, run.seed, run.devices * run.num_nodes

    @cached_property
    def val_crops(self) -> SlideCrops | None:
        """Validation crops without augmentation, every tile or a fixed random choice, if there are validation slides.

        Raises:
            InputError: there are fewer crops than processes.
        """
        if self.data.val is None:
            return None
        crops = self._open_val_crops(Path(self.data.val))
        check_pixel_sizes([self.train_crops.images[0], *crops.images])
        if len(crops) < self.num_processes:
            expected = f"slides of at least {self.num_processes} crops, one for each device"
            raise InputError("data.val", expected=expected, got=len(crops))
        return crops

    def _open_val_crops(self, folder: Path) -> SlideCrops:
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Batches of new random crops in every epoch."""
        rank, replicas = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EpochSampler(len(self.train_crops), rank=rank, num_replicas=replicas)
        return self._loader(self.train_crops, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Batches of the validation crops, divided among the processes."""
        if self.val_crops is None:
            return []
        rank, replicas = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return self._loader(Subset(self.val_crops, range(rank, len(self.val_crops), replicas)))

    def _crop_config(self, views: Views, **labels: Any) -> CropConfig:
        size = _all_axes(self.data.crop_size, views.ndim)
        if len(size) != views.ndim:
            raise InputError("data.crop_size", expected=f"one number, or {views.ndim} of them", got=size)
        views.check_size(size, "data.crop_size")
        return CropConfig(
            levels=views.levels,
            size=size,
            normalization=self._normalization(views.levels[0]),
            cache_mib=self.data.cache_mib,
            **self.data.cropping,
            **labels,
        )

    def _preprocessing(
        self, image: Slide, names: Sequence[str] = (), colors: Sequence[tuple[int, int, int]] = ()
    ) -> Preprocessing:
        return Preprocessing(
            crop_size=self.crops.size,
            normalization=self.crops.normalization,
            **self.crops.cropping,
            class_names=tuple(names),
            class_colors=tuple(colors),
            has_background=self.crops.has_background,
            pixel_size_um=image.pixel_size_um,
            is_resampled=self.data.pixel_size_um is not None,
        )

    def _normalization(self, level: Level) -> Normalization:
        """As the recipe says, with the statistics of the training slides at ``level`` where it leaves them out."""
        values = self.data.normalization
        if lacks_measured_values(values):
            slides = open_folder(Path(self.data.train) / IMAGES, (level,)).values()
            return measured_normalization(values, list(slides), level)
        return normalization_from_dict(values)

    def _random_crops(self, slides: Sequence[LabelledSlide], crops: CropConfig, **balance: Any) -> NestedCrops:
        data = self.data
        check_pixel_sizes([image for image, _ in slides])
        return NestedCrops(
            slides,
            crops,
            samples_per_epoch=data.samples_per_epoch,
            seed=self.seed,
            augmentation=data.augmentation,
            **balance,
        )

    def _fixed_crops(self, slides: Sequence[LabelledSlide], crops: CropConfig) -> SlideCrops:
        """Every tile once, or a fixed random choice."""
        if self.data.val_samples is None:
            return GridCrops(slides, crops)
        return NestedCrops(slides, crops, samples_per_epoch=self.data.val_samples, seed=self.seed)

    def _loader(self, dataset: Dataset, **options: object) -> DataLoader:
        workers = self.data.num_workers
        if workers is None:
            workers = min(8, os.cpu_count() or 1) if torch.cuda.is_available() else 0
        return DataLoader(
            dataset,
            batch_size=self.data.batch_size,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            # a forked process would lose the threads of the array store
            multiprocessing_context=multiprocessing.get_context("spawn") if workers else None,
            pin_memory=torch.cuda.is_available(),
            **options,  # type: ignore[arg-type]
        )


class SegmentationData(CropsData):
    """Training and validation crops of a recipe; every slide is checked on opening, before any work starts.

    Args:
        recipe: all settings.
        views: the views that its model takes.

    Raises:
        ReadError: a folder or slide cannot be read.
        InputError: slides, labels, levels or classes do not fit the recipe.
    """

    def __init__(self, recipe: Recipe, views: Views) -> None:
        super().__init__(recipe.data, recipe.run)
        self.recipe = recipe = complete(recipe)
        data, model = recipe.data, recipe.model
        assert model.num_classes is not None
        self.num_classes = model.num_classes
        self.crops = self._crop_config(
            views,
            num_classes=self.num_classes,
            ignore_labels=data.ignore_labels,
            has_background=data.has_background,
            label_levels=data.label_levels,
        )
        has_tokens = isinstance(model, RelayConfig) and model.fusion == "relay" and model.relay_tokens > 0
        if has_tokens and len(views.levels) > 1 and data.placement == "nested":
            _LOG.warning(
                "relay tokens have no coordinates and learn little from nested views; set data.placement to concentric"
            )
        self.train_slides = self._open_pairs(Path(data.train), data.annotations)
        check_channels([image for image, _ in self.train_slides], views.in_channels)
        self.train_crops = self._random_crops(
            self.train_slides,
            self.crops,
            balance=data.balance,
            foreground_fraction=data.foreground_fraction,
        )

    def _open_val_crops(self, folder: Path) -> SlideCrops:
        # classes found in the training annotations have the same values here
        annotations = self.recipe.data.annotations or config_of(self.train_slides[0][1])
        return self._fixed_crops(self._open_pairs(folder, annotations), self.crops)

    def _open_pairs(self, folder: Path, annotations: AnnotationConfig | None) -> list[tuple[Slide, Slide]]:
        return open_labelled_folder(folder, self.crops.levels, self.crops.labelled_levels, annotations, self.data.size)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing and classes, for prediction."""
        count = self.num_classes
        image, label = self.train_slides[0]
        stored_names, stored_colors = class_legend(label, count)
        names = self.recipe.data.class_names
        if names is None:
            names = tuple(stored_names.get(i, f"class {i}") for i in range(count))
        if len(names) != count or len(set(names)) != count or not all(names):
            expected = f"{count} different names, as model.num_classes says"
            raise InputError("data.class_names", expected=expected, got=names)
        expected_classes = set(range(count)) - set(self.recipe.data.ignore_labels)
        absent = [names[i] for i in sorted(expected_classes - set(self.train_crops.seen_classes))]
        if absent:
            _LOG.warning(
                "%s: no pixel of %s was found; absent classes cannot be learned",
                self.recipe.data.train,
                ", ".join(absent),
            )
        default = class_colors(count)
        return self._preprocessing(image, names, [stored_colors.get(i, default[i]) for i in range(count)])


class PretrainData(CropsData):
    """Crops of unlabelled slides; every slide is checked on opening, before any work starts.

    Raises:
        ReadError: a folder or slide cannot be read.
        InputError: slides or levels do not fit the recipe.
    """

    def __init__(self, recipe: PretrainRecipe) -> None:
        super().__init__(recipe.data, recipe.run)
        self.recipe = recipe = complete(recipe)
        model = recipe.model.encoder
        self.crops = self._crop_config(encoder_views(model))
        self.train_slides = self._open(Path(recipe.data.train))
        self.train_crops = self._random_crops(self.train_slides, self.crops)

    def _open_val_crops(self, folder: Path) -> SlideCrops:
        return self._fixed_crops(self._open(folder), self.crops)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of the pixels; there are no classes."""
        return self._preprocessing(self.train_slides[0][0])

    def _open(self, folder: Path) -> list[LabelledSlide]:
        slides = list(open_folder(folder / IMAGES, self.crops.levels, self.data.size).values())
        check_channels(slides, self.recipe.model.encoder.channels)
        return [(slide, None) for slide in slides]


def check_channels(slides: Iterable[Slide], channels: int) -> None:
    """Refuse slides of another number of channels than the model's.

    Raises:
        InputError: one has.
    """
    for slide in slides:
        if slide.num_channels != channels:
            raise InputError(slide.path, expected=f"{channels} channel(s), as the model has", got=slide.num_channels)


class ClassificationData(CropsData):
    """Training and validation crops of a recipe; every slide is checked on opening, before any work starts.

    Raises:
        ReadError: a folder, slide or the table cannot be read.
        InputError: slides, levels or classes do not fit the recipe.
    """

    train_crops: ClassifiedCrops

    def __init__(self, recipe: ClassifyRecipe) -> None:
        super().__init__(recipe.data, recipe.run)
        self.recipe = recipe = complete(recipe)
        data, encoder = recipe.data, recipe.model.encoder
        self.crops = self._crop_config(encoder_views(encoder))
        self.train_slides, names = self._open(Path(data.train))
        self.class_names = tuple(sorted(set(names)))
        wanted = recipe.model.num_classes
        if len(self.class_names) < 2 or wanted not in (None, len(self.class_names)):
            raise InputError(
                data.classes,
                expected=f"{wanted or 'at least 2'} classes of the training slides",
                got=", ".join(self.class_names),
            )
        check_pixel_sizes(self.train_slides)
        self.train_crops = ClassifiedCrops(
            self.train_slides,
            self._numbers(names),
            self.crops,
            num_samples=data.samples_per_epoch,
            seed=self.seed,
            choice=data.choice,
            augmentation=data.augmentation,
        )

    def _open_val_crops(self, folder: Path) -> ClassifiedTiles | ClassifiedCrops:
        """Every tile once, or random crops of each slide in turn."""
        data = self.recipe.data
        slides, names = self._open(folder)
        if data.val_samples is None:
            return ClassifiedTiles(slides, self._numbers(names), self.crops)
        if data.val_samples < len(slides):
            raise InputError(
                "data.val_samples", expected=f"at least {len(slides)}, one of each slide", got=data.val_samples
            )
        return ClassifiedCrops(slides, self._numbers(names), self.crops, num_samples=data.val_samples, seed=self.seed)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing and classes, for prediction."""
        return self._preprocessing(self.train_slides[0], self.class_names, class_colors(len(self.class_names)))

    def _open(self, folder: Path) -> tuple[list[Slide], list[str]]:
        """Slides of a folder and the class of each."""
        slides, data = open_folder(folder / IMAGES, self.crops.levels, self.data.size), self.recipe.data
        check_channels(slides.values(), self.recipe.model.encoder.channels)
        names = values_of(slides, read_column(data.classes, data.column), f"{data.classes}, {data.column}")
        return list(slides.values()), list(names.values())

    def _numbers(self, names: Sequence[str]) -> list[int]:
        unknown = sorted(set(names) - set(self.class_names))
        if unknown:
            expected = f"classes of the training slides: {', '.join(self.class_names)}"
            raise InputError(self.recipe.data.classes, expected=expected, got=unknown[0])
        return [self.class_names.index(name) for name in names]
