"""Slides of known classes as batches of crops."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from muvit.data.crops.classified import ClassifiedCrops, ClassifiedTiles
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.folders import open_folder
from muvit.data.slides.slide import Slide
from muvit.data.tables import read_column, values_of
from muvit.errors import InputError
from muvit.models.segmentation_model import encoder_views
from muvit.pictures import class_colors
from muvit.training.classify_recipe import ClassifyRecipe
from muvit.training.datamodules import CropsData, check_channels


class ClassificationData(CropsData):
    """Training and validation crops of a recipe; opening it checks every slide before any work starts.

    Raises:
        ReadError: a folder, slide or the table cannot be read.
        InputError: slides, levels or classes do not fit the recipe.
    """

    train_crops: ClassifiedCrops

    def __init__(self, recipe: ClassifyRecipe) -> None:
        super().__init__(recipe.data, recipe.run)
        self.recipe = recipe
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
        """What a model trained on these crops needs for prediction."""
        return self._preprocessing(self.train_slides[0], self.class_names, class_colors(len(self.class_names)))

    def _open(self, folder: Path) -> tuple[list[Slide], list[str]]:
        """Slides of a folder and the class of each."""
        slides, data = open_folder(folder / "images", self.crops.levels), self.recipe.data
        check_channels(slides.values(), self.recipe.model.encoder.in_channels, "model.encoder.in_channels")
        names = values_of(slides, read_column(data.classes, data.column), f"{data.classes}, {data.column}")
        return list(slides.values()), list(names.values())

    def _numbers(self, names: Sequence[str]) -> list[int]:
        strange = sorted(set(names) - set(self.class_names))
        if strange:
            expected = f"classes that training slides have: {', '.join(self.class_names)}"
            raise InputError(self.recipe.data.classes, expected=expected, got=strange[0])
        return [self.class_names.index(name) for name in names]
