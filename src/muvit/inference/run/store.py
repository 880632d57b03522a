"""The stores of a prediction while they are made: created with their plan, filled block by block, published as whole.

What marks them as unfinished is in `muvit.inference.run.resume`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muvit.data.pyramids.writer import PyramidWriter, Shard, ShardDigest, check_replaceable
from muvit.data.slides.formats import slide_name
from muvit.durable import remove_whole
from muvit.inference.run.canvas import BlockPixels
from muvit.inference.run.ledger import Ledger, read_ledgers
from muvit.inference.run.plan import Plan
from muvit.inference.run.resume import (
    WORK,
    clear_work,
    create,
    is_begun_by,
    is_empty,
    is_scrap,
    read_plan,
    read_summary,
)
from muvit.inference.tiling.seams import Seams, add_seams
from muvit.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a prediction is."""

    state: str
    """``missing``, ``unfinished``, ``complete``, or ``foreign``: something that is no prediction."""
    blocks: int = 0
    """Blocks that are done."""
    num_blocks: int = 0
    """All blocks."""
    shards: int = 0
    """Shards of coarser levels that are done."""
    num_shards: int = 0
    """All shards of coarser levels."""
    seams: Seams | None = None
    """How tiles fit together, as far as they are done."""


class Output:
    """An unfinished prediction; made by `begin`, or by `Output` where one was begun.

    Args:
        path: the label store.
        plan: what it was begun with.

    Attributes:
        writers: the writer of each store.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self.plan = plan
        self.writers = {name: PyramidWriter(store_path(path, name), spec) for name, spec in plan.stores.items()}

    @classmethod
    def begin(cls, path: Path, plan: Plan, *, overwrite: bool = False) -> "Output":
        """Create the stores of a prediction, or go on with those that the same plan has begun.

        Raises:
            ExistsError: something else is there, or a complete prediction, and overwriting was not asked for.
            InputError: an unfinished prediction of another plan is there; tells the differences.
        """
        output = cls(path, plan)
        output.check(overwrite=overwrite)
        if overwrite or read_plan(path) is None:
            output._create()
        return output

    def check(self, *, overwrite: bool = False) -> None:
        """See that `begin` is possible; touches nothing. Raises what `begin` does."""
        if not overwrite and is_begun_by(self.path, self.plan.to_json()):
            return
        if not is_scrap(self.path):
            for writer in self.writers.values():
                if not is_empty(writer.path):
                    check_replaceable(writer.path, overwrite)

    def _create(self) -> None:
        earlier = read_plan(self.path) or read_summary(self.path).get("plan", {})
        for name in {*self.plan.stores, *earlier.get("stores", ())}:  # also what this plan has not
            remove_whole(store_path(self.path, name))
        create(self.path, self.plan.to_json(), list(self.writers.values()))

    def ledger(self, name: str = "all") -> Ledger:
        """A ledger to write to; every process that works on the output needs one of its own."""
        return Ledger(self.path / WORK / f"{name}.ledger")

    def done(self) -> dict[str, Any]:
        """What all ledgers list and the disk holds."""
        entries = read_ledgers(self.path / WORK)
        return {key: entry for key, entry in entries.items() if self._holds(key, entry)}

    def missing_blocks(self) -> list[int]:
        """Numbers of the blocks that are not done."""
        done = self.done()
        return [number for number in range(self.plan.tiling.num_blocks) if _block_key(number) not in done]

    def write_block(self, number: int, pixels: BlockPixels | None) -> tuple[str, Any]:
        """Write a block to all stores; when this returns, it is on disk.

        Args:
            number: of the block.
            pixels: what it holds; None: nothing but zeros.

        Returns:
            What the ledger is to list: key and value.
        """
        block = self.plan.tiling.block(number)
        entry: dict[str, Any] = {"seams": pixels.seams if pixels else [0] * 4}
        for name, writer in self.writers.items():
            digest = writer.write_shard(Shard(0, *block), pixels.stores[name]) if pixels else ShardDigest(0, 0)
            entry[name] = list(digest)
        return _block_key(number), entry

    def finish(self, ledger: Ledger, progress: Progress | None = None) -> Seams:
        """Build the coarser levels and make the stores readable, all blocks being done.

        Args:
            ledger: where to note what is done.
            progress: called with the number of shards of coarser levels that are done, and of all.
        """
        done = self.done()
        shards = [(name, shard) for name, writer in self.writers.items() for shard in writer.coarse_shards()]
        for number, (name, shard) in enumerate(shards, start=1):
            key = _shard_key(name, shard)
            if key not in done:
                ledger.record(key, list(self.writers[name].build(shard)))
            if progress is not None:
                progress(number, len(shards))
        seams = self._seams(done)
        summary = {"plan": self.plan.to_json(), "seams": seams.to_json()}
        for name in sorted(self.writers, key=lambda name: name == "labels"):  # the labels last: they stand for all
            self.writers[name].publish({"muvit": summary} if name == "labels" else None)
        ledger.close()
        self.settle()
        return seams

    def settle(self) -> None:
        """What is left to do when the label store is published; may be repeated."""
        for writer in self.writers.values():
            writer.settle()
        clear_work(self.path)

    def status(self) -> Status:
        """How far it is."""
        done, num_blocks = self.done(), self.plan.tiling.num_blocks
        blocks = sum(_block_key(number) in done for number in range(num_blocks))
        shards = sum(writer.num_coarse_shards for writer in self.writers.values())
        return Status(
            state="unfinished",
            blocks=blocks,
            num_blocks=num_blocks,
            shards=len(done) - blocks,
            num_shards=shards,
            seams=self._seams(done),
        )

    def _seams(self, done: Mapping[str, Any]) -> Seams:
        return add_seams(entry["seams"] for key, entry in done.items() if key.startswith("block "))

    def _holds(self, key: str, entry: Any) -> bool:
        kind, number, *start = key.split()
        if kind == "block":
            shard = Shard(0, *self.plan.tiling.block(int(number)))
            return all(writer.holds(shard, ShardDigest(*entry[name])) for name, writer in self.writers.items())
        return self.writers[kind].holds(Shard(int(number), tuple(map(int, start)), ()), ShardDigest(*entry))


def store_path(path: Path, name: str) -> Path:
    """Where a store of the prediction at ``path`` lies: ``a.ome.zarr`` and ``a.probabilities.ome.zarr``."""
    return path if name == "labels" else path.with_name(f"{slide_name(path)}.{name}.ome.zarr")


def prediction_status(path: Path) -> Status:
    """How far the prediction at ``path`` is, which somebody may be working on; needs neither model nor image.

    Raises:
        ReadError: its plan is damaged.
    """
    # in the order in which a run comes along, so that it cannot slip by
    if not path.exists() or is_empty(path) or is_scrap(path):
        return Status(state="missing")
    plan = read_plan(path)
    status = Status(state="foreign") if plan is None else Output(path, Plan.from_json(plan)).status()
    summary = read_summary(path)
    if not summary:
        return status
    output = Output(path, Plan.from_json(summary["plan"]))
    blocks = output.plan.tiling.num_blocks
    shards = sum(writer.num_coarse_shards for writer in output.writers.values())
    counts = {name: count for name, count in summary["seams"].items() if name != "ratio"}
    return Status(
        state="complete",
        blocks=blocks,
        num_blocks=blocks,
        shards=shards,
        num_shards=shards,
        seams=Seams(**counts),
    )


def _block_key(number: int) -> str:
    return f"block {number}"


def _shard_key(name: str, shard: Shard) -> str:
    return " ".join(map(str, (name, shard.number, *shard.start)))
