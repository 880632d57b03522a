"""Stores of the features of a slide: an image for each level, a table of tile means, and a group that joins them.

The ``zarr.json`` of the group is written last: once it is there, the features count as complete.
"""

import csv
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np

from muvit.data.pyramids.ngff import write_json
from muvit.data.pyramids.spec import PyramidSpec
from muvit.data.pyramids.writer import Shard
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.durable import sync_folder, whole_file
from muvit.inference.run.plan import FeaturePlan, LevelFeatures
from muvit.inference.run.store import BlockStore
from muvit.levels import level_factors, level_name

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
        stores = [features.folder for features in self.plan.levels]
        attributes = {"muvit": {"features": stores, "pooled": POOLED, "plan": self.plan.to_json()}}
        write_json(self.path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})
        sync_folder(self.path)

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
