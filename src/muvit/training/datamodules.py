"""Batches of crops from the slides of a recipe."""

import logging
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset

from muvit.data.annotations.objects import AnnotationConfig
from muvit.data.annotations.open import config_of
from muvit.data.crops.balance import EpochSampler
from muvit.data.crops.classified import ClassifiedCrops, ClassifiedTiles
from muvit.data.crops.crops import GridCrops, NestedCrops
from muvit.data.crops.normalize import (
    Normalization,
    lacks_measured_values,
    measured_normalization,
    normalization_from_dict,
)
from muvit.data.crops.preprocessing import CropConfig, Preprocessing
from muvit.data.crops.slide_crops import LabelledSlide, SlideCrops
from muvit.data.crops.stored import collate
from muvit.data.folders import class_legend, open_images, open_pairs
from muvit.data.slides.pixel_size import check_pixel_sizes
from muvit.data.slides.slide import Slide
from muvit.data.splits import SlideSets
from muvit.data.tables import SlideFiles
from muvit.errors import InputError
from muvit.levels import Level
from muvit.models.relay.config import RelayConfig
from muvit.models.segmentation_model import Views, encoder_views
from muvit.pictures import class_colors
from muvit.training.recipes import ClassifyRecipe, CropsConfig, PretrainRecipe, Recipe
from muvit.training.run_config import RunConfig
from muvit.training.slides import all_axes, complete, recipe_slides, slide_classes

_LOG = logging.getLogger(__name__)


