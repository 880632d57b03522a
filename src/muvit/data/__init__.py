"""Slides, pyramids, crops of them and data sets.

The names below are imported when they are first used: reading a slide needs no torch, a data set does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muvit.data.annotations.objects import AnnotationConfig
    from muvit.data.annotations.open import open_annotations
    from muvit.data.crops.augment import Augmentation
    from muvit.data.crops.classified import ClassifiedCrops, ClassifiedTiles
    from muvit.data.crops.crops import GridCrops, NestedCrops
    from muvit.data.crops.dataset import MuViTDataset
    from muvit.data.crops.normalize import Percentile, Range, Standardize
    from muvit.data.crops.placement import FreeViews, Placement, Window, place_views
    from muvit.data.crops.preprocessing import CropConfig, Preprocessing
    from muvit.data.crops.stain import Macenko, Reinhard
    from muvit.data.folders import open_folder, open_labelled_folder
    from muvit.data.pyramids.convert import convert_image
    from muvit.data.pyramids.writer import PyramidWriter
    from muvit.data.slides.derived import complete_slide
    from muvit.data.slides.open import open_slide
    from muvit.data.slides.slide import Slide

__all__ = [
    "AnnotationConfig",
    "Augmentation",
    "ClassifiedCrops",
    "ClassifiedTiles",
    "CropConfig",
    "FreeViews",
    "GridCrops",
    "Macenko",
    "MuViTDataset",
    "NestedCrops",
    "Percentile",
    "Placement",
    "Preprocessing",
    "PyramidWriter",
    "Range",
    "Reinhard",
    "Slide",
    "Standardize",
    "Window",
    "complete_slide",
    "convert_image",
    "open_annotations",
    "open_folder",
    "open_labelled_folder",
    "open_slide",
    "place_views",
]

_MODULES = (
    ("annotations.objects", ("AnnotationConfig",)),
    ("annotations.open", ("open_annotations",)),
    ("crops.augment", ("Augmentation",)),
    ("crops.classified", ("ClassifiedCrops", "ClassifiedTiles")),
    ("crops.crops", ("GridCrops", "NestedCrops")),
    ("crops.dataset", ("MuViTDataset",)),
    ("crops.normalize", ("Percentile", "Range", "Standardize")),
    ("crops.placement", ("FreeViews", "Placement", "Window", "place_views")),
    ("crops.preprocessing", ("CropConfig", "Preprocessing")),
    ("crops.stain", ("Macenko", "Reinhard")),
    ("folders", ("open_folder", "open_labelled_folder")),
    ("pyramids.convert", ("convert_image",)),
    ("pyramids.writer", ("PyramidWriter",)),
    ("slides.derived", ("complete_slide",)),
    ("slides.open", ("open_slide",)),
    ("slides.slide", ("Slide",)),
)
_HOME = {name: module for module, names in _MODULES for name in names}

if not TYPE_CHECKING:  # else a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'muvit.data' has no attribute {name!r}")
        return getattr(import_module(f"muvit.data.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
