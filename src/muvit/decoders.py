"""Decoders of the masked autoencoder under the names, and with the arguments, of release 0.1.0."""

from dataclasses import asdict
from typing import Any, ClassVar, Literal, Self

from muvit.encoders import check_ndim
from muvit.errors import InputError
from muvit.models.layers.rope import Periods, RotaryMode
from muvit.models.mae import DecoderConfig, MuViTDecoder

__all__ = ["MuViTDecoder", "MuViTDecoder2d", "MuViTDecoder3d", "MuViTDecoder4d"]


class _Decoder(MuViTDecoder):
    """`MuViTDecoder` of a fixed number of axes.

    Args:
        in_channels: as in `DecoderConfig`, and so on.
        attention_mode: a decoder knows no levels; ``all`` is the only one.
    """

    ndim: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        dim: int = 256,
        num_layers: int = 2,
        heads: int = 8,
        rotary_mode: RotaryMode = "per_layer",
        rotary_base: float | Periods = 10000.0,
        dropout: float = 0.0,
        attention_mode: Literal["all"] = "all",
    ) -> None:
        if attention_mode != "all":
            raise InputError("decoder attention_mode", expected="'all'", got=repr(attention_mode))
        super().__init__(
            DecoderConfig(
                in_channels=in_channels,
                dim=dim,
                num_layers=num_layers,
                heads=heads,
                rotary_mode=rotary_mode,
                rotary_base=rotary_base,
                dropout=dropout,
                ndim=self.ndim,
            )
        )

    @property
    def _config(self) -> dict[str, Any]:
        return asdict(self.config) | {"attention_mode": "all"}

    @classmethod
    def _build(cls, config: DecoderConfig, source: object) -> Self:
        check_ndim(cls, config.ndim, source)
        arguments = asdict(config)
        del arguments["ndim"]
        return cls(**arguments)


class MuViTDecoder2d(_Decoder):
    """Decoder of a masked autoencoder for images (yx); arguments: fields of `DecoderConfig`."""

    ndim = 2


class MuViTDecoder3d(_Decoder):
    """Decoder of a masked autoencoder for volumes (zyx); arguments: fields of `DecoderConfig`."""

    ndim = 3


class MuViTDecoder4d(_Decoder):
    """Decoder of a masked autoencoder for volumes over time (tzyx); arguments: fields of `DecoderConfig`."""

    ndim = 4
