"""Exchange between views beside the relay tokens: by place in the world, or as other models of two scales do it.

Relay tokens carry content from branch to branch, but not its place in the world. In `WorldExchange` every view is
summed up by a grid of means of its tokens, each at the centre of its cell, and the tokens of all views attend to all
grids under the rotary embedding of MuViT (section 3.2). The cost is linear in the number of tokens. The others are
controls in the manner of CASWiT (`ContextExchange`), GLAM (`CellExchange`) and xT (`LateExchange`), of the same parts.

An exchange takes the tokens of each view ``(B, D, *grid)``, finest first, and boxes ``(B, L, 2, 2)``, world pixels, yx.
It gives what each view's tokens gain, ``(B, n, D)``, row-major; None for a view that gains nothing. All gains start
from 0, so that a pre-trained backbone starts undisturbed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from muvit.geometry import patch_centers
from muvit.levels import level_factors
from muvit.models.layers.attention import Attention, Block
from muvit.models.layers.rope import AxialRope, Periods, periods_between
from muvit.models.relay.backbones import Backbone
from muvit.models.relay.config import RelayConfig

LATE_BLOCKS = 2
"""Blocks of a `LateExchange`."""


class GridExchange(nn.Module):
    """Attention to grids that sum up the views; the base of the exchanges that have them.

    Args:
        dim: token width.
        heads: attention heads.
        num_levels: views of a sample; each has a learnable vector, added to its grid.
        cells: most cells of a grid along each axis.
    """

    def __init__(self, dim: int, heads: int, num_levels: int, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.norm = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.level_embed = nn.Parameter(0.02 * torch.randn(num_levels, dim))

    def normalize(self, tokens: Tensor) -> Tensor:
        """Normalised tokens ``(B, *grid, D)`` of a view."""
        return self.norm(tokens.movedim(1, -1))

    def sum_up(self, normed: Tensor, level: int) -> Tensor:
        """Grid ``(B, *cells, D)`` of the view with index ``level``, from its normalised tokens ``(B, *grid, D)``."""
        factors = [cell_side(n, self.cells) for n in normed.shape[1:3]]
        return avg_pool2d(normed.movedim(-1, 1), factors).movedim(1, -1) + self.level_embed[level]


class WorldExchange(GridExchange):
    """``T + Attention(LN(T), LN(G))``: the tokens ``T`` of every view attend to the grids ``G`` of all views.

    Args:
        dim: as in `GridExchange`, and so on.
        periods: shortest and longest period of the rotation, world pixels.
    """

    def __init__(self, dim: int, heads: int, num_levels: int, cells: int, periods: Periods) -> None:
        super().__init__(dim, heads, num_levels, cells)
        self.rope = AxialRope(dim // heads, 2, periods)
        nn.init.zeros_(self.attn.out.weight)

    def forward(self, maps: Sequence[Tensor], bbox: Tensor) -> list[Tensor]:
        """Gains of the tokens of every view."""
        boxes = from_first(bbox).unbind(1)
        normed = [self.normalize(tokens) for tokens in maps]
        keys, values = zip(
            *(self._grid(tokens, box, level) for level, (tokens, box) in enumerate(zip(normed, boxes, strict=True))),
            strict=True,
        )
        seen = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        return [
            self.attn(tokens.flatten(1, 2), self.rope(patch_centers(box, tokens.shape[1:3])), context_kv=seen)
            for tokens, box in zip(normed, boxes, strict=True)
        ]

    def _grid(self, normed: Tensor, box: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the grid of the view with index ``level``, from its tokens ``(B, *grid, D)``."""
        grid = self.sum_up(normed, level)
        return self.attn.keys_values(grid.flatten(1, 2), self.rope(patch_centers(box, grid.shape[1:3])))


class ContextExchange(GridExchange):
    """``T_l + tanh(g) Attention(LN(T_l), LN(G_c))``: the local view attends to the grids of the context views.

    In the manner of CASWiT (arXiv 2601.11310): cross-attention from the local to the context branch, and a gate ``g``
    for each channel. Tokens have no places beyond those that the backbone gives them.

    Args:
        dim: as in `GridExchange`, and so on.
    """

    def __init__(self, dim: int, heads: int, num_levels: int, cells: int) -> None:
        super().__init__(dim, heads, num_levels, cells)
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, maps: Sequence[Tensor], bbox: Tensor) -> list[Tensor | None]:
        """Gains of the tokens of the local view."""
        local, *others = (self.normalize(tokens) for tokens in maps)
        grids = [self.sum_up(tokens, level).flatten(1, 2) for level, tokens in enumerate(others, 1)]
        seen = self.attn.keys_values(torch.cat(grids, dim=1))
        gain = self.gate.tanh() * self.attn(local.flatten(1, 2), context_kv=seen)
        return [gain, *[None] * len(others)]