class CropsData(LightningDataModule):
    """Training and validation crops of a recipe, in batches that the task finishes on its device; base of three.

    Args:
        data: the slides and the crops.
        run: seed of all random numbers, and number of processes.
        slides: files of the slides to train and validate on.
    """

    crops: CropConfig
    train_crops: NestedCrops

    def __init__(self, data: CropsConfig, run: RunConfig, slides: SlideSets) -> None:
        super().__init__()
        self.slides = slides
        self.data, self.seed, self.num_processes = data, run.seed, run.devices * run.num_nodes
        self._position = 0, 0  # epoch, and batches of it that were taken

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were taken; part of the state that a run is resumed from."""
        assert self.trainer is not None
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.completed
        return {"epoch": self.trainer.current_epoch, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next `train_dataloader` there."""
        self._position = state_dict["epoch"], state_dict["batches"]

    @cached_property
    def val_crops(self) -> SlideCrops | None:
        """Validation crops without augmentation, every tile or a fixed random choice, if there are validation slides.

        Raises:
            InputError: there are fewer crops than processes.
        """
        if not self.slides["val"]:
            return None
        crops = self._open_val_crops(self.slides["val"])
        check_pixel_sizes([self.train_crops.images[0], *crops.images])
        if len(crops) < self.num_processes:
            expected = f"slides of at least {self.num_processes} crops, one for each device"
            raise InputError("data.val", expected=expected, got=len(crops))
        return crops

    def _open_val_crops(self, files: Sequence[SlideFiles]) -> SlideCrops:
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Batches of new random crops in every epoch; a resumed run begins with the first one that it has not seen."""
        rank, replicas = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        samples, per_step = len(self.train_crops), self.data.batch_size * replicas
        epoch, done = self._position
        start = done % (samples // per_step) * per_step  # all batches are done in a state from between two epochs
        sampler = EpochSampler(samples, epoch=epoch, start=start, rank=rank, num_replicas=replicas)
        return self._loader(self.train_crops.as_stored(), sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Batches of the validation crops, divided among the processes."""
        if self.val_crops is None:
            return []
        rank, replicas = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return self._loader(Subset(self.val_crops.as_stored(), range(rank, len(self.val_crops), replicas)))

    def _crop_config(self, views: Views, **labels: Any) -> CropConfig:
        size = all_axes(self.data.crop_size, views.ndim)
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
            return measured_normalization(values, open_images(self.slides["train"], (level,), self.data.pixels), level)
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
            weights=[slide.weight for slide in self.slides["train"]],
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
        slides: files of the slides, by default those that the recipe says.

    Raises:
        ReadError: a folder or slide cannot be read.
        InputError: slides, labels, levels or classes do not fit the recipe.
    """

    def __init__(self, recipe: Recipe, views: Views, slides: SlideSets | None = None) -> None:
        self.recipe = recipe = complete(recipe)
        super().__init__(recipe.data, recipe.run, slides or recipe_slides(recipe))
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
        if isinstance(model, RelayConfig) and model.needs_concentric_views and data.placement == "nested":
            _LOG.warning(
                "relay tokens have no coordinates and learn little from nested views; "
                "set data.placement to concentric, or model.exchange to world"
            )
        self.train_slides = self._open_pairs(self.slides["train"], data.annotations)
        check_channels([image for image, _ in self.train_slides], views.in_channels)
        self.train_crops = self._random_crops(
            self.train_slides,
            self.crops,
            balance=data.balance,
            foreground_fraction=data.foreground_fraction,
        )

    def _open_val_crops(self, files: Sequence[SlideFiles]) -> SlideCrops:
        # classes found in the training annotations have the same values here
        annotations = self.recipe.data.annotations or config_of(self.train_slides[0][1])
        return self._fixed_crops(self._open_pairs(files, annotations), self.crops)

    def _open_pairs(
        self, files: Sequence[SlideFiles], annotations: AnnotationConfig | None
    ) -> list[tuple[Slide, Slide]]:
        return open_pairs(files, self.crops.levels, self.crops.labelled_levels, annotations, self.data.pixels)

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

    def __init__(self, recipe: PretrainRecipe, slides: SlideSets | None = None) -> None:
        self.recipe = recipe = complete(recipe)
        super().__init__(recipe.data, recipe.run, slides or recipe_slides(recipe))
        model = recipe.model.encoder
        self.crops = self._crop_config(encoder_views(model))
        self.train_slides = self._open(self.slides["train"])
        self.train_crops = self._random_crops(self.train_slides, self.crops)

    def _open_val_crops(self, files: Sequence[SlideFiles]) -> SlideCrops:
        return self._fixed_crops(self._open(files), self.crops)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of the pixels; there are no classes."""
        return self._preprocessing(self.train_slides[0][0])

    def _open(self, files: Sequence[SlideFiles]) -> list[LabelledSlide]:
        slides = open_images(files, self.crops.levels, self.data.pixels)
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

    def __init__(self, recipe: ClassifyRecipe, slides: SlideSets | None = None) -> None:
        self.recipe = recipe = complete(recipe)
        super().__init__(recipe.data, recipe.run, slides or recipe_slides(recipe))
        weighted = [slide for slide in self.slides["train"] if slide.weight != 1]
        if weighted:
            raise InputError(weighted[0].image, expected="no weight, for a classifier", got=weighted[0].weight)
        data, encoder = recipe.data, recipe.model.encoder
        self.crops = self._crop_config(encoder_views(encoder))
        self.train_slides, names = self._open(self.slides["train"])
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

    def _open_val_crops(self, files: Sequence[SlideFiles]) -> ClassifiedTiles | ClassifiedCrops:
        """Every tile once, or random crops of each slide in turn."""
        data = self.recipe.data
        slides, names = self._open(files)
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

    def _open(self, files: Sequence[SlideFiles]) -> tuple[list[Slide], list[str]]:
        """Slides, and the class of each."""
        slides = open_images(files, self.crops.levels, self.data.pixels)
        check_channels(slides, self.recipe.model.encoder.channels)
        return slides, slide_classes(self.recipe.data, [slide.name for slide in slides])

    def _numbers(self, names: Sequence[str]) -> list[int]:
        unknown = sorted(set(names) - set(self.class_names))
        if unknown:
            expected = f"classes of the training slides: {', '.join(self.class_names)}"
            raise InputError(self.recipe.data.classes, expected=expected, got=unknown[0])
        return [self.class_names.index(name) for name in names]
