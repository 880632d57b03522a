"""The tiles of a slide as a model sees them, read ahead of it."""

import math
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from muvit.data.crops import read_views
from muvit.data.preprocessing import Preprocessing
from muvit.data.sampling import Window, start_range
from muvit.data.slides import Slide
from muvit.errors import MuViTError
from muvit.geometry import Level, level_factors
from muvit.inference.tiling import TilePlan

# a tile, or why it could not be read: torch rewraps what a worker process raises, and the message would drown in traces
TileViews = dict[str, Any] | MuViTError


class SlideTiles(Dataset[TileViews]):
    """The tiles of one slide, numbered as in their plan.

    An item is ``{"tile": number, "img": (L, C, *space), "bbox": (L, 2, ndim)}``, or the error that reading met. The
    last crop of each level is remembered: where tiles share coarse crops, the next one most often has the same.

    Args:
        slide: the image.
        tiling: where the tiles are.
        preprocessing: how pixels become numbers.
        finer: levels finer than the tiles', which are shown as well, with the centre of the tile.
    """

    def __init__(
        self, slide: Slide, tiling: TilePlan, preprocessing: Preprocessing, *, finer: Sequence[Level] = ()
    ) -> None:
        self.slide, self.tiling, self.finer = slide, tiling, tuple(finer)
        levels = (*self.finer, *tiling.levels)
        self._is_by_view = preprocessing.normalizes_by_view
        self._all_views = preprocessing.crops(levels)
        self._views = [preprocessing.crops([level]) for level in levels]
        self._last: list[tuple[Window, dict[str, Tensor]] | None] = [None] * len(levels)

    def __len__(self) -> int:
        return len(self.tiling)

    def __getitem__(self, number: int) -> TileViews:
        windows = self.tiling.tile(number).windows
        inside = [_in_the_middle(windows[0], level, self.slide.level_shape(level)) for level in self.finer]
        try:
            return {"tile": number, **self._read((*inside, *windows))}
        except MuViTError as error:
            return error

    def check(self) -> None:
        """Read the first tile, which shows whether pixels can be read and normalised at all.

        Raises:
            MuViTError: they cannot.
        """
        first = self[0]
        if isinstance(first, MuViTError):
            raise first

    def _read(self, windows: Sequence[Window]) -> dict[str, Tensor]:
        if not self._is_by_view:
            return read_views(self.slide, windows, self._all_views)
        views = [self._read_view(index, window) for index, window in enumerate(windows)]
        return {name: torch.cat([view[name] for view in views]) for name in ("img", "bbox")}

    def _read_view(self, index: int, window: Window) -> dict[str, Tensor]:
        last = self._last[index]
        if last is None or last[0] != window:
            last = self._last[index] = (window, read_views(self.slide, [window], self._views[index]))
        return last[1]


def read_tiles(
    tiles: SlideTiles, batches: Iterable[list[int]], *, device: torch.device, num_workers: int
) -> Iterator[dict[str, Any]]:
    """Batches of tiles: ``tile`` ``(B)``, ``img`` ``(B, L, C, *space)``, ``bbox`` ``(B, L, 2, ndim)``.

    Args:
        tiles: of one slide.
        batches: the numbers of the tiles of each batch.
        device: where they are going to be used.
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
        # a forked process would share CUDA and the store's threads, which neither of them survives
        multiprocessing_context=multiprocessing.get_context("spawn") if num_workers else None,
    )
    for batch in loader:
        if isinstance(batch, MuViTError):
            raise batch
        yield batch


def _collate(items: list[TileViews]) -> Any:
    errors = [item for item in items if isinstance(item, MuViTError)]
    return errors[0] if errors else default_collate(items)


def _in_the_middle(window: Window, level: Level, shape: Sequence[int]) -> Window:
    """The crop of a finer level with the same centre, but inside the image."""
    start = []
    factors = zip(level_factors(window.level, len(shape)), level_factors(level, len(shape)), strict=True)
    for axis, (coarse, fine) in enumerate(factors):
        n = window.size[axis]
        low, high = start_range(n, shape[axis])
        start.append(min(max(math.floor((window.start[axis] + n / 2) * coarse / fine - n / 2 + 0.5), low), high))
    return Window(level, tuple(start), window.size)
