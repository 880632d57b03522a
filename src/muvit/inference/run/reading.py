"""Tiles of a slide as inputs of a model, read ahead."""

import math
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from muvit.data.crops.placement import Window, start_range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.crops.slide_crops import read_views
from muvit.data.slides.slide import Slide
from muvit.errors import MuViTError
from muvit.inference.tiling.tiles import TilePlan
from muvit.levels import Level, level_factors

# a tile, or the error of its reading: torch would wrap an exception of a worker process in traces
TileViews = dict[str, Any] | MuViTError


class SlideTiles(Dataset[TileViews]):
    """The tiles of one slide, numbered as in their plan.

    An item is ``{"tile": number, "img": (L, C, *space), "bbox": (L, 2, ndim)}``, or the error of its reading. Where
    tiles share coarse crops, those of the last tile are kept, as the next one usually has the same.

    Args:
        slide: the image.
        tiling: boxes of the tiles.
        preprocessing: padding and normalisation.
        finer: levels finer than those of the tiles, of which a crop with the same centre is added.
    """

    def __init__(
        self, slide: Slide, tiling: TilePlan, preprocessing: Preprocessing, *, finer: Sequence[Level] = ()
    ) -> None:
        self.slide, self.tiling, self.finer = slide, tiling, tuple(finer)
        levels = (*self.finer, *tiling.levels)
        self._finest = [preprocessing.crops(levels[:count]) for count in range(1, 1 + len(levels))]
        self._remembers = tiling.placement == "grid" and preprocessing.normalizes_by_view
        self._last: tuple[tuple[Window, ...], dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.tiling)

    def __getitem__(self, number: int) -> TileViews:
        windows = self.tiling.tile(number).windows
        inside = [_centred(windows[0], level, self.slide.level_shape(level)) for level in self.finer]
        try:
            return {"tile": number, **self._read((*inside, *windows))}
        except MuViTError as error:
            return error

    def check(self) -> None:
        """Check that pixels can be read and normalised, on the first tile.

        Raises:
            MuViTError: they cannot.
        """
        first = self[0]
        if isinstance(first, MuViTError):
            raise first

    def _read(self, windows: tuple[Window, ...]) -> dict[str, Tensor]:
        if not self._remembers:
            return read_views(self.slide, windows, self._finest[-1])
        if self._last is None:
            views = read_views(self.slide, windows, self._finest[-1])
        else:
            before, views = self._last
            # equal crops of one level lie in equal crops of all coarser ones
            new = sum(window != other for window, other in zip(windows, before, strict=True))
            if new:
                for name, values in read_views(self.slide, windows[:new], self._finest[new - 1]).items():
                    views[name][:new] = values
        self._last = windows, views
        return {name: values.clone() for name, values in views.items()}


def read_tiles(
    tiles: SlideTiles, batches: Iterable[list[int]], *, device: torch.device, num_workers: int
) -> Iterator[dict[str, Any]]:
    """Batches of tiles: ``tile`` ``(B)``, ``img`` ``(B, L, C, *space)``, ``bbox`` ``(B, L, 2, ndim)``.

    Args:
        tiles: of one slide.
        batches: the numbers of the tiles of each batch; empty batches are left out.
        device: where they are used.
        num_workers: processes that read ahead.

    Raises:
        MuViTError: pixels could not be read.
    """
    loader = DataLoader(
        tiles,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        # CUDA and the threads of the store do not work in forked processes
        multiprocessing_context=multiprocessing.get_context("spawn") if num_workers else None,
    )
    for batch in loader:
        if isinstance(batch, MuViTError):
            raise batch
        if batch is not None:
            yield batch


def _collate(items: list[TileViews]) -> Any:
    errors = [item for item in items if isinstance(item, MuViTError)]
    if errors or not items:
        return errors[0] if errors else None
    return default_collate(items)


def _centred(window: Window, level: Level, shape: Sequence[int]) -> Window:
    """The crop of a finer level with the same centre, but inside the image."""
    start = []
    factors = zip(level_factors(window.level, len(shape)), level_factors(level, len(shape)), strict=True)
    for axis, (coarse, fine) in enumerate(factors):
        n = window.size[axis]
        low, high = start_range(n, shape[axis])
        start.append(min(max(math.floor((window.start[axis] + n / 2) * coarse / fine - n / 2 + 0.5), low), high))
    return Window(level, tuple(start), window.size)
