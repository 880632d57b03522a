"""Two passes over the tiles of a plan that refines: first those side by side, then some of those between them.

Where the overlap leaves a half (a third, ...) of a tile, every second (third, ...) tile along each axis belongs to the
grid without overlap. So the first pass computes tiles of the plan, and nothing twice.
"""

from dataclasses import replace
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from muvit.inference.tiling.tiles import TilePlan


class Passes:
    """The tiles of both passes.

    Args:
        tiling: a plan; if it does not refine, all tiles belong to the first pass.
    """

    def __init__(self, tiling: TilePlan) -> None:
        self.tiling = tiling

    @cached_property
    def side_by_side(self) -> TilePlan:
        """The plan without overlap, whose tiles are those of the first pass."""
        return replace(self.tiling, overlap=(0,) * len(self.tiling.shape), runs=(), refines=False)

    def is_first(self, place: tuple[int, ...]) -> bool:
        """Whether a tile of the grid belongs to the first pass."""
        return all(index in along for index, along in zip(place, self._first, strict=True))

    def is_between(self, block: int) -> NDArray[np.bool_]:
        """Whether each of `TilePlan.places` of a block is a tile of which the first pass decides."""
        parts = self.tiling.places(block)
        first = [
            [i in along for i in range(part.start, part.stop)] for part, along in zip(parts, self._first, strict=True)
        ]
        is_between = self.tiling.computed[parts].copy()
        is_between[np.ix_(*first)] = False
        return is_between

    def first_tiles(self, block: int) -> list[int]:
        """Numbers of the tiles of the first pass.

        Those that share pixels with a tile between them decide about it, also where they do not write to the block
        (`TilePlan.writes`) or, outside the tissue or region, to the output at all: so the decision is the same in every
        block and region.
        """
        tiling, along = self.tiling, []
        if not tiling.refines:
            return tiling.computed_tiles(block)
        needed = self.is_between(block).astype(int)
        for axis, part in enumerate(tiling.places(block)):
            corners = np.array([tiling.corner(axis, i) for i in range(part.start, part.stop)])
            shared = {i: abs(corners - tiling.corner(axis, i)) < tiling.crop_size[axis] for i in self._first[axis]}
            along.append([i for i, tiles in shared.items() if tiles.any()])
            # from the tiles of the block to those of the first pass, the first axis each time, which becomes the last
            needed = np.tensordot(needed, [shared[i] for i in along[-1]], axes=([0], [1]))
        numbers = [tiling.number(place, block) for place in product(*along)]
        of_first = zip(numbers, needed.ravel(), strict=True)
        return tiling.in_order([n for n, is_needed in of_first if is_needed or tiling.writes(tiling.tile(n), block)])

    @cached_property
    def _first(self) -> list[list[int]]:
        """Index of the tiles of the first pass along each axis."""
        sizes = zip(self.tiling.grid, self.tiling.crop_size, self.tiling.step, strict=True)
        return [sorted({min(i, count - 1) for i in range(0, count + n // s - 1, n // s)}) for count, n, s in sizes]
