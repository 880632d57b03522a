"""Slides, pyramids, crops of them and data sets."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muvit.data.crops.dataset import MuViTDataset

__all__ = ["MuViTDataset"]


def __getattr__(name: str) -> Any:
    if name != "MuViTDataset":  # reading a slide needs no torch, a data set does
        raise AttributeError(f"module 'muvit.data' has no attribute {name!r}")
    from muvit.data.crops.dataset import MuViTDataset

    return MuViTDataset
