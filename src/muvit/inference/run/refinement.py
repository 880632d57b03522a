"""Refinement: which tiles between those of a first pass are worth computing.

Tiles side by side label every pixel once. A tile between them counts most where they are at their edges, and changes
labels only where they are undecided. It is computed where the entropy of their probabilities is high on average, each
pixel with the weight that the tile has there among all tiles of the plan::

    sum_x w(x) H(x) / sum_x w(x) > refine,    H(x) = - sum_c p_c(x) log p_c(x) / log K

The decision depends on the tiles of the first pass around the tile alone. So it is the same in every block that the
tile intersects.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from muvit.inference.run.plan import LabelPlan
from muvit.inference.tiling.passes import Passes
from muvit.inference.tiling.tiles import Tile


@dataclass(frozen=True, kw_only=True)
class TileCounts:
    """Tiles that a prediction has computed, and that it would have computed without refinement, summed over blocks."""

    computed: int = 0
    """Tiles that were computed; those of the first pass that were only needed to decide about others included."""
    planned: int = 0
    """Tiles of the blocks that are done."""

    def __str__(self) -> str:
        """The counts in a sentence."""
        return f"{self.computed} of {self.planned} tiles were computed, as labels are certain where the others lie"

    def to_json(self) -> dict[str, int]:
        """As a JSON object."""
        return {"computed": self.computed, "planned": self.planned}


def add_counts(counts: Iterable[tuple[int, int]]) -> TileCounts:
    """Sum over blocks of the numbers of computed and planned tiles."""
    computed, planned = np.array([(0, 0), *counts]).sum(0).tolist()
    return TileCounts(computed=computed, planned=planned)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy ``(*size)`` of probabilities ``(K, *size)``, from 0 (certain) to 1 (all classes equally likely)."""
    return (torch.special.entr(probabilities).sum(dim=0) / math.log(max(len(probabilities), 2))).clamp(0, 1)


class Refinement:
    """Mean entropy of the first pass over each tile of a block.

    Args:
        plan: one that refines.
        block: number of the block.
        device: of the probabilities.
    """

    def __init__(self, plan: LabelPlan, block: int, device: torch.device) -> None:
        assert plan.options.refine is not None
        self.tiling, self.threshold, self.block = plan.tiling, plan.options.refine, block
        self.passes = Passes(plan.tiling)
        counts = [part.stop - part.start for part in self.tiling.places(block)]
        self._sums, self._weights = torch.zeros(2, *counts, device=device).unbind()
        self._along: dict[tuple[int, int], tuple[slice, Tensor]] = {}

    def add(self, tile: Tile, probabilities: Tensor) -> None:
        """Add the probabilities ``(K, *crop_size)`` of one tile; those of the second pass are ignored."""
        if not self.passes.is_first(tile.place):
            return
        parts, weights = zip(*(self._overlapping(axis, i) for axis, i in enumerate(tile.place)), strict=True)
        total, ones = entropy(probabilities), torch.ones((), device=probabilities.device)
        for along in weights:  # from pixels to tiles, the first axis each time, which becomes the last
            total = torch.tensordot(total, along, dims=([0], [1]))
            ones = ones[..., None] * along.sum(dim=1)
        self._sums[parts] += total
        self._weights[parts] += ones

    def choose(self) -> list[int]:
        """Numbers of the tiles of the second pass."""
        wanted = (self._sums > self.threshold * self._weights).cpu().numpy() & self.passes.is_between(self.block)
        places = np.argwhere(wanted) + [part.start for part in self.tiling.places(self.block)]
        return self.tiling.in_order([self.tiling.number(tuple(place), self.block) for place in places.tolist()])

    def _overlapping(self, axis: int, index: int) -> tuple[slice, Tensor]:
        """Tiles of the block that share pixels with a tile along an axis; their weights there, ``(tiles, pixels)``."""
        if (axis, index) not in self._along:
            tiling, n = self.tiling, self.tiling.crop_size[axis]
            corner, places = tiling.corner(axis, index), tiling.places(self.block)[axis]
            shifts = {i: corner - tiling.corner(axis, i) for i in range(places.start, places.stop)}
            shifts = {i: shift for i, shift in shifts.items() if abs(shift) < n}
            weights = np.zeros((len(shifts), n), np.float32)
            inside = max(0, min(n, tiling.shape[axis] - corner))
            for row, (i, shift) in zip(weights, shifts.items(), strict=True):
                low, high = max(0, -shift), min(inside, n - shift)
                row[low:high] = tiling.weights_along(axis, i)[low + shift : high + shift]
            part = slice(min(shifts) - places.start, max(shifts) + 1 - places.start)
            self._along[axis, index] = part, torch.from_numpy(weights).to(self._sums.device)
        return self._along[axis, index]
