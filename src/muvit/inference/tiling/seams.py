"""Visibility of tiles in the labels: frequency of label changes across the seams of tiles, relative to inside them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muvit.inference.tiling.tiles import Block, TilePlan

VISIBLE_RATIO = 1.5
"""`Seams.ratio` from which on users are advised to let tiles overlap more."""


@dataclass(frozen=True, kw_only=True)
class Seams:
    """Pairs of neighbouring pixels with different labels across the boundaries of cells, and along their middle lines.

    If tiles fit together, labels change across a seam as often as elsewhere, and `ratio` is 1. Pairs across the edges
    of blocks are not counted.
    """

    across: int = 0
    """Pairs across seams whose labels differ."""
    across_pairs: int = 0
    """Pairs across seams."""
    inside: int = 0
    """Pairs along the middle lines of cells whose labels differ."""
    inside_pairs: int = 0
    """Pairs along the middle lines of cells."""

    @property
    def ratio(self) -> float | None:
        """Frequency of label changes across seams relative to inside; None without pairs to compare."""
        if not (self.across_pairs and self.inside):
            return None
        return (self.across / self.across_pairs) / (self.inside / self.inside_pairs)

    def __str__(self) -> str:
        """The ratio in a sentence, with advice where seams are visible; empty without pairs to compare."""
        if self.ratio is None:
            return ""
        told = f"labels change {self.ratio:.2f} times as often across the seams of tiles as inside tiles"
        return told if self.ratio < VISIBLE_RATIO else f"{told}; a larger --overlap makes them smoother"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "across": self.across,
            "across_pairs": self.across_pairs,
            "inside": self.inside,
            "inside_pairs": self.inside_pairs,
            "ratio": self.ratio,
        }


def count_seams(plan: TilePlan, block: Block, labels: NDArray[Any], seen: NDArray[np.bool_]) -> list[int]:
    """The four counts of `Seams` for one block.

    Args:
        plan: the plan that the block belongs to.
        block: its box.
        labels: ``(*size)``.
        seen: pixels that were computed, ``(*size)``; others are ignored.
    """
    counts = np.zeros(4, np.int64)
    for axis, (start, size) in enumerate(zip(*block, strict=True)):
        cells = [plan.cell(axis, i) for i in range(plan.grid[axis])]
        seams = [high for _, high in cells[:-1]]
        middles = [(low + high) // 2 for low, high in cells]
        for kind, places in enumerate((seams, middles)):
            inside = np.array([place - start for place in places if start < place < start + size], dtype=int)
            before, after = (labels.take(inside - shift, axis) for shift in (1, 0))
            both = seen.take(inside - 1, axis) & seen.take(inside, axis)
            counts[2 * kind : 2 * kind + 2] += (int(((before != after) & both).sum()), int(both.sum()))
    return [int(n) for n in counts]


def add_seams(counts: Iterable[Sequence[int]]) -> Seams:
    """The seams of a whole image from the counts of its blocks."""
    total = np.array([(0, 0, 0, 0), *counts]).sum(0).tolist()
    return Seams(across=total[0], across_pairs=total[1], inside=total[2], inside_pairs=total[3])
