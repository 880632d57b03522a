"""The slides of a recipe as batches."""

import logging
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset

from muvit.data.annotations.config import AnnotationConfig
from muvit.data.annotations.open import config_of
from muvit.data.crops.config import CropConfig
from muvit.data.crops.crops import GridCrops, NestedCrops
from muvit.data.crops.normalize import Normalization, normalization_from_dict
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.crops.sampling import EpochSampler
from muvit.data.crops.slide_crops import LabelledSlide, SlideCrops
from muvit.data.crops.statistics import measure_channels
from muvit.data.folders import class_legend, open_folder, open_labelled_folder
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.levels import Level
from muvit.models.segmentation_model import Views
from muvit.pictures import class_colors
from muvit.training.recipes import CropsConfig, PretrainRecipe, Recipe, RunConfig

_LOG = logging.getLogger(__name__)


class CropsData(LightningDataModule):
    """Training and validation crops of a recipe as batches; what segmentation and pre-training share.

    Args:
        data: the slides and the crops.
        run: seed of everything random, and how many processes share the crops.
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
            InputError: a process would be without any, while the others wait for its scores.
        """
        if self.data.val is None:
            return None
        crops = self._open_val_crops(Path(self.data.val))
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
        """Batches of the validation crops, shared out between the processes."""
        if self.val_crops is None:
            return []
        rank, replicas = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return self._loader(Subset(self.val_crops, range(rank, len(self.val_crops), replicas)))

    def _crop_config(self, views: Views, **labels: Any) -> CropConfig:
        size = self.data.crop_size
        size = (size,) * views.ndim if isinstance(size, int) else tuple(size)
        if len(size) != views.ndim:
            raise InputError("data.crop_size", expected=f"one number, or {views.ndim} of them", got=size)
        views.check_size(size, "data.crop_size")
        return CropConfig(
            levels=views.levels,
            size=size,
            normalization=self._normalization(views.levels[0]),
            padding=self.data.padding,
            free_views=self.data.free_views,
            placement=self.data.placement,
            **labels,
        )

    def _preprocessing(
        self, image: Slide, names: Sequence[str] = (), colors: Sequence[tuple[int, int, int]] = ()
    ) -> Preprocessing:
        return Preprocessing(
            crop_size=self.crops.size,
            normalization=self.crops.normalization,
            padding=self.crops.padding,
            placement=self.crops.placement,
            free_views=self.crops.free_views,
            class_names=tuple(names),
            class_colors=tuple(colors),
            has_background=self.crops.has_background,
            pixel_size_um=image.pixel_size_um,
        )

    def _normalization(self, level: Level) -> Normalization:
        """As the recipe says, with the statistics of the training slides at ``level`` where it leaves them out."""
        values = self.data.normalization
        if values.get("kind") == "standardize" and not {"mean", "std"} & values.keys():
            slides = open_folder(Path(self.data.train) / "images", (level,)).values()
            mean, std = measure_channels(list(slides), level)
            values = values | {"mean": mean, "std": std}
        return normalization_from_dict(values)

    def _random_crops(self, slides: Sequence[LabelledSlide], crops: CropConfig, **balance: Any) -> NestedCrops:
        data = self.data
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
            num_workers=workers,
            persistent_workers=workers > 0,
            # the array store runs threads, which a forked process would lose
            multiprocessing_context=multiprocessing.get_context("spawn") if workers else None,
            pin_memory=torch.cuda.is_available(),
            **options,  # type: ignore[arg-type]
        )


class SegmentationData(CropsData):
    """Training and validation crops of a recipe; opening it checks every slide before any work starts.

    Args:
        recipe: all settings.
        views: the views that its model takes.

    Raises:
        ReadError: a folder or slide cannot be read.
        InputError: slides, labels, levels or classes do not fit the recipe.
    """

    def __init__(self, recipe: Recipe, views: Views) -> None:
        super().__init__(recipe.data, recipe.run)
        self.recipe = recipe
        data = recipe.data
        self.crops = self._crop_config(
            views,
            num_classes=recipe.model.num_classes,
            ignore_labels=data.ignore_labels,
            has_background=data.has_background,
            label_levels=data.label_levels,
        )
        relay = recipe.relay
        has_tokens = relay is not None and relay.fusion == "relay" and relay.relay_tokens > 0
        if has_tokens and len(views.levels) > 1 and data.placement == "nested":
            _LOG.warning(
                "relay tokens know no coordinates: nested views teach them little; set data.placement to concentric"
            )
        self.train_slides = self._open_pairs(Path(data.train), data.annotations)
        check_channels([image for image, _ in self.train_slides], views.in_channels, "model.encoder.in_channels")
        self.train_crops = self._random_crops(
            self._pairs(self.train_slides),
            self.crops,
            balance=data.balance,
            foreground_fraction=data.foreground_fraction,
        )

    def _open_val_crops(self, folder: Path) -> SlideCrops:
        # classes found in the training annotations have the same values here
        annotations = self.recipe.data.annotations or config_of(self.train_slides[0][1])
        return self._fixed_crops(self._pairs(self._open_pairs(folder, annotations)), self.crops)

    def _open_pairs(self, folder: Path, annotations: AnnotationConfig | None) -> list[tuple[Slide, Slide]]:
        return open_labelled_folder(folder, self.crops.levels, self.crops.labelled_levels, annotations)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What a model trained on these crops needs for prediction."""
        count = self.recipe.model.num_classes
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
                "%s: no pixel of %s was seen; what does not occur cannot be learned",
                self.recipe.data.train,
                ", ".join(absent),
            )
        default = class_colors(count)
        return self._preprocessing(image, names, [stored_colors.get(i, default[i]) for i in range(count)])

    @staticmethod
    def _pairs(slides: list) -> list[LabelledSlide]:
        return list(slides)


class PretrainData(CropsData):
    """Crops of unlabelled slides; opening it checks every slide before any work starts.

    Raises:
        ReadError: a folder or slide cannot be read.
        InputError: slides or levels do not fit the recipe.
    """

    def __init__(self, recipe: PretrainRecipe) -> None:
        super().__init__(recipe.data, recipe.run)
        self.recipe = recipe
        model = recipe.model.encoder
        self.crops = self._crop_config(
            Views(levels=model.levels, in_channels=model.in_channels, ndim=model.ndim, multiple=model.patch)
        )
        self.train_slides = self._open(Path(recipe.data.train))
        self.train_crops = self._random_crops(self.train_slides, self.crops)

    def _open_val_crops(self, folder: Path) -> SlideCrops:
        return self._fixed_crops(self._open(folder), self.crops)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What the pixels of these crops are; there are no classes."""
        return self._preprocessing(self.train_slides[0][0])

    def _open(self, folder: Path) -> list[LabelledSlide]:
        slides = list(open_folder(folder / "images", self.crops.levels).values())
        check_channels(slides, self.recipe.model.encoder.in_channels, "model.encoder.in_channels")
        return [(slide, None) for slide in slides]


def check_channels(slides: Iterable[Slide], channels: int, setting: str) -> None:
    """Refuse slides of another number of channels than the model's, which ``setting`` of the recipe says.

    Raises:
        InputError: one has.
    """
    for slide in slides:
        if slide.num_channels != channels:
            raise InputError(slide.path, expected=f"{channels} channel(s), as {setting} says", got=slide.num_channels)
