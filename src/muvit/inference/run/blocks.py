"""Blocks from tiles: reading ahead, the model, and joining; a block never depends on another. Jobs, made of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from muvit.data.slides.slide import Slide
from muvit.inference.run.reading import SlideTiles, read_tiles
from muvit.inference.run.store import BlockPixels, BlockStore
from muvit.inference.tiling.passes import Passes
from muvit.inference.tiling.tiles import Tile
from muvit.models.folder import FolderModel

CountTiles = Callable[[int], None]
"""Called with the number of tiles just done."""

Compute = Callable[[Tensor, Tensor, Sequence[int]], Iterable[Any]]
"""From images ``(B, L, C, *space)``, boxes ``(B, L, 2, ndim)`` and numbers of tiles to the values of each tile."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Device, batches and processes of the computation of blocks."""

    device: torch.device
    """Device of the computation."""
    batch_size: int
    """Tiles per forward pass."""
    num_workers: int
    """Processes that read ahead."""
    count: CountTiles
    """Called with the number of tiles of each batch."""


class BlockMaker(Protocol):
    """Computation of blocks, each of which depends on nothing that was computed before it; picklable."""

    def __call__(
        self,
        model: Any,
        slide: Slide,
        plan: Any,
        blocks: Sequence[int],
        setup: Setup,
        /,
    ) -> Iterator[tuple[int, BlockPixels | None]]:
        """Number and pixels of each block, None where none of its tiles is computed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model, a slide, and the output that is made of them."""

    store: BlockStore[Any]
    """The output, with its plan."""
    model: FolderModel
    """In any state; a run leaves it as it was."""
    slide: Slide
    """The image, with all levels of the model."""
    make_blocks: BlockMaker
    """Computes blocks of the plan."""


class Canvas(Protocol):
    """Pixels of a block while its tiles are computed."""

    def add(self, tile: Tile, values: Any) -> None:
        """Paint the values of one tile."""

    def choose_tiles(self) -> list[int]:
        """Numbers of the tiles of the second pass, those of the first having been added."""
        ...

    def finish(self) -> BlockPixels:
        """The finished block."""
        ...


def fill_blocks(
    tiles: SlideTiles,
    blocks: Sequence[int],
    new_canvas: Callable[[int], Canvas],
    new_compute: Callable[[], Compute],
    setup: Setup,
) -> Iterator[tuple[int, BlockPixels | None]]:
    """Number and pixels of each block of a tiling, None where none of its tiles is computed.

    No batch holds tiles of two blocks, and each block has its own `Compute`, so that nothing is remembered from one
    block to the next: a block is the same, to the bit, whichever blocks were computed before it.

    Args:
        tiles: of a slide.
        blocks: numbers of blocks of the tiling.
        new_canvas: canvas of the block with this number.
        new_compute: computation for the tiles of one block.
        setup: device, batches and processes.

    Raises:
        MuViTError: pixels could not be read, or results are not finite.
    """
    tiling, passes, chosen = tiles.tiling, Passes(tiles.tiling), dict[int, list[int]]()
    numbers = _batches(passes, blocks, setup.batch_size, chosen)
    batches = read_tiles(tiles, numbers, device=setup.device, num_workers=setup.num_workers)

    def paint(canvas: Canvas, compute: Compute, block: int, missing: int) -> None:
        while missing:
            batch = next(batches)
            img, bbox = (batch[name].to(setup.device, non_blocking=True) for name in ("img", "bbox"))
            batched = batch["tile"].tolist()
            added = [tiling.tile(number) for number in batched]
            for tile, values in zip(added, compute(img, bbox, batched), strict=True):
                canvas.add(tile, values)
            missing -= len(batched)
            setup.count(sum(tiling.writes(tile, block) for tile in added))

    for number in blocks:
        if not tiling.num_computed(number):
            yield number, None
            continue
        canvas, compute = new_canvas(number), new_compute()
        paint(canvas, compute, number, len(passes.first_tiles(number)))
        if tiling.refines:
            further = chosen[number] = canvas.choose_tiles()
            setup.count(int(passes.is_between(number).sum()) - len(further))  # the others are done with
            paint(canvas, compute, number, len(further))
        pixels = canvas.finish()
        del canvas  # the consumer of the pixels decides how long they stay in memory
        yield number, pixels
        del pixels


@contextmanager
def ready(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Put a model on a device and into evaluation mode; restore both afterwards."""
    modes = {module: module.training for module in model.modules()}
    home = next(model.parameters()).device
    try:
        model.to(device).eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        model.to(home)


def _batches(
    passes: Passes, blocks: Sequence[int], batch_size: int, chosen: dict[int, list[int]]
) -> Iterator[list[int]]:
    """Numbers of tiles, batch by batch, block by block.

    Those of a second pass are taken from ``chosen``. As batches are asked for ahead of time, they are empty until the
    block is there.
    """

    def split(tiles: list[int]) -> Iterator[list[int]]:
        return (tiles[first : first + batch_size] for first in range(0, len(tiles), batch_size))

    for block in filter(passes.tiling.num_computed, blocks):
        yield from split(passes.first_tiles(block))
        if passes.tiling.refines:
            while block not in chosen:
                yield []
            yield from split(chosen.pop(block))
