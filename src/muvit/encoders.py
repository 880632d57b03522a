"""Encoders under the import path of release 0.1.0."""

from muvit.models.encoder import EncoderConfig, MuViTEncoder, MuViTEncoder2d, MuViTEncoder3d, MuViTEncoder4d

__all__ = ["EncoderConfig", "MuViTEncoder", "MuViTEncoder2d", "MuViTEncoder3d", "MuViTEncoder4d"]
