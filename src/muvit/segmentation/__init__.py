"""Segmentation: an encoder, a decoder for its tokens, and the logits of the finest view."""

from muvit.segmentation.model import SegmentationModel, Views
from muvit.segmentation.segmenter import Segmenter, SegmenterConfig

__all__ = ["SegmentationModel", "Segmenter", "SegmenterConfig", "Views"]
