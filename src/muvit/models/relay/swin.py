"""Relay tokens in timm's Swin Transformers, V1 and V2.

In a block the relay tokens join every window, without position bias and unmasked; afterwards what they became in the
windows of a sample is averaged.
"""

from math import log
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize, pad, scaled_dot_product_attention

from muvit.models.relay.backbone import Backbone, Stream


class SwinBackbone(Backbone):
    """A Swin Transformer; V2 is told by its blocks, which normalise after attention and compare by cosine.

    Args:
        swin: timm's model.
        num_contexts: as in `Backbone`.
    """

    def __init__(self, swin: Any, num_contexts: int) -> None:
        super().__init__(swin, ("timm.patch_embed.",), num_contexts)
        self.depths = tuple(len(layer.blocks) for layer in swin.layers)
        self.widths = tuple(info["num_chs"] for info in swin.feature_info)
        rows, cols = swin.patch_embed.patch_size
        merged = 2 ** (len(self.depths) - 1)
        self.stride = (rows * merged, cols * merged)

    def forward(self, view: Tensor) -> Stream:
        """Patch embedding ``(B, *grid, C)``."""
        return Stream(self.timm.patch_embed(view))

    def enter(self, stage: int, stream: Stream) -> Stream:
        """Merge patches, where a stage begins with it."""
        return Stream(self.timm.layers[stage].downsample(stream.tokens))

    def run(self, stage: int, index: int, stream: Stream, relay: Tensor | None) -> tuple[Stream, Tensor | None]:
        """Attention in windows that the relay tokens join, then the feed-forward network on all tokens."""
        block = self.timm.layers[stage].blocks[index]
        if relay is None:
            return Stream(block(stream.tokens)), None
        _, rows, cols, _ = stream.tokens.shape
        x = torch.cat([stream.tokens.flatten(1, 2), relay], dim=1)
        if hasattr(block.attn, "logit_scale"):  # V2
            x = x + block.drop_path1(block.norm1(_attend_in_windows(block, x, (rows, cols))))
            x = x + block.drop_path2(block.norm2(block.mlp(x)))
        else:
            x = x + block.drop_path1(_attend_in_windows(block, block.norm1(x), (rows, cols)))
            x = x + block.drop_path2(block.mlp(block.norm2(x)))
        num_relay = relay.shape[1]
        return Stream(x[:, :-num_relay].unflatten(1, (rows, cols))), x[:, -num_relay:]

    def to_map(self, stage: int, stream: Stream) -> Tensor:
        """The tokens as a map ``(B, C, *grid)``."""
        return stream.tokens.movedim(-1, 1)


def _attend_in_windows(block: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention of image tokens and relay tokens ``(B, prod(grid) + R, C)``; R > 0."""
    area = grid[0] * grid[1]
    num_relay = x.shape[1] - area
    windows, padded = _to_windows(x[:, :area].unflatten(1, grid), block)
    batch, num_windows, window_area, _ = windows.shape
    joined = torch.cat([windows, x[:, None, area:].expand(-1, num_windows, -1, -1)], dim=2)
    bias = pad(_position_bias(block.attn), (0, num_relay, 0, num_relay))
    if block.attn_mask is not None:  # of shifted windows, (num_windows, window_area, window_area)
        mask = pad(block.attn_mask, (0, num_relay, 0, num_relay))
        bias = (bias + mask[:, None]).repeat(batch, 1, 1, 1)
    out = _attention(block.attn, joined.flatten(0, 1), bias).unflatten(0, (batch, num_windows))
    image = _from_windows(out[:, :, :window_area], block, grid, padded)
    return torch.cat([image.flatten(1, 2), out[:, :, window_area:].mean(1)], dim=1)


def _attention(attn: Any, x: Tensor, bias: Tensor) -> Tensor:
    """timm's window attention on ``(windows, N, C)``, with a bias ``(1 | windows, heads, N, N)`` of that size."""
    is_v2 = hasattr(attn, "logit_scale")
    if is_v2:
        offsets = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        qkv = linear(x, attn.qkv.weight, offsets)
    else:
        qkv = attn.qkv(x)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if is_v2:
        sharpness = attn.logit_scale.clamp(max=log(100)).exp()
        q, k = (normalize(q, dim=-1) * sharpness).to(v.dtype), normalize(k, dim=-1).to(v.dtype)
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=bias.to(v.dtype),
        dropout_p=attn.attn_drop.p if attn.training else 0.0,
        scale=1.0 if is_v2 else attn.scale,
    )
    # heads side by side, by a copy: whether a view could do it depends on the kernel, and ONNX export takes another
    return attn.proj_drop(attn.proj(torch.cat(out.unbind(1), dim=-1)))


def _position_bias(attn: Any) -> Tensor:
    """Bias ``(1, heads, window_area, window_area)`` by relative position."""
    index = attn.relative_position_index
    if hasattr(attn, "logit_scale"):
        table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table)).view(-1, attn.num_heads)
    else:
        table = attn.relative_position_bias_table
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)[None]


def _to_windows(x: Tensor, block: Any) -> tuple[Tensor, tuple[int, int]]:
    """``(B, H, W, C)``, shifted and padded as timm does, to ``(B, windows, window_area, C)``; and the padded size."""
    (height, width), (rows, cols) = x.shape[1:3], block.window_size
    x = torch.roll(x, [-n for n in block.shift_size], dims=(1, 2))
    x = pad(x, (0, 0, 0, -width % cols, 0, -height % rows))
    windows = x.unflatten(2, (-1, cols)).unflatten(1, (-1, rows)).transpose(2, 3)
    return windows.flatten(3, 4).flatten(1, 2), (x.shape[1], x.shape[2])


def _from_windows(x: Tensor, block: Any, grid: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """The inverse of `_to_windows`."""
    rows, cols = block.window_size
    x = x.unflatten(2, (rows, cols)).unflatten(1, (padded[0] // rows, padded[1] // cols)).transpose(2, 3)
    x = x.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]]
    return torch.roll(x, block.shift_size, dims=(1, 2))
