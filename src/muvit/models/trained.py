"""Any model that labels pixels: from its settings, or from its folder."""

from dataclasses import fields
from pathlib import Path

import torch

from muvit.models.baselines import Baseline, BaselineConfig
from muvit.models.folder import load_config, model_folder
from muvit.models.relay import RelayConfig, RelaySegmenter
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.segmenter import Segmenter, SegmenterConfig

NetworkConfig = SegmenterConfig | BaselineConfig | RelayConfig
"""Settings of any of the models."""


def build_model(config: NetworkConfig) -> SegmentationModel:
    """The model that these settings describe, with fresh (or, if they say so, pre-trained) weights."""
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    if isinstance(config, SegmenterConfig):
        return Segmenter(**settings)
    return Baseline(**settings) if isinstance(config, BaselineConfig) else RelaySegmenter(**settings)


def load_model(folder: Path | str, device: str | torch.device = "cpu") -> SegmentationModel:
    """Load the model that a training run left: a `Segmenter`, a `Baseline` or a `RelaySegmenter`.

    Args:
        folder: the model folder, or the folder of a run, which stands for its best model.
        device: where to put it.

    Raises:
        CheckpointError: the folder is missing, damaged, or holds another kind of model.
    """
    config = load_config(model_folder(folder))
    kinds: dict[str, type[SegmentationModel]] = {"network": Baseline, "relay_tokens": RelaySegmenter}
    kind = next((kind for key, kind in kinds.items() if key in config), Segmenter)
    return kind.from_folder(folder, device)
