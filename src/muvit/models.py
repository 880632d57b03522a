"""Any model that labels pixels, from its folder."""

from pathlib import Path

import torch

from muvit.checkpoints import load_config, model_folder
from muvit.segmentation import SegmentationModel, Segmenter


def load_model(folder: Path | str, device: str | torch.device = "cpu") -> SegmentationModel:
    """Load the model that a training run left: a `Segmenter`, a baseline, or a relay model.

    Args:
        folder: the model folder, or the folder of a run, which stands for its best model.
        device: where to put it.

    Raises:
        CheckpointError: the folder is missing, damaged, or holds another kind of model.
    """
    config = load_config(model_folder(folder))
    if "network" in config:
        from muvit.baselines import Baseline

        return Baseline.from_folder(folder, device)
    if "relay_tokens" in config:
        from muvit.relay import RelaySegmenter

        return RelaySegmenter.from_folder(folder, device)
    return Segmenter.from_folder(folder, device)
