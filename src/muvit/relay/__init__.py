"""PLACEHOLDER until the real package is written (so that imports elsewhere work meanwhile)."""

from dataclasses import dataclass

from muvit.segmentation.model import SegmentationModel


@dataclass(frozen=True, kw_only=True)
class RelayConfig:
    """Placeholder."""

    backbone: str
    relay_tokens: int = 4
    in_channels: int | None = None
    num_classes: int | None = None
    levels: tuple[float, ...] | None = None
    size: tuple[int, ...] | None = None


class RelaySegmenter(SegmentationModel):
    """Placeholder."""
