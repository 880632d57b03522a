"""timm backbones taken apart for relay tokens, and the branches that share one (Relay Tokens, figure 2)."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from math import log
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear, normalize, pad, scaled_dot_product_attention


class Stream(NamedTuple):
    """A view on its way through the blocks."""

    tokens: Tensor
    """``(B, N, D)``, class and register tokens first; in a Swin Transformer ``(B, *grid, C)``."""
    rotation: Tensor | None = None
    """Rotation of queries and keys in the form that timm expects."""


class Backbone(nn.Module):
    """A timm model, taken apart where relay tokens come in; its blocks are shared by all branches, until `unshare`.

    Args:
        timm: the model, without its classifier.
        own: parameters that each context branch has for itself, as prefixes of their names in this module.
        num_contexts: context branches with such parameters of their own, which start as copies.
    """

    timm: Any
    """timm's model: its parts are called, none is written again."""
    depths: tuple[int, ...]
    """Blocks of each stage; a Vision Transformer has one stage."""
    widths: tuple[int, ...]
    """Token width of each stage."""
    heads: tuple[int, ...]
    """Attention heads of each stage."""
    stride: tuple[int, int]
    """Pixels of a view along each axis for one token of the last stage."""

    def __init__(self, timm: nn.Module, own: tuple[str, ...], num_contexts: int) -> None:
        super().__init__()
        self.timm = timm
        named = {name: p for name, p in self.named_parameters() if name.startswith(own)}
        self.own_names = tuple(named)
        self.contexts = nn.ModuleList(
            nn.ParameterDict({_key(name): p.detach().clone() for name, p in named.items()}) for _ in range(num_contexts)
        )
        self.twins = nn.ModuleList()

    def unshare(self, num_contexts: int) -> None:
        """Give each of the context branches a copy of all blocks, and of the final norm, for itself."""
        twins = [copy.deepcopy(self) for _ in range(num_contexts)]
        for twin in twins:
            twin.contexts = nn.ModuleList()
            for name in {*twin.timm._modules, *twin.timm._parameters} - {"blocks", "layers", "norm"}:
                setattr(twin.timm, name, None)  # embeddings are those of `embed`
        self.twins.extend(twins)

    def branch(self, level: int) -> Self:
        """The backbone with the blocks of the branch with index ``level``: this one, unless they are its own."""
        return self if level == 0 or not self.twins else self.twins[level - 1]  # type: ignore[return-value]

    def embed(self, view: Tensor, level: int) -> Stream:
        """Tokens of the view ``(B, C, *space)`` of the branch with index ``level``, before the first block."""
        if level == 0 or not self.contexts:
            return self(view)
        stream: Stream = functional_call(self, self.own(level), (view,), tie_weights=False)
        return stream

    def own(self, level: int) -> dict[str, Tensor]:
        """The parameters that the context branch with index ``level`` has for itself, by the name of the local ones."""
        copies: Any = self.contexts[level - 1]
        return {name: copies[_key(name)] for name in self.own_names}

    def forward(self, view: Tensor) -> Stream:
        """Tokens of a view ``(B, C, *space)`` before the first block."""
        raise NotImplementedError

    def enter(self, stage: int, stream: Stream) -> Stream:
        """The stream at the beginning of a stage."""
        raise NotImplementedError

    def run(self, stage: int, index: int, stream: Stream, relay: Tensor | None) -> tuple[Stream, Tensor | None]:
        """One block on the tokens of a stream and the relay tokens ``(B, R, D)`` together."""
        raise NotImplementedError

    def to_map(self, stage: int, stream: Stream) -> Tensor:
        """Tokens after a stage (or within it) as a map ``(B, D, *grid)``, without class and register tokens."""
        raise NotImplementedError

    def add(self, stream: Stream, update: Tensor) -> Stream:
        """The stream with ``update`` ``(B, n, D)`` added to the tokens of its map, row-major."""
        raise NotImplementedError

    def normalize(self, stream: Stream) -> Stream:
        """The stream after the last block, through the backbone's final norm."""
        return stream._replace(tokens=self.timm.norm(stream.tokens))

    def has_positions(self) -> bool:
        """Whether tokens carry positions from a learned table."""
        return False


def _key(name: str) -> str:
    # a dictionary of parameters takes no dots
    return name.removeprefix("timm.").replace(".", "_")


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
        self.heads = (vit.blocks[0].attn.num_heads,)
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

    def add(self, stream: Stream, update: Tensor) -> Stream:
        """The stream with ``update`` added to its patch tokens."""
        return stream._replace(tokens=stream.tokens + pad(update, (0, 0, self.num_prefix, 0)))

    def has_positions(self) -> bool:
        """Whether there is a table of absolute positions."""
        return self.timm.pos_embed is not None


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
        self.heads = tuple(layer.blocks[0].attn.num_heads for layer in swin.layers)
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

    def add(self, stream: Stream, update: Tensor) -> Stream:
        """The stream with ``update`` added to its tokens."""
        return Stream(stream.tokens + update.view_as(stream.tokens))


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


POSITION_STD = 0.02
"""Spread of the relay tokens' rows in a position table, as of the table itself."""


