"""Multi-resolution vision transformers for gigapixel microscopy.

The names below are imported when they are first used, so that ``import muvit`` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from muvit.version import __version__

if TYPE_CHECKING:
    from muvit.data.crops.crops import GridCrops, NestedCrops
    from muvit.data.crops.dataset import MuViTDataset
    from muvit.data.crops.preprocessing import CropConfig, Preprocessing
    from muvit.data.pyramids.convert import convert_image
    from muvit.data.slides.open import open_slide
    from muvit.data.slides.slide import Slide
    from muvit.encoders import MuViTEncoder2d, MuViTEncoder3d, MuViTEncoder4d
    from muvit.errors import MuViTError
    from muvit.evaluation.scores.segmentation import Evaluation, evaluate_slides
    from muvit.inference.classify import classify_slide
    from muvit.inference.explain import explain_point
    from muvit.inference.features import extract_features
    from muvit.inference.loaded import load_model
    from muvit.inference.predict import predict_slide
    from muvit.inference.run.execution import Execution
    from muvit.inference.run.plan import PredictOptions
    from muvit.inference.suggest import suggest_regions
    from muvit.losses import SegmentationLoss
    from muvit.mae import MuViTMAE2d, MuViTMAE3d, MuViTMAE4d
    from muvit.models.attention_maps import attention_maps
    from muvit.models.classifier import Classifier, ClassifierConfig
    from muvit.models.encoder import EncoderConfig, MuViTEncoder
    from muvit.models.mae import MAEConfig, MuViTMAE
    from muvit.models.segmentation_model import SegmentationModel, Views
    from muvit.models.segmenter import Segmenter, SegmenterConfig
    from muvit.models.trained import TrainedModel
    from muvit.settings import read_settings
    from muvit.training.fit import pretrain_mae, train_segmenter
    from muvit.training.recipes import PretrainRecipe, Recipe

__all__ = [
    "Classifier",
    "ClassifierConfig",
    "CropConfig",
    "EncoderConfig",
    "Evaluation",
    "Execution",
    "GridCrops",
    "MAEConfig",
    "MuViTDataset",
    "MuViTEncoder",
    "MuViTEncoder2d",
    "MuViTEncoder3d",
    "MuViTEncoder4d",
    "MuViTError",
    "MuViTMAE",
    "MuViTMAE2d",
    "MuViTMAE3d",
    "MuViTMAE4d",
    "NestedCrops",
    "PredictOptions",
    "Preprocessing",
    "PretrainRecipe",
    "Recipe",
    "SegmentationLoss",
    "SegmentationModel",
    "Segmenter",
    "SegmenterConfig",
    "Slide",
    "TrainedModel",
    "Views",
    "__version__",
    "attention_maps",
    "classify_slide",
    "convert_image",
    "evaluate_slides",
    "explain_point",
    "extract_features",
    "load_model",
    "open_slide",
    "predict_slide",
    "pretrain_mae",
    "read_settings",
    "suggest_regions",
    "train_segmenter",
]

_MODULES = (
    (
        "data.crops.crops",
        (
            "GridCrops",
            "NestedCrops",
        ),
    ),
    ("data.crops.dataset", ("MuViTDataset",)),
    ("data.crops.preprocessing", ("CropConfig", "Preprocessing")),
    ("data.pyramids.convert", ("convert_image",)),
    ("data.slides.open", ("open_slide",)),
    ("data.slides.slide", ("Slide",)),
    (
        "encoders",
        (
            "MuViTEncoder2d",
            "MuViTEncoder3d",
            "MuViTEncoder4d",
        ),
    ),
    ("errors", ("MuViTError",)),
    (
        "evaluation.scores.segmentation",
        (
            "Evaluation",
            "Execution",
            "evaluate_slides",
        ),
    ),
    ("inference.classify", ("classify_slide",)),
    ("inference.explain", ("explain_point",)),
    ("inference.features", ("extract_features",)),
    ("inference.loaded", ("load_model",)),
    ("inference.predict", ("predict_slide",)),
    ("inference.run.execution", ("Execution",)),
    ("inference.run.plan", ("PredictOptions",)),
    ("inference.suggest", ("suggest_regions",)),
    ("losses", ("SegmentationLoss",)),
    (
        "mae",
        (
            "MuViTMAE2d",
            "MuViTMAE3d",
            "MuViTMAE4d",
        ),
    ),
    ("models.attention_maps", ("attention_maps",)),
    (
        "models.classifier",
        (
            "Classifier",
            "ClassifierConfig",
        ),
    ),
    (
        "models.encoder",
        (
            "EncoderConfig",
            "MuViTEncoder",
        ),
    ),
    (
        "models.mae",
        (
            "MAEConfig",
            "MuViTMAE",
        ),
    ),
    (
        "models.segmentation_model",
        (
            "SegmentationModel",
            "Views",
        ),
    ),
    (
        "models.segmenter",
        (
            "Segmenter",
            "SegmenterConfig",
        ),
    ),
    ("models.trained", ("TrainedModel",)),
    ("settings", ("read_settings",)),
    ("training.fit", ("pretrain_mae",)),
    (
        "training.recipes",
        (
            "PretrainRecipe",
            "Recipe",
        ),
    ),
    ("training.fit", ("train_segmenter",)),
)
_HOME = {name: module for module, names in _MODULES for name in names}

if not TYPE_CHECKING:  # else a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'muvit' has no attribute {name!r}")
        return getattr(import_module(f"muvit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
