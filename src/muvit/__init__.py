"""Multi-resolution vision transformers for gigapixel microscopy.

The names below are imported when they are first used, so that ``import muvit`` itself costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOME = {
    "MuViTEncoder2d": "encoders",
    "MuViTEncoder3d": "encoders",
    "MuViTEncoder4d": "encoders",
    "EncoderConfig": "models.encoder",
    "MuViTEncoder": "models.encoder",
    "MAEConfig": "models.mae",
    "MuViTMAE": "models.mae",
    "MuViTMAE2d": "mae",
    "MuViTMAE3d": "mae",
    "MuViTMAE4d": "mae",
    "load_model": "models.trained",
    "Segmenter": "models.segmenter",
    "SegmenterConfig": "models.segmenter",
    "MuViTDataset": "data.crops.dataset",
    "open_slide": "data.slides.open",
    "convert_image": "data.pyramids.convert",
    "predict_slide": "inference.predict",
    "evaluate_slides": "evaluation.scores.segmentation",
    "MuViTError": "errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'muvit' has no attribute {name!r}")
    return getattr(import_module(f"muvit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
