"""The features of a slide while they are made: stores created with their plan, filled block by block, then published.

A folder ``.muvit`` holds the plan and the ledger until all is done; then the folder's own ``zarr.json`` is written.
"""

import csv
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np

from muvit.data.pyramids.ngff import write_json
from muvit.data.pyramids.writer import PyramidWriter, ShardDigest, check_replaceable
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.durable import remove_whole, sync_folder, whole_file
from muvit.inference.run.feature_plan import FeaturePlan, LevelFeatures
from muvit.inference.run.ledger import Ledger, read_ledgers
from muvit.inference.run.resume import WORK, clear_work, create, is_begun_by, is_empty, is_scrap, read_plan
from muvit.levels import level_factors, level_name

POOLED = "pooled.csv"


class FeatureOutput:
    """The stores of one plan.

    Args:
        path: the folder of all.
        plan: what is made.
    """

    def __init__(self, path: Path, plan: FeaturePlan) -> None:
        self.path, self.plan = path, plan
        self._writers = {f.folder: PyramidWriter(path / f.folder, f.store) for f in plan.levels}

    def check(self, *, overwrite: bool) -> None:
        """See that `begin` is possible; touches nothing.

        Raises:
            ExistsError: something else is there, and overwriting was not asked for.
            InputError: unfinished features of another plan are there; tells the differences.
        """
        if not overwrite and is_begun_by(self.path, self.plan.to_json()):
            return
        if not is_scrap(self.path) and not is_empty(self.path) and read_plan(self.path) is None:
            check_replaceable(self.path, overwrite)

    def begin(self, *, overwrite: bool) -> None:
        """Create the stores, or go on with those that the same plan has begun."""
        self.check(overwrite=overwrite)
        if overwrite or read_plan(self.path) is None:
            remove_whole(self.path)
            create(self.path, self.plan.to_json(), list(self._writers.values()))

    def ledger(self) -> Ledger:
        """The ledger to write to."""
        return Ledger(self.path / WORK / "all.ledger")

    def missing_blocks(self, features: LevelFeatures) -> list[int]:
        """Blocks of a level that the ledger does not list, or the disk does not hold."""
        done = {key: ShardDigest(*value) for key, value in read_ledgers(self.path / WORK).items()}
        writer = self._writers[features.folder]
        return [
            block
            for block in range(features.tiling.num_blocks)
            if (key := _key(features, block)) not in done or not writer.holds(features.shard(block), done[key])
        ]

    def write_block(self, features: LevelFeatures, block: int, values: np.ndarray[Any, Any]) -> tuple[str, list[int]]:
        """Write the features ``(D, *patches)`` of a block to disk; what the ledger is to list: key and value."""
        return _key(features, block), list(self._writers[features.folder].write_shard(features.shard(block), values))

    def finish(self) -> None:
        """Make the stores readable and write the table, all blocks being done. May be repeated after a crash."""
        for features in self.plan.levels:
            level, patch = features.tiling.levels[0], features.patch
            step = [factor * p for factor, p in zip(level_factors(level, len(patch)), patch, strict=True)]
            where = {"level": level, "world_origin": [0] * len(step), "world_step": step}
            self._writers[features.folder].publish({"muvit": where})
        self._write_pooled()
        stores = [features.folder for features in self.plan.levels]
        attributes = {"muvit": {"features": stores, "pooled": POOLED, "plan": self.plan.to_json()}}
        write_json(self.path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})
        sync_folder(self.path)
        clear_work(self.path)

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


def _key(features: LevelFeatures, block: int) -> str:
    return f"{features.folder} {block}"