class RelayTrunk(nn.Module):
    """A backbone for all branches, and the relay tokens between them.

    Where the backbone has a table of positions, the relay tokens start from zero and have a row of their own in the
    table of every branch, added when they enter that branch for the first time. Else their start is drawn. In stages of
    growing width a linear layer takes them along.

    Args:
        backbone: the backbone.
        num_relay: relay tokens; 0 leaves the branches independent.
        update: ``sequential`` or ``mean``, see `RelayConfig.update`.
        exchanges: of tokens, see `muvit.models.relay.exchange.build_exchanges`.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_relay: int,
        update: Literal["sequential", "mean"],
        exchanges: nn.ModuleDict | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.update = backbone, update
        self.exchanges = nn.ModuleDict() if exchanges is None else exchanges
        self.relay_tokens: nn.Parameter | None = None
        self.relay_positions: nn.Parameter | None = None
        self.widen = nn.ModuleList()
        if num_relay == 0:
            return
        widths = backbone.widths
        self.widen.extend(nn.Linear(a, b) for a, b in pairwise(widths))
        if backbone.has_positions():
            self.relay_tokens = nn.Parameter(torch.zeros(1, num_relay, widths[0]))
            rows = POSITION_STD * torch.randn(1, num_relay, widths[0])
            # one table is shared, or every branch has its own
            self.relay_positions = nn.Parameter(rows.repeat(1 + len(backbone.contexts), 1, 1))
        else:
            std = 1.0 if len(widths) > 1 else POSITION_STD
            self.relay_tokens = nn.Parameter(std * torch.randn(1, num_relay, widths[0]))

    @property
    def is_coupled(self) -> bool:
        """Whether anything passes from branch to branch."""
        return self.relay_tokens is not None or len(self.exchanges) > 0

    def forward(self, img: Tensor, bbox: Tensor, taps: Sequence[tuple[int, int]] = ()) -> list[list[Tensor]]:
        """Maps of all branches.

        Args:
            img: ``(B, L, C, *space)``, finest view first.
            bbox: ``(B, L, 2, 2)``, world pixels, yx; read by exchanges alone.
            taps: further blocks, as (stage, index), after which maps are kept; in the order of the backbone.

        Returns:
            For each branch, maps ``(B, D, *grid)``: the normalised output of the last block, then those of the taps,
            last block first.
        """
        streams = [self.backbone.embed(view, level) for level, view in enumerate(img.unbind(1))]
        relay = None if self.relay_tokens is None else self.relay_tokens.expand(img.shape[0], -1, -1)
        kept: list[list[Tensor]] = [[] for _ in streams]
        for stage, depth in enumerate(self.backbone.depths):
            streams = [self.backbone.branch(level).enter(stage, stream) for level, stream in enumerate(streams)]
            relay = relay if relay is None or stage == 0 else self.widen[stage - 1](relay)
            for index in range(depth):
                streams = self.exchange(stage, index, streams, bbox)
                streams, relay = self.couple(stage, index, streams, relay)
                if (stage, index) in taps:
                    for maps, stream in zip(kept, streams, strict=True):
                        maps.insert(0, self.backbone.to_map(stage, stream))
        last = len(self.backbone.depths) - 1
        streams = self.exchange(last, self.backbone.depths[last], streams, bbox)
        ends = (self.backbone.branch(level).normalize(stream) for level, stream in enumerate(streams))
        outputs = [self.backbone.to_map(last, stream) for stream in ends]
        return [[output, *maps] for output, maps in zip(outputs, kept, strict=True)]

    def exchange(self, stage: int, index: int, streams: Sequence[Stream], bbox: Tensor) -> list[Stream]:
        """The branches after the exchange that precedes a block, or follows the last, if there is one."""
        key = f"{stage}_{index}"
        if key not in self.exchanges:
            return list(streams)
        gains = self.exchanges[key]([self.backbone.to_map(stage, stream) for stream in streams], bbox)
        return [s if gain is None else self.backbone.add(s, gain) for s, gain in zip(streams, gains, strict=True)]

    def couple(
        self, stage: int, index: int, streams: Sequence[Stream], relay: Tensor | None
    ) -> tuple[list[Stream], Tensor | None]:
        """One block on all branches: ``[T_g', r'] = block([T_g ; r])``, then ``[T_l', r''] = block([T_l ; r'])``.

        Args:
            stage: index of the stage.
            index: index of the block in it.
            streams: the branches, finest first.
            relay: relay tokens ``(B, R, D)``.

        Returns:
            The branches and the relay tokens after the block.
        """
        after, updates = list(streams), []
        for level in reversed(range(len(streams))):
            entering = self.place(relay, level) if stage == index == 0 else relay
            after[level], updated = self.backbone.branch(level).run(stage, index, streams[level], entering)
            updates.append(updated)
            if self.update == "sequential":
                relay = updated
        if self.update == "mean" and relay is not None:
            relay = torch.stack([u for u in updates if u is not None]).mean(0)
        return after, relay

    def place(self, relay: Tensor | None, level: int) -> Tensor | None:
        """Add the relay tokens' positions in the table of the branch with index ``level``."""
        if relay is None or self.relay_positions is None:
            return relay
        return relay + self.relay_positions[min(level, len(self.relay_positions) - 1)]
