"""Blocks of the features of a slide, level by level."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.inference.run.blocks import Compute, Setup, fill_blocks
from muvit.inference.run.context import ContextMemory, grouped, rows, ungrouped
from muvit.inference.run.plan import FeaturePlan, LevelFeatures
from muvit.inference.run.reading import SlideTiles
from muvit.inference.run.store import BlockPixels
from muvit.inference.tiling.tiles import Tile
from muvit.models.context import encode_context
from muvit.models.encoder import MuViTEncoder


class FeatureCanvas:
    """Features of one block, on the CPU.

    Args:
        features: the level.
        number: of the block in the tiling of the level.
    """

    def __init__(self, features: LevelFeatures, number: int) -> None:
        self.features = features
        self.missing = features.tiling.num_computed(number)
        self._block = features.tiling.block(number)
        size = features.shard(number).size
        self._pixels = np.zeros((features.store.num_channels, *size), features.store.dtype)

    def add(self, tile: Tile, values: NDArray[np.float32]) -> None:
        """Paint the features ``(D, *grid)`` of one tile."""
        source, target = (self._in_patches(part) for part in (tile.source, tile.target(self._block)))
        with np.errstate(over="ignore"):  # `finish` refuses overflows
            self._pixels[(slice(None), *target)] = values[(slice(None), *source)]
        self.missing -= 1

    def finish(self) -> BlockPixels:
        """The finished block.

        Raises:
            InputError: features are not finite in the type of the store.
        """
        if not np.isfinite(self._pixels).all():
            raise InputError(
                f"features in {self.features.folder} at {self._block.start}",
                expected=f"finite numbers of {self._pixels.dtype}",
                got="NaN or infinity",
                hint="Store them as float32 (--dtype float32), or check the pixels there.",
            )
        return BlockPixels(stores={self.features.folder: self._pixels})

    def _in_patches(self, part: Sequence[slice]) -> tuple[slice, ...]:
        ends = ((along.start, along.stop) for along in part)
        return tuple(slice(a // p, b // p) for (a, b), p in zip(ends, self.features.patch, strict=True))


def encode_blocks(
    encoder: MuViTEncoder,
    slide: Slide,
    plan: FeaturePlan,
    blocks: Sequence[int],
    setup: Setup,
) -> Iterator[tuple[int, BlockPixels | None]]:
    """Number and features of each block; arguments and errors as of `.label_blocks.predict_blocks`."""
    for index, level_blocks in groupby(blocks, lambda block: plan.locate(block)[0]):
        features, numbers = plan.levels[index], list(level_blocks)
        position = len(encoder.levels) - len(features.tiling.levels)
        finer = () if plan.shares_contexts else encoder.levels[:position]
        filled = fill_blocks(
            SlideTiles(slide, features.tiling, plan.preprocessing, finer=finer),
            [plan.locate(block)[1] for block in numbers],
            partial(FeatureCanvas, features),
            partial(_compute, encoder, plan, features, position),
            setup,
        )
        for block, (_, pixels) in zip(numbers, filled, strict=True):
            yield block, pixels
            del pixels  # the consumer decides how long they stay in memory


def _compute(encoder: MuViTEncoder, plan: FeaturePlan, features: LevelFeatures, position: int) -> Compute:
    """Tokens of tiles as maps ``(B, D, *grid)``.

    Args:
        encoder: on the device.
        plan: of all levels.
        features: the level.
        position: its index among the levels of the encoder.
    """
    memory = ContextMemory(encoder) if plan.shares_contexts else None

    def tokens_of(img: Tensor, bbox: Tensor, tiles: Sequence[int]) -> Tensor:
        if memory is None and position == 0:
            return encoder.encode(img, bbox, only_finest=True).tokens
        if memory is None:
            return encoder(img, bbox)[0].unflatten(1, (len(encoder.levels), -1))[:, position]
        groups, parts = grouped(features.tiling.tile(number).windows[1:] for number in tiles), []
        for coarse, of in groups.items():
            views, boxes = rows(img, of), rows(bbox, of)
            context = memory.context(views[:1, 1:], boxes[:1, 1:], coarse)
            parts.append(encode_context(encoder, views[:, :1], boxes[:, :1], context).tokens)
        return ungrouped(parts, groups.values())

    @torch.inference_mode()
    def compute(img: Tensor, bbox: Tensor, tiles: Sequence[int]) -> NDArray[Any]:
        with torch.autocast(img.device.type, torch.bfloat16, enabled=plan.precision == "bfloat16"):
            tokens = tokens_of(img, bbox, tiles)
        maps: NDArray[Any] = encoder.to_maps(tokens, img.shape[3:])[:, 0].float().cpu().numpy()
        return maps

    return compute
