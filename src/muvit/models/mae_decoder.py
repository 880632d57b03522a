"""Light decoders of the masked autoencoder: one level's tokens look at the context, then at each other."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn

from muvit.checks import Bounds, PositiveInt, Share, check_fields
from muvit.models.encoder import RotaryBase
from muvit.models.folder import FolderModel
from muvit.models.layers.block import Block
from muvit.models.layers.rope import RotaryMode, build_ropes


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and choices of a `MuViTDecoder`."""

    kind: ClassVar[str] = "decoder"

    in_channels: PositiveInt
    """Width of the tokens that come in."""
    dim: PositiveInt = 256
    """Token width inside."""
    num_layers: PositiveInt = 2
    """Transformer blocks."""
    heads: PositiveInt = 8
    """Attention heads."""
    rotary_mode: RotaryMode = "per_layer"
    """As in the encoder."""
    rotary_base: RotaryBase = 10000.0
    """As in the encoder."""
    dropout: Share = 0.0
    """Dropout inside the feed-forward networks."""
    ndim: Annotated[int, Bounds(min=2, max=4)] = 2
    """Spatial axes: 2 (yx), 3 (zyx) or 4 (tzyx)."""

    def __post_init__(self) -> None:
        check_fields(self, prefix="decoder ")


class MuViTDecoder(FolderModel):
    """Projection, then transformer blocks; the first block attends to the context instead of to its own tokens.

    Args:
        config: sizes and choices.
    """

    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.proj = nn.Sequential(nn.Linear(config.in_channels, config.dim), nn.GELU(), nn.LayerNorm(config.dim))
        ropes = build_ropes(
            config.rotary_mode, config.num_layers, config.dim // config.heads, config.ndim, config.rotary_base
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
