"""Copies of coarse tokens near the finest view, which learn its detail where their originals must not."""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, prod
from typing import Literal

import torch
from torch import Tensor, nn

from muvit.geometry import nearest_patches
from muvit.levels import Level, level_factors

CopiedPatches = Literal["none", "under", "ring"]
"""Coarse patches with a second token for each finest view: none; those under the finest view; also the ring around
them."""


class TokenCopies(nn.Module):
    """Second tokens of coarse patches: the first ones plus a learnable vector, at the same places.

    Args:
        dim: token width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # from zero a copy starts as what its original would be under full attention
        self.vector = nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tensor, positions: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Copy some tokens.

        Args:
            tokens: ``(B, N, D)`` before the first block.
            positions: their places ``(B, N, ndim)``.
            indices: tokens to copy ``(B, c)``.

        Returns:
            The copies ``(B, c, D)`` and their places ``(B, c, ndim)``.
        """
        copies, at = (t.gather(1, indices[..., None].expand(-1, -1, t.shape[2])) for t in (tokens, positions))
        return copies + self.vector, at


def copied_tokens(patches: CopiedPatches, levels: Sequence[Level], grid: Sequence[int], boxes: Tensor) -> Tensor:
    """Indices ``(B, c)`` of the coarse tokens that are copied: those nearest to the centre of the finest view.

    Args:
        patches: which patches.
        levels: downsampling factors, finest first.
        grid: patches of each view along each axis.
        boxes: of the views ``(B, L, 2, ndim)``.
    """
    counts = enumerate(copies_per_axis(patches, levels, grid), 1)
    chosen = [nearest_patches(boxes[:, 0], boxes[:, i], grid, count) + i * prod(grid) for i, count in counts]
    return torch.cat(chosen, dim=1)


def copies_per_axis(patches: CopiedPatches, levels: Sequence[Level], grid: Sequence[int]) -> list[tuple[int, ...]]:
    """Number of patches along each axis that are copied from each coarse view, the same wherever the views lie.

    A finest view as wide as ``r`` coarse patches meets at most ``ceil(r) + 1`` of them; the ring adds one on each side.

    Args:
        patches: which patches.
        levels: downsampling factors, finest first.
        grid: patches of each view along each axis.
    """
    more = {"none": 0, "under": 1, "ring": 3}[patches]
    finest, *coarse = (level_factors(level, len(grid)) for level in levels)
    return [
        tuple(min(n, ceil(n * Fraction(a) / Fraction(b)) + more) for n, a, b in zip(grid, finest, level, strict=True))
        for level in coarse
    ]
