"""Multi-resolution vision transformers for gigapixel microscopy."""

__version__ = "0.2.0"
