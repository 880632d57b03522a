"""The slides of a recipe as batches."""

import multiprocessing
import os
from functools import cached_property
from pathlib import Path

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset

from muvit.data.crops import CropConfig, GridCrops, LabelledSlide, NestedCrops, SlideCrops
from muvit.data.folders import class_legend, open_labelled_folder
from muvit.data.normalize import normalization_from_dict
from muvit.data.preprocessing import Preprocessing
from muvit.data.sampling import EpochSampler
from muvit.errors import InputError
from muvit.layers.patch import patch_grid
from muvit.pictures import class_colors
from muvit.training.recipe import Recipe


class SegmentationData(LightningDataModule):
    """Training and validation crops of a recipe; opening it checks every slide before any work starts.

    Raises:
        ReadError: a folder or slide cannot be read.
        InputError: slides, labels, levels or classes do not fit the recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        data, encoder = recipe.data, recipe.model.encoder
        size = (data.crop_size,) * encoder.ndim if isinstance(data.crop_size, int) else tuple(data.crop_size)
        patch_grid(size, encoder.patch)
        self.crops = CropConfig(
            levels=encoder.levels,
            size=size,
            normalization=normalization_from_dict(data.normalization),
            padding=data.padding,
            num_classes=recipe.model.num_classes,
            ignore_labels=data.ignore_labels,
        )
        self.train_slides = open_labelled_folder(Path(data.train))
        for image, _ in self.train_slides:
            if image.num_channels != encoder.in_channels:
                raise InputError(
                    image.path,
                    expected=f"{encoder.in_channels} channel(s), as model.encoder.in_channels says",
                    got=image.num_channels,
                )
        self.train_crops = NestedCrops(
            self._pairs(self.train_slides),
            self.crops,
            samples_per_epoch=data.samples_per_epoch,
            seed=recipe.run.seed,
            augmentation=data.augmentation,
            balance=data.balance,
            foreground_fraction=data.foreground_fraction,
        )

    @cached_property
    def val_crops(self) -> SlideCrops | None:
        """Validation crops without augmentation: every tile once, or a fixed random choice."""
        data = self.recipe.data
        if data.val is None:
            return None
        slides = self._pairs(open_labelled_folder(Path(data.val)))
        if data.val_samples is None:
            return GridCrops(slides, self.crops)
        return NestedCrops(slides, self.crops, samples_per_epoch=data.val_samples, seed=self.recipe.run.seed)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What a model trained on these crops needs for prediction."""
        count = self.recipe.model.num_classes
        image, label = self.train_slides[0]
        stored_names, stored_colors = class_legend(label, count)
        names = self.recipe.data.class_names or tuple(stored_names.get(i, f"class {i}") for i in range(count))
        if len(names) != count:
            raise InputError("data.class_names", expected=f"{count} names, as model.num_classes says", got=names)
        default = class_colors(count)
        return Preprocessing(
            crop_size=self.crops.size,
            normalization=self.crops.normalization,
            padding=self.crops.padding,
            class_names=tuple(names),
            class_colors=tuple(stored_colors.get(i, default[i]) for i in range(count)),
            pixel_size_um=image.pixel_size_um,
        )

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

    def _loader(self, dataset: Dataset, **options: object) -> DataLoader:
        workers = self.recipe.data.num_workers
        if workers is None:
            workers = min(8, os.cpu_count() or 1) if torch.cuda.is_available() else 0
        return DataLoader(
            dataset,
            batch_size=self.recipe.data.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            # the array store runs threads, which a forked process would lose
            multiprocessing_context=multiprocessing.get_context("spawn") if workers else None,
            pin_memory=torch.cuda.is_available(),
            **options,  # type: ignore[arg-type]
        )

    @staticmethod
    def _pairs(slides: list) -> list[LabelledSlide]:
        return list(slides)
