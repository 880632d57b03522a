"""Relay tokens in timm's Vision Transformers: `VisionTransformer` (ViT, DeiT, DINOv2) and `Eva` (EVA, DINOv3)."""

from typing import Any

import torch
from torch import Tensor

from muvit.models.relay.backbone import Backbone, Stream


class ViTBackbone(Backbone):
    """A Vision Transformer; relay tokens stand before the others in the sequence that a block takes.

    Args:
        vit: timm's model.
        num_relay: relay tokens.
        num_contexts: as in `Backbone`.
    """

    def __init__(self, vit: Any, num_relay: int, num_contexts: int) -> None:
        super().__init__(vit, ("timm.patch_embed.", "timm.pos_embed"), num_contexts)
        self.depths, self.widths = (len(vit.blocks),), (vit.embed_dim,)
        self.grid, self.stride = vit.patch_embed.grid_size, vit.patch_embed.feat_ratio(as_scalar=False)
        self.num_prefix = vit.num_prefix_tokens
        for block in vit.blocks:
            if hasattr(block.attn, "num_prefix_tokens"):  # rotary attention leaves that many tokens unrotated
                block.attn.num_prefix_tokens += num_relay

    def forward(self, view: Tensor) -> Stream:
        """Patch embedding, class and register tokens, positions."""
        placed = self.timm._pos_embed(self.timm.patch_embed(view))
        tokens, rotation = placed if isinstance(placed, tuple) else (placed, None)
        return Stream(self.timm.norm_pre(tokens), rotation)

    def enter(self, stage: int, stream: Stream) -> Stream:
        """The stream itself: there is one stage."""
        return stream

    def run(self, stage: int, index: int, stream: Stream, relay: Tensor | None) -> tuple[Stream, Tensor | None]:
        """``[r' ; T'] = block([r ; T])``."""
        block, rotation = self.timm.blocks[index], stream.rotation
        x = stream.tokens if relay is None else torch.cat([relay, stream.tokens], dim=1)
        if rotation is not None and self.timm.rope_mixed:  # the angles of each block are its own
            rotation = rotation[index]
        x = block(x) if rotation is None else block(x, rope=rotation)
        if relay is None:
            return stream._replace(tokens=x), None
        num_relay = relay.shape[1]
        return stream._replace(tokens=x[:, num_relay:]), x[:, :num_relay]

    def to_map(self, stage: int, stream: Stream) -> Tensor:
        """The patch tokens as a map ``(B, D, *grid)``."""
        return stream.tokens[:, self.num_prefix :].mT.unflatten(-1, self.grid)

    def has_positions(self) -> bool:
        """Whether there is a table of absolute positions."""
        return self.timm.pos_embed is not None
