"""Decoders of the masked autoencoder under the import path of release 0.1.0."""

from muvit.models.mae_decoder import DecoderConfig, MuViTDecoder, MuViTDecoder2d, MuViTDecoder3d, MuViTDecoder4d

__all__ = ["DecoderConfig", "MuViTDecoder", "MuViTDecoder2d", "MuViTDecoder3d", "MuViTDecoder4d"]
