"""Light decoders of the masked autoencoder: one level's tokens look at the context, then at each other."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from muvit.errors import InputError
from muvit.models.encoder import RotaryMode, build_ropes
from muvit.models.folder import FolderModel
from muvit.models.layers.attention import AttentionMode
from muvit.models.layers.block import Block


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and choices of a `MuViTDecoder`."""

    in_channels: int
    """Width of the tokens that come in."""
    dim: int = 256
    """Token width inside."""
    num_layers: int = 2
    """Transformer blocks."""
    heads: int = 8
    """Attention heads."""
    rotary_mode: RotaryMode = "per_layer"
    """As in the encoder."""
    rotary_base: float = 10000.0
    """As in the encoder."""
    dropout: float = 0.0
    """Dropout inside the feed-forward networks."""
    attention_mode: AttentionMode = "all"
    """A decoder does not know levels: ``all`` is the only mode (kept from release 0.1.0)."""
    ndim: int = 2
    """Spatial axes: 2 (yx), 3 (zyx) or 4 (tzyx)."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "dim", "num_layers", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"decoder {name}", expected="a positive number", got=getattr(self, name))
        if self.attention_mode != "all":
            raise InputError("decoder attention_mode", expected="'all'", got=repr(self.attention_mode))


class MuViTDecoder(FolderModel):
    """Projection, then transformer blocks; the first block attends to the context instead of to its own tokens.

    Args:
        **fields: the fields of `DecoderConfig` but ``ndim``, which the class binds.
    """

    config: DecoderConfig

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        if self.ndim is None:
            raise TypeError("build MuViTDecoder2d, MuViTDecoder3d or MuViTDecoder4d")
        self.config = config = DecoderConfig(ndim=self.ndim, **fields)
        self.proj = nn.Sequential(nn.Linear(config.in_channels, config.dim), nn.GELU(), nn.LayerNorm(config.dim))
        ropes = build_ropes(
            config.rotary_mode, config.num_layers, config.dim // config.heads, self.ndim, config.rotary_base
        )
        self.layers = nn.ModuleList(Block(config.dim, config.heads, rope, config.dropout) for rope in ropes)

    def forward(
        self,
        x: Tensor,
        coords: Tensor | None = None,
        context: Tensor | None = None,
        context_coords: Tensor | None = None,
    ) -> Tensor:
        """Decode tokens.

        Args:
            x: ``(B, N, in_channels)``.
            coords: coordinates ``(B, N, ndim)`` in world pixels, best near the origin; None leaves the tokens without
                position.
            context: tokens ``(B, M, in_channels)`` that the first block attends to; None: ``x`` itself.
            context_coords: coordinates ``(B, M, ndim)`` of the context, from the same origin.

        Returns:
            ``(B, N, dim)``.
        """
        x = self.proj(x)
        for i, block in enumerate(self.layers):
            assert isinstance(block, Block)
            rotation = None if coords is None else block.rotation(coords)
            context_kv = None
            if i == 0 and context is not None:
                seen = None if context_coords is None else block.rotation(context_coords)
                context_kv = block.attn.keys_values(self.proj(context), seen)
            x = block(x, rotation, context_kv=context_kv)
        return x


class MuViTDecoder2d(MuViTDecoder):
    """`MuViTDecoder` for images (yx)."""

    ndim: ClassVar[int] = 2


class MuViTDecoder3d(MuViTDecoder):
    """`MuViTDecoder` for volumes (zyx)."""

    ndim: ClassVar[int] = 3


class MuViTDecoder4d(MuViTDecoder):
    """`MuViTDecoder` for volumes over time (tzyx)."""

    ndim: ClassVar[int] = 4
