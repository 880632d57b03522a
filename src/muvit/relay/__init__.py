"""Relay Tokens: passes of one timm backbone over local and context views, coupled by a few shared tokens."""

from muvit.relay.config import RelayConfig
from muvit.relay.segmenter import RelaySegmenter

__all__ = ["RelayConfig", "RelaySegmenter"]
