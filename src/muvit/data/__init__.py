"""Slides, pyramids, nested crops: everything that makes views and boxes out of images."""

from muvit.data.crops.dataset import MuViTDataset

__all__ = ["MuViTDataset"]
