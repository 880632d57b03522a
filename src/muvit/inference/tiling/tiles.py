"""Tiles of a slide: the crops of each, and the part of the output that it writes. Plain data, no pixels.

Tiles of the size of a training crop lie on a regular grid from the first pixel on; where the last ones would leave the
image they are moved back into it, as no training crop leaves a larger image. A grid of half strides instead begins half
a step before the first pixel, and ends as far beyond the last as its steps take it. Boundaries half-way through the
overlap of neighbours divide the image into cells, one for each tile. A tile writes its cell (no overlap, or blend
``center``), or all of its pixels, weighted against its neighbours (the other blends). The output is
divided into blocks, and every block lists all tiles that intersect it, so that blocks can be computed independently and
in any order.

Where a plan refines, the tiles that lie side by side are computed first, and of the tiles between them only those that
this first pass leaves uncertain (`muvit.inference.tiling.passes`).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from math import prod
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from muvit.checks import check_fields
from muvit.data.crops.placement import FreeViews, Placement, Window, check_placement, place_views
from muvit.errors import InputError
from muvit.inference.tiling.blend import Neighbor, axis_weights
from muvit.levels import Level, check_levels, level_factors

Blend = Literal["linear", "cosine", "uniform", "center"]
"""Blending of overlapping tiles: by a linear or cosine ramp, all alike, or each writes its central part only."""


class Block(NamedTuple):
    """A box of the output that is written as a whole: ``size`` pixels from ``start``, inside the image."""

    start: tuple[int, ...]
    size: tuple[int, ...]


class Tile(NamedTuple):
    """One input of the model, and the part of the output that it fills."""

    block: int
    """Number of the block that it writes to."""
    place: tuple[int, ...]
    """Its index in the grid of all tiles."""
    windows: tuple[Window, ...]
    """One crop per level, finest first: the tile and its context."""
    start: tuple[int, ...]
    """First pixel of the output that it writes."""
    size: tuple[int, ...]
    """Pixels that it writes along each axis."""

    @property
    def source(self) -> tuple[slice, ...]:
        """The part that is written, in pixels of the tile."""
        return _slices(self.start, self.size, self.windows[0].start)

    def target(self, block: Block) -> tuple[slice, ...]:
        """The part that is written, in pixels of its block."""
        return _slices(self.start, self.size, block.start)


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """Tiles of a slide, numbered block by block, and row-major inside a block.

    Only the fields are stored: tiles and blocks are derived on request, so the plan of a gigapixel slide is small.
    Tiles cover every pixel of the image once, or, where they are blended, with weights that sum to 1. A tile that
    intersects several blocks is computed for each.

    Raises:
        InputError: the sizes do not fit the slide's axes, or the levels do not ascend.
    """

    shapes: tuple[tuple[int, ...], ...]
    """Pixels of the slide at each level, (t)(z)yx."""
    levels: tuple[Level, ...]
    """Downsampling factor of each level, finest first; the first is the output's."""
    crop_size: tuple[int, ...]
    """Pixels of the crop of every level."""
    block_size: tuple[int, ...]
    """Pixels of a block of the output; the last ones end with the image."""
    overlap: tuple[int, ...] = ()
    """Pixels that neighbouring tiles share along each axis; none by default."""
    blend: Blend = "cosine"
    """Joining of the overlap."""
    half_stride: bool = False
    """Begin the grid half a step before the image."""
    placement: Placement = "nested"
    """Placement of the coarse crops, see `muvit.data.crops.placement.place_views`."""
    free_views: FreeViews | None = None
    """Offsets of placement free."""
    runs: tuple[int, ...] = ()
    """Skipped and computed tiles of the row-major grid as lengths of alternating runs, the first of skipped tiles (0 if
    the first tile is computed). By default all are computed."""
    refines: bool = False
    """Whether tiles are computed in two passes: first those side by side, then some of those between them."""

    def __post_init__(self) -> None:
        ndim = len(self.shapes[0])
        check_levels(self.levels, ndim)
        if isinstance(self.free_views, dict):  # as it comes from JSON
            object.__setattr__(self, "free_views", FreeViews(**self.free_views))
        check_fields(self)
        check_placement(self.placement, self.free_views, ndim)
        if self.free_views is not None and self.free_views.boxes != "true":
            raise InputError("boxes of free views", expected="true, as tiles are read", got=self.free_views.boxes)
        object.__setattr__(self, "overlap", self.overlap or (0,) * ndim)
        for name, size in (("crop_size", self.crop_size), ("block_size", self.block_size)):
            if len(size) != ndim or min(size) < 1:
                raise InputError(name, expected=f"{ndim} positive whole numbers, one per axis", got=size)
        if len(self.shapes) != len(self.levels):
            raise InputError("shapes", expected=f"one per level ({len(self.levels)})", got=len(self.shapes))
        fits = len(self.overlap) == ndim and all(0 <= o < n for o, n in zip(self.overlap, self.crop_size, strict=True))
        if not fits:
            raise InputError("overlap", expected=f"from 0 px to less than the crop {self.crop_size}", got=self.overlap)
        if self.runs and (sum(self.runs) != prod(self.grid) or min(self.runs) < 0):
            raise InputError("runs", expected=f"numbers of sum {prod(self.grid)}", got=sum(self.runs))
        if self.refines and not (
            self.is_blended
            and not self.half_stride
            and not any(n % s for n, s in zip(self.crop_size, self.step, strict=True))
        ):
            raise InputError(
                "refine",
                expected="tiles that blend, and an overlap that leaves a half, a third, ... of them, as 0.5 does",
                got=f"tiles of {self.crop_size} px, overlap {self.overlap} px, blend {self.blend}"
                f"{', a grid of half strides' if self.half_stride else ''}",
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Pixels of the output."""
        return self.shapes[0]

    @property
    def is_blended(self) -> bool:
        """Whether pixels may be written by several tiles."""
        return any(self.overlap) and self.blend != "center"

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return prod(self._block_grid)

    def block(self, number: int) -> Block:
        """Block with this number, row-major."""
        index = _unravel(number, self._block_grid)
        start = tuple(i * n for i, n in zip(index, self.block_size, strict=True))
        sizes = zip(start, self.block_size, self.shape, strict=True)
        return Block(start, tuple(min(n, extent - a) for a, n, extent in sizes))

    def tiles_of(self, block: int) -> range:
        """Numbers of the tiles that intersect a block, including those that are not computed."""
        return range(self._tile_offsets[block], self._tile_offsets[block + 1])

    def computed_tiles(self, block: int) -> list[int]:
        """Numbers of the tiles that are computed for a block; tiles that share coarse crops are consecutive."""
        inside = self.computed[self.places(block)]
        return self.in_order((np.flatnonzero(inside) + self._tile_offsets[block]).tolist())

    def in_order(self, numbers: list[int]) -> list[int]:
        """Numbers of tiles in the order of computation: those that share coarse crops are consecutive."""
        if self.placement == "grid":
            return sorted(numbers, key=lambda number: [w.start for w in self.tile(number).windows[:0:-1]])
        return numbers

    def num_computed(self, block: int) -> int:
        """Number of tiles that are computed for a block; where the plan refines, at most."""
        return int(self.computed[self.places(block)].sum())

    def places(self, block: int) -> tuple[slice, ...]:
        """The part of the grid of tiles that intersects a block."""
        return tuple(slice(f, f + n) for f, n in zip(*self._tile_grid(self.block(block)), strict=True))

    def writes(self, tile: Tile, block: int) -> bool:
        """Whether a tile fills a part of a block, rather than only decide about tiles that do."""
        return tile.block == block and bool(self.computed[tile.place])

    def number(self, place: tuple[int, ...], block: int) -> int:
        """Number of a tile of the grid in a block, or in that of its first pixel if it does not intersect the block."""
        first, counts = self._tile_grid(self.block(block))
        if not all(0 <= i - f < n for i, f, n in zip(place, first, counts, strict=True)):
            corner = (self.corner(axis, i) for axis, i in enumerate(place))
            block = _ravel([a // n for a, n in zip(corner, self.block_size, strict=True)], self._block_grid)
            first, counts = self._tile_grid(self.block(block))
        return self._tile_offsets[block] + _ravel([i - f for i, f in zip(place, first, strict=True)], counts)

    def __len__(self) -> int:
        return self._tile_offsets[-1]

    def __iter__(self) -> Iterator[Tile]:
        return map(self.tile, range(len(self)))

    def tile(self, number: int) -> Tile:
        """Tile with this number.

        Raises:
            IndexError: there is no such tile.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"tile {number} of {len(self)}")
        owner = bisect_right(self._tile_offsets, number) - 1
        block = self.block(owner)
        first, counts = self._tile_grid(block)
        offsets = _unravel(number - self._tile_offsets[owner], counts)
        index = tuple(f + i for f, i in zip(first, offsets, strict=True))
        written = [self.written(axis, i) for axis, i in enumerate(index)]
        start = tuple(max(low, a) for (low, _), a in zip(written, block.start, strict=True))
        edges = zip(written, block.start, block.size, start, strict=True)
        return Tile(
            block=owner,
            place=index,
            windows=self._windows(index),
            start=start,
            size=tuple(min(high, b + m) - a for (_, high), b, m, a in edges),
        )

    def _windows(self, index: Sequence[int]) -> tuple[Window, ...]:
        if self.placement == "free":  # where one axis lies depends on all of them
            corner = [self.corner(axis, i) for axis, i in enumerate(index)]
            free = self.free_views
            return place_views("free", self.shapes, self.levels, self.crop_size, start=corner, free_views=free).windows
        along = [self._starts(axis, i) for axis, i in enumerate(index)]
        starts = zip(self.levels, zip(*along, strict=True), strict=True)
        return tuple(Window(level, start, self.crop_size) for level, start in starts)

    def _starts(self, axis: int, index: int) -> tuple[int, ...]:
        """First pixel of each level's crop along one axis; remembered, as a whole row of tiles shares it."""
        found = self._known_starts.get((axis, index))
        if found is None:
            ndim = len(self.crop_size)
            levels = [level_factors(level, ndim)[axis] for level in self.levels]
            shapes, start = [(shape[axis],) for shape in self.shapes], (self.corner(axis, index),)
            placed = place_views(self.placement, shapes, levels, (self.crop_size[axis],), start=start)
            found = self._known_starts[axis, index] = tuple(window.start[0] for window in placed.windows)
        return found

    @cached_property
    def _known_starts(self) -> dict[tuple[int, int], tuple[int, ...]]:
        return {}

    # -- the grid of tiles along one axis ------------------------------------------------------------------------------

    @property
    def step(self) -> tuple[int, ...]:
        """Pixels from one tile to the next along each axis."""
        return tuple(n - o for n, o in zip(self.crop_size, self.overlap, strict=True))

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Number of tiles along each axis."""
        # the last tile ends the image, or, of a grid that is not moved back, its cell does
        beyond = [self._lead(axis) + o // 2 if self.half_stride else 0 for axis, o in enumerate(self.overlap)]
        sizes = zip(self.shape, beyond, self.crop_size, self.step, strict=True)
        return tuple(1 + max(0, -(-(extent + more - n) // s)) for extent, more, n, s in sizes)

    def _lead(self, axis: int) -> int:
        """Pixels before the image at which the grid begins."""
        return self.step[axis] // 2 if self.half_stride else 0

    def corner(self, axis: int, index: int) -> int:
        """First pixel of a tile."""
        n = self.crop_size[axis]
        start = index * (n - self.overlap[axis])
        return start - self._lead(axis) if self.half_stride else min(start, max(0, self.shape[axis] - n))

    def cell(self, axis: int, index: int) -> tuple[int, int]:
        """First pixel of a tile's cell, and the one after its last."""
        n, o = self.crop_size[axis], self.overlap[axis]
        start = index * (n - o) - self._lead(axis)
        low = start + o - o // 2 if index else 0
        return low, self.shape[axis] if index == self.grid[axis] - 1 else start + n - o // 2

    def written(self, axis: int, index: int) -> tuple[int, int]:
        """First pixel that a tile writes, and the one after its last."""
        if not self.is_blended:
            return self.cell(axis, index)
        corner = self.corner(axis, index)
        return max(corner, 0), min(corner + self.crop_size[axis], self.shape[axis])

    def weights(self, tile: Tile) -> tuple[NDArray[np.float64], ...]:
        """Along each axis, the weights of the pixels that a tile writes; their product is the weight of a pixel."""
        along = (self.weights_along(axis, i) for axis, i in enumerate(tile.place))
        return tuple(weights[part] for weights, part in zip(along, tile.source, strict=True))

    @cached_property
    def computed(self) -> NDArray[np.bool_]:
        """Whether each tile of the grid is computed, ``(*grid)``."""
        runs = self.runs or (0, prod(self.grid))
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(self.grid)

    def weights_along(self, axis: int, index: int) -> NDArray[np.float64]:
        """Weights of all pixels of a tile along one axis."""
        n, o = self.crop_size[axis], self.overlap[axis]
        corner = self.corner(axis, index)
        if o == 0:  # along this axis
            pixel, (low, high) = corner + np.arange(n), self.cell(axis, index)
            return ((pixel >= low) & (pixel < high)).astype(np.float64)
        reach = n // (n - o) + 2
        others = range(max(0, index - reach), min(self.grid[axis], index + reach + 1))
        last = self.grid[axis] - 1
        tiles = (Neighbor(self.corner(axis, i) - corner, is_first=i == 0, is_last=i == last) for i in others)
        return axis_weights(n, o, tuple(tile for tile in tiles if abs(tile.offset) < n), self.blend)

    @property
    def _block_grid(self) -> tuple[int, ...]:
        return tuple(-(-extent // n) for extent, n in zip(self.shape, self.block_size, strict=True))

    @cached_property
    def _tile_offsets(self) -> tuple[int, ...]:
        # number of the first tile of each block, and the number of all tiles
        along = [
            [
                last - first + 1
                for first, last in (self._intersecting(axis, a, n) for a in range(0, self.shape[axis], n))
            ]
            for axis, n in enumerate(self.block_size)
        ]
        return tuple(accumulate(map(prod, product(*along)), initial=0))

    def _tile_grid(self, block: Block) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Per axis, the index of the first tile that intersects a block, and the number of such tiles."""
        ranges = [self._intersecting(axis, a, n) for axis, (a, n) in enumerate(zip(*block, strict=True))]
        return tuple(first for first, _ in ranges), tuple(last - first + 1 for first, last in ranges)

    def _intersecting(self, axis: int, start: int, size: int) -> tuple[int, int]:
        """First and last tile that write to some pixels; the last pixel may lie beyond the image."""
        n, o, count = self.crop_size[axis], self.overlap[axis], self.grid[axis]
        stop, step, lead = min(start + size, self.shape[axis]), n - o, self._lead(axis)
        if not self.is_blended:
            margin = o - o // 2 - lead
            return tuple(min(max((pixel - margin) // step, 0), count - 1) for pixel in (start, stop - 1))  # type: ignore[return-value]
        first = min(max((start + lead - n) // step + 1, 0), count - 1)
        reaches_last = self.corner(axis, count - 1) < stop
        return first, count - 1 if reaches_last else (stop + lead - 1) // step


def mask_runs(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    """A mask of tiles as `TilePlan.runs`."""
    flat = np.concatenate([[False], mask.ravel()])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return tuple(int(n) for n in np.diff([0, *edges, mask.size]))


def _unravel(number: int, grid: Sequence[int]) -> tuple[int, ...]:
    index = []
    for n in reversed(grid):
        number, i = divmod(number, n)
        index.append(i)
    return tuple(reversed(index))


def _ravel(index: Sequence[int], grid: Sequence[int]) -> int:
    number = 0
    for i, n in zip(index, grid, strict=True):
        number = number * n + i
    return number


def _slices(start: Sequence[int], size: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, a - o + n) for a, n, o in zip(start, size, origin, strict=True))