class CellExchange(GridExchange):
    """``T + Attention(LN(G))`` of the cell of each token: the grids of all views attend to each other.

    In the manner of GLAM, whose windows have tokens that attend to those of all other windows: here a cell is the
    window, and the mean of its tokens stands for it.

    Args:
        dim: as in `GridExchange`, and so on.
    """

    def __init__(self, dim: int, heads: int, num_levels: int, cells: int) -> None:
        super().__init__(dim, heads, num_levels, cells)
        nn.init.zeros_(self.attn.out.weight)

    def forward(self, maps: Sequence[Tensor], bbox: Tensor) -> list[Tensor]:
        """Gains of the tokens of every view."""
        grids = [self.sum_up(self.normalize(tokens), level) for level, tokens in enumerate(maps)]
        found = self.attn(torch.cat([grid.flatten(1, 2) for grid in grids], dim=1))
        gains = []
        parts = found.split([grid.shape[1] * grid.shape[2] for grid in grids], dim=1)
        for tokens, grid, part in zip(maps, grids, parts, strict=True):
            rows, cols = (n // m for n, m in zip(tokens.shape[2:], grid.shape[1:3], strict=True))
            gains.append(part.view_as(grid).repeat_interleave(rows, 1).repeat_interleave(cols, 2).flatten(1, 2))
        return gains


class LateExchange(nn.Module):
    """Blocks of MuViT over the tokens of all views in one sequence, after the backbone.

    In the manner of xT, which encodes the regions of an image one by one and their tokens together afterwards.

    Args:
        dim: token width.
        heads: attention heads.
        periods: shortest and longest period of the rotation, world pixels.
    """

    def __init__(self, dim: int, heads: int, periods: Periods) -> None:
        super().__init__()
        blocks = [Block(dim, heads, AxialRope(dim // heads, 2, periods)) for _ in range(LATE_BLOCKS)]
        for block in blocks:
            for parameter in (block.attn.out.weight, *block.ff[-1].parameters()):
                nn.init.zeros_(parameter)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, maps: Sequence[Tensor], bbox: Tensor) -> list[Tensor]:
        """Gains of the tokens of every view."""
        boxes = from_first(bbox).unbind(1)
        places = torch.cat([patch_centers(box, x.shape[2:]) for box, x in zip(boxes, maps, strict=True)], dim=1)
        tokens = [x.flatten(2).mT for x in maps]
        whole = before = torch.cat(tokens, dim=1)
        for block in self.blocks:
            whole = block(whole, block.rotation(places))  # type: ignore[operator]
        return list((whole - before).split([x.shape[1] for x in tokens], dim=1))


def from_first(bbox: Tensor) -> Tensor:
    """Boxes ``(B, L, 2, 2)`` from the lower corner of the finest: only differences count."""
    return bbox - bbox[:, :1, :1]


def cell_side(count: int, cells: int) -> int:
    """Tokens along one side of a cell: the fewest that divide ``count`` tokens into at most ``cells`` equal parts."""
    return next(side for side in range(1, count + 1) if count % side == 0 and count // side <= cells)


def build_exchanges(backbone: Backbone, config: RelayConfig) -> nn.ModuleDict:
    """The exchanges that the settings ask for, by the block that each precedes: ``<stage>_<index>``.

    Every second block has one, so that each pair of a Swin Transformer, of plain and of shifted windows, shares it.
    Context exchanges of a Swin Transformer are one for each stage, before its last block; a late one follows the last
    block of all.
    """
    if config.exchange == "none" or len(config.levels) == 1:
        return nn.ModuleDict()
    depths = backbone.depths
    places = [(stage, index) for stage, depth in enumerate(depths) for index in range(depth)][::2]
    if config.exchange == "late":
        places = [(len(depths) - 1, depths[-1])]
    elif config.exchange == "context" and len(depths) > 1:
        places = [(stage, depth - 1) for stage, depth in enumerate(depths)]
    return nn.ModuleDict({f"{stage}_{index}": _build(backbone, config, stage) for stage, index in places})


def _build(backbone: Backbone, config: RelayConfig, stage: int) -> nn.Module:
    """An exchange between tokens of a stage."""
    assert config.size is not None
    extent = max(n * f for n, f in zip(config.size, level_factors(config.levels[-1], 2), strict=True))
    merged = 2 ** (len(backbone.depths) - 1 - stage)
    fine = level_factors(config.levels[0], 2)
    periods = periods_between(min(side * f / merged for side, f in zip(backbone.stride, fine, strict=True)), extent)
    dim, heads = backbone.widths[stage], backbone.heads[stage]
    if config.exchange == "late":
        return LateExchange(dim, heads, periods)
    sizes = dim, heads, len(config.levels), config.exchange_cells
    if config.exchange == "world":
        return WorldExchange(*sizes, periods)
    return ContextExchange(*sizes) if config.exchange == "context" else CellExchange(*sizes)
