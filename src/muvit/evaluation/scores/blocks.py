"""Label slides in blocks that fit in memory."""

from collections.abc import Iterator
from itertools import product

BLOCK_PIXELS = 1 << 22
"""Pixels of a block at most."""


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Start and size of cubes that cover an image; sides are powers of two, as chunks of pyramids mostly are."""
    side = 1 << ((BLOCK_PIXELS.bit_length() - 1) // len(shape))
    for start in product(*(range(0, extent, side) for extent in shape)):
        yield start, tuple(min(side, extent - a) for a, extent in zip(start, shape, strict=True))


def count_blocks(shape: tuple[int, ...]) -> int:
    """Number of blocks that `blocks` gives."""
    return sum(1 for _ in blocks(shape))
