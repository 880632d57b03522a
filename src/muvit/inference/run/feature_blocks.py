"""Blocks of features: their computation, and the shards that they fill."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from io import TextIOWrapper
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muvit.data.pyramids.manifest import ShardDigest
from muvit.data.pyramids.ngff import write_json
from muvit.data.pyramids.spec import PyramidSpec
from muvit.data.pyramids.writer import Shard
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.data.slides.slide import Slide
from muvit.durable import sync_folder, whole_file
from muvit.errors import InputError, ReadError
from muvit.inference.run.blocks import Compute, Setup, fill_blocks
from muvit.inference.run.context import ContextMemory, grouped, rows, ungrouped
from muvit.inference.run.plan import FeaturePlan, LevelFeatures
from muvit.inference.run.reading import SlideTiles
from muvit.inference.run.resume import read_summary
from muvit.inference.run.store import ANEW, BlockPixels, BlockStore
from muvit.inference.tiling.tiles import Tile
from muvit.levels import level_factors, level_name
from muvit.models.context import encode_context
from muvit.models.encoder import MuViTEncoder

POOLED = "pooled.csv"


class FeatureStore(BlockStore[FeaturePlan]):
    """The stores of the features of a slide; ``path`` is the folder of all."""

    plan_type = FeaturePlan

    def _specs(self) -> dict[str, tuple[Path, PyramidSpec]]:
        return {features.folder: (self.path / features.folder, features.store) for features in self.plan.levels}

    def _shards(self, block: int) -> dict[str, Shard]:
        index, number = self.plan.locate(block)
        features = self.plan.levels[index]
        return {features.folder: features.shard(number)}

    def _publish(self, done: Mapping[str, Any]) -> None:
        for features in self.plan.levels:
            level, patch = features.tiling.levels[0], features.patch
            step = [factor * p for factor, p in zip(level_factors(level, len(patch)), patch, strict=True)]
            position = {"level": level, "world_origin": [0] * len(step), "world_step": step}
            self.writers[features.folder].publish({"muvit": position})
        self._write_pooled()
        stores, table = [features.folder for features in self.plan.levels], ShardDigest.on_disk(self.path / POOLED)
        summary = {"features": stores, "pooled": POOLED, "pooled_digest": list(table), "plan": self.plan.to_json()}
        attributes = {"muvit": summary}
        write_json(self.path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})
        sync_folder(self.path)

    def verify(self, *, checksums: bool = False) -> None:
        """As `BlockStore.verify`, the table included."""
        super().verify(checksums=checksums)
        file, written = self.path / POOLED, read_summary(self.path).get("pooled_digest")
        found = ShardDigest.on_disk(file)
        if written != list(found):
            got = "another" if found.size else "nothing there"
            raise ReadError(file, expected="the table that was written", got=got, hint=ANEW)

    def _is_plausible(self, block: int, entry: Mapping[str, Any]) -> bool:
        return all(entry[name][0] for name in self._shards(block))  # features are never all 0

    def _write_pooled(self) -> None:
        """The table of the means of all tiles, read from the stores."""
        finest = self.plan.levels[0].store
        with whole_file(self.path / POOLED) as stream:
            text = TextIOWrapper(stream, newline="")
            table = csv.writer(text)
            corners = [f"{axis}{end}" for end in (0, 1) for axis in finest.axes]
            table.writerow(["level", *corners, *(f"f{i}" for i in range(finest.num_channels))])
            for features in self.plan.levels:
                store = OmeZarrSlide(self.path / features.folder)
                for index in np.ndindex(*features.tiling.grid):
                    table.writerow(self._pooled(features, store, index))
            text.detach()  # flushed, and left open

    def _pooled(self, features: LevelFeatures, store: OmeZarrSlide, index: tuple[int, ...]) -> list[str]:
        """A row: level, world box, means."""
        tiling, level = features.tiling, features.tiling.levels[0]
        low, high = zip(*(tiling.cell(axis, i) for axis, i in enumerate(index)), strict=True)
        first, last = features.in_patches(low), features.in_patches(high)
        values = store.read(1, first, tuple(b - a for a, b in zip(first, last, strict=True)))
        means = values.reshape(len(values), -1).mean(axis=1, dtype=np.float64)
        factors, extents = level_factors(level, len(index)), self.plan.image["shape"]
        box = [min(a * f, n) for edge in (low, high) for a, f, n in zip(edge, factors, extents, strict=True)]
        return [level_name(level), *(f"{edge:.12g}" for edge in box), *(f"{mean:.6g}" for mean in means)]


class FeatureCanvas:
    """Features of one block, on the CPU.

    Args:
        features: the level.
        number: of the block in the tiling of the level.
    """

    def __init__(self, features: LevelFeatures, number: int) -> None:
        self.features = features
        self._block = features.tiling.block(number)
        size = features.shard(number).size
        self._pixels = np.zeros((features.store.num_channels, *size), features.store.dtype)

    def add(self, tile: Tile, values: NDArray[np.float32]) -> None:
        """Paint the features ``(D, *grid)`` of one tile."""
        source, target = (self._in_patches(part) for part in (tile.source, tile.target(self._block)))
        with np.errstate(over="ignore"):  # `finish` refuses overflows
            self._pixels[(slice(None), *target)] = values[(slice(None), *source)]

    def choose_tiles(self) -> list[int]:
        """None: there is one pass."""
        return []

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
