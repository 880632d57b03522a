"""The plan of a whole-slide prediction: which crops to look at, and what each of them writes. Plain data, no pixels.

A grid of cells of the training crop's size, from the first pixel on and without overlap, covers the finest level.
 The tile of a cell is the crop there; where the last cells stick out of the image, their crops move
back into it, as in training no crop leaves a larger image, and write only what lies in their cell. The output is cut
into blocks, and every block lists all tiles that meet it, so it can be made by itself, by anybody, in any order.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from muvit.data.sampling import Window, centered_nested
from muvit.errors import InputError
from muvit.geometry import Level, check_levels


class Block(NamedTuple):
    """A box of the output that is written at once: ``size`` pixels from ``start``, inside the image."""

    start: tuple[int, ...]
    size: tuple[int, ...]


class Tile(NamedTuple):
    """One forward pass of the model: the crops it sees and the part of the output that it fills."""

    block: int
    """Number of the block that it writes to."""
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

    Nothing but the fields is stored: tiles and blocks are worked out when asked for, so the plan of a gigapixel slide
    is as small as any. Tiles write disjoint parts that together are the image. Where the crop does not divide the
    block, a tile on the seam belongs to both blocks and is computed for each.

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

    def __post_init__(self) -> None:
        ndim = len(self.shapes[0])
        check_levels(self.levels, ndim)
        for name, size in (("crop_size", self.crop_size), ("block_size", self.block_size)):
            if len(size) != ndim or min(size) < 1:
                raise InputError(name, expected=f"{ndim} positive whole numbers, one per axis", got=size)
        if len(self.shapes) != len(self.levels):
            raise InputError("shapes", expected=f"one per level ({len(self.levels)})", got=len(self.shapes))

    @property
    def shape(self) -> tuple[int, ...]:
        """Pixels of the output."""
        return self.shapes[0]

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
        """Numbers of the tiles that fill a block."""
        return range(self._tile_offsets[block], self._tile_offsets[block + 1])

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
        index = _unravel(number - self._tile_offsets[owner], counts)
        cell = [(f + i) * n for f, i, n in zip(first, index, self.crop_size, strict=True)]
        corner = [min(c, max(0, e - n)) for c, e, n in zip(cell, self.shape, self.crop_size, strict=True)]
        start = tuple(max(c, a) for c, a in zip(cell, block.start, strict=True))
        edges = zip(cell, self.crop_size, block.start, block.size, start, strict=True)
        return Tile(
            block=owner,
            windows=centered_nested(corner, self.shapes, self.levels, self.crop_size),
            start=start,
            size=tuple(min(c + n, b + m) - a for c, n, b, m, a in edges),
        )

    @property
    def _block_grid(self) -> tuple[int, ...]:
        return tuple(-(-extent // n) for extent, n in zip(self.shape, self.block_size, strict=True))

    @cached_property
    def _tile_offsets(self) -> tuple[int, ...]:
        # number of the first tile of each block, and the number of all tiles
        counts = (prod(self._tile_grid(self.block(i))[1]) for i in range(self.num_blocks))
        return tuple(accumulate(counts, initial=0))

    def _tile_grid(self, block: Block) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Per axis, the index of the first tile that meets a block, and how many do."""
        first = tuple(a // n for a, n in zip(block.start, self.crop_size, strict=True))
        edges = zip(block.start, block.size, self.crop_size, first, strict=True)
        return first, tuple(-(-(a + m) // n) - f for a, m, n, f in edges)


def assemble(
    plan: TilePlan, predictions: Iterable[tuple[int, NDArray[Any]]], dtype: DTypeLike
) -> Iterator[tuple[Block, NDArray[Any]]]:
    """Put predicted tiles together; yields each block as soon as its last tile has come.

    Tiles may come in any order. In the plan's order only one block is held at a time.

    Args:
        plan: the plan that the tiles belong to.
        predictions: number of a tile and its values ``(*crop_size)``, each tile once.
        dtype: of the blocks.
    """
    unfinished: dict[int, NDArray[Any]] = {}
    missing: dict[int, int] = {}
    for number, values in predictions:
        tile = plan.tile(number)
        block = plan.block(tile.block)
        if tile.block not in unfinished:
            unfinished[tile.block] = np.zeros(block.size, dtype)
            missing[tile.block] = len(plan.tiles_of(tile.block))
        unfinished[tile.block][tile.target(block)] = values[tile.source]
        missing[tile.block] -= 1
        if missing[tile.block] == 0:
            yield block, unfinished.pop(tile.block)


def _unravel(number: int, grid: Sequence[int]) -> tuple[int, ...]:
    index = []
    for n in reversed(grid):
        number, i = divmod(number, n)
        index.append(i)
    return tuple(reversed(index))


def _slices(start: Sequence[int], size: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, a - o + n) for a, n, o in zip(start, size, origin, strict=True))
