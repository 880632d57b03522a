"""Relay Tokens: passes of one timm backbone over local and context views, coupled by a few shared tokens."""

from muvit.models.relay.config import RelayConfig
from muvit.models.relay.segmenter import RelaySegmenter

__all__ = ["RelayConfig", "RelaySegmenter"]
