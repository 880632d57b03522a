"""Exchange between views by place: tokens attend to grids of all views, rotated by world coordinates.

Relay tokens carry content from branch to branch, but not its place in the world. Here every view is summed up by a grid
of means of its tokens, each at the centre of its cell, and the tokens of all views attend to all grids under the rotary
embedding of MuViT (section 3.2). The cost is linear in the number of tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from muvit.geometry import patch_centers
from muvit.levels import level_factors
from muvit.models.layers.attention import Attention
from muvit.models.layers.rope import AxialRope, Periods, periods_between
from muvit.models.relay.backbones import Backbone
from muvit.models.relay.config import RelayConfig


class WorldExchange(nn.Module):
    """``T + Attention(LN(T), LN(G))``: the tokens ``T`` of every view attend to the grids ``G`` of all views.

    The projection of the result starts from 0, so that a pre-trained backbone starts undisturbed.

    Args:
        dim: token width.
        heads: attention heads.
        num_levels: views of a sample; each has a learnable vector, added to its grid.
        cells: most cells of a grid along each axis.
        periods: shortest and longest period of the rotation, world pixels.
    """

    def __init__(self, dim: int, heads: int, num_levels: int, cells: int, periods: Periods) -> None:
        super().__init__()
        self.cells = cells
        self.norm = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.rope = AxialRope(dim // heads, 2, periods)
        self.level_embed = nn.Parameter(0.02 * torch.randn(num_levels, dim))
        nn.init.zeros_(self.attn.out.weight)

    def forward(self, maps: Sequence[Tensor], bbox: Tensor) -> list[Tensor]:
        """Updates of the tokens of every view.

        Args:
            maps: tokens of each view ``(B, D, *grid)``, finest first.
            bbox: ``(B, L, 2, 2)``, world pixels, yx.

        Returns:
            What each view's tokens gain, ``(B, n, D)``, row-major.
        """
        boxes = (bbox - bbox[:, :1, :1]).unbind(1)  # from an origin within the sample: only differences count
        normed = [self.norm(tokens.movedim(1, -1)) for tokens in maps]
        keys, values = zip(
            *(self._grid(tokens, box, level) for level, (tokens, box) in enumerate(zip(normed, boxes, strict=True))),
            strict=True,
        )
        seen = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        return [
            self.attn(tokens.flatten(1, 2), self.rope(patch_centers(box, tokens.shape[1:3])), context_kv=seen)
            for tokens, box in zip(normed, boxes, strict=True)
        ]

    def _grid(self, tokens: Tensor, box: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the grid of the view with index ``level``, from its tokens ``(B, *grid, D)``."""
        factors = [cell_side(n, self.cells) for n in tokens.shape[1:3]]
        grid = avg_pool2d(tokens.movedim(-1, 1), factors).movedim(1, -1)
        places = self.rope(patch_centers(box, grid.shape[1:3]))
        return self.attn.keys_values(grid.flatten(1, 2) + self.level_embed[level], places)


def cell_side(count: int, cells: int) -> int:
    """Tokens along one side of a cell: the fewest that divide ``count`` tokens into at most ``cells`` equal parts."""
    return next(side for side in range(1, count + 1) if count % side == 0 and count // side <= cells)


def build_exchanges(backbone: Backbone, config: RelayConfig) -> nn.ModuleDict:
    """The exchanges that the settings ask for, by the block that each precedes: ``<stage>_<index>``.

    Every second block has one, so that each pair of a Swin Transformer, of plain and of shifted windows, shares it.
    """
    if config.exchange == "none" or len(config.levels) == 1:
        return nn.ModuleDict()
    assert config.size is not None
    blocks = [(stage, index) for stage, depth in enumerate(backbone.depths) for index in range(depth)]
    extent = max(n * f for n, f in zip(config.size, level_factors(config.levels[-1], 2), strict=True))
    fine = level_factors(config.levels[0], 2)
    found = nn.ModuleDict()
    for stage, index in blocks[::2]:
        merged = 2 ** (len(backbone.depths) - 1 - stage)
        pitch = min(side * f / merged for side, f in zip(backbone.stride, fine, strict=True))
        found[f"{stage}_{index}"] = WorldExchange(
            backbone.widths[stage],
            backbone.heads[stage],
            len(config.levels),
            config.exchange_cells,
            periods_between(pitch, extent),
        )
    return found
