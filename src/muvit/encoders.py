"""Encoders under the names, and with the arguments, of release 0.1.0."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal, Self

from muvit.errors import CheckpointError, InputError
from muvit.geometry import PatchSpacing
from muvit.levels import Level
from muvit.models.encoder import EncoderConfig, MuViTEncoder
from muvit.models.layers.attention import AttentionMode
from muvit.models.layers.copies import CopiedPatches
from muvit.models.layers.rope import Periods, RotaryMode, RotaryParam

__all__ = ["MuViTEncoder", "MuViTEncoder2d", "MuViTEncoder3d", "MuViTEncoder4d"]


class _Encoder(MuViTEncoder):
    """`MuViTEncoder` of a fixed number of axes.

    Args:
        in_channels: as in `EncoderConfig`, and so on.
        input_space: space of the patches; ``real`` pixels are the only one.
    """

    ndim: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        levels: Sequence[Level],
        patch_size: int | tuple[int, ...] = 8,
        num_layers: int = 12,
        dim: int = 512,
        heads: int = 8,
        attention_mode: AttentionMode = "all",
        use_level_embed: bool = True,
        rotary_mode: RotaryMode = "per_layer",
        rotary_base: float | Periods = 10000.0,
        input_space: Literal["real"] = "real",
        dropout: float = 0.0,
        *,
        coarse_copies: CopiedPatches = "none",
        level_embed_std: float = 1.0,
        rotary_param: RotaryParam = "freq",
        patch_spacing: PatchSpacing = "center",
        fixed_positions: Literal["none", "grid", "scaled"] = "none",
    ) -> None:
        check_input_space(input_space)
        super().__init__(
            EncoderConfig(
                in_channels=in_channels,
                levels=tuple(levels),
                patch_size=patch_size,
                num_layers=num_layers,
                dim=dim,
                heads=heads,
                attention_mode=attention_mode,
                coarse_copies=coarse_copies,
                use_level_embed=use_level_embed,
                level_embed_std=level_embed_std,
                rotary_mode=rotary_mode,
                rotary_param=rotary_param,
                rotary_base=rotary_base,
                patch_spacing=patch_spacing,
                fixed_positions=fixed_positions,
                dropout=dropout,
                ndim=self.ndim,
            )
        )

    @property
    def _config(self) -> dict[str, Any]:
        return asdict(self.config) | {"input_space": "real"}

    @classmethod
    def _build(cls, config: EncoderConfig, source: object) -> Self:
        check_ndim(cls, config.ndim, source)
        arguments = asdict(config)
        del arguments["ndim"]
        return cls(**arguments)


class MuViTEncoder2d(_Encoder):
    """Multi-resolution encoder for images (yx); arguments: fields of `EncoderConfig`."""

    ndim = 2


class MuViTEncoder3d(_Encoder):
    """Multi-resolution encoder for volumes (zyx); arguments: fields of `EncoderConfig`."""

    ndim = 3


class MuViTEncoder4d(_Encoder):
    """Multi-resolution encoder for volumes over time (tzyx); arguments: fields of `EncoderConfig`."""

    ndim = 4


def check_input_space(input_space: str) -> None:
    """Refuse any other space of the patches than real pixels.

    Raises:
        InputError: it is another one.
    """
    if input_space != "real":
        raise InputError("input_space", expected="real", got=repr(input_space))


def check_ndim(kind: Any, ndim: int, source: object) -> None:
    """Refuse a model folder of another dimensionality than ``kind`` has.

    Raises:
        CheckpointError: it is of another one; names ``source``.
    """
    if ndim != kind.ndim:
        raise CheckpointError(source, expected=f"a {kind.ndim}D model for {kind.__name__}", got=f"a {ndim}D model")
