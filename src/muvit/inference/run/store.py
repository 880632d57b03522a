"""Stores of an output while they are made: created with their plan, filled block by block, published as a whole.

`muvit.inference.run.resume` describes the marks of an unfinished output.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from numpy.typing import NDArray

from muvit.data.pyramids.spec import PyramidSpec
from muvit.data.pyramids.writer import PyramidWriter, Shard, ShardDigest, check_replaceable
from muvit.durable import remove_whole
from muvit.inference.run.plan import Plan
from muvit.inference.run.resume import (
    WORK,
    Ledger,
    clear_work,
    create,
    is_abandoned,
    is_begun_by,
    is_empty,
    is_published,
    read_ledgers,
    read_plan,
)

PlanT = TypeVar("PlanT", bound=Plan)


@dataclass(frozen=True, kw_only=True)
class BlockPixels:
    """Content of a block."""

    stores: dict[str, NDArray[Any]]
    """Pixels ``(C, *size)`` of each store that the block is part of."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Plain data that the ledger keeps with the block."""


class BlockStore(ABC, Generic[PlanT]):
    """Stores of one output, whose blocks are whole shards; picklable.

    Args:
        path: folder of the output.
        plan: everything that decides its bytes.

    Attributes:
        writers: the writer of each store.
    """

    plan_type: ClassVar[type[Plan]]

    def __init__(self, path: Path, plan: PlanT) -> None:
        self.path = path
        self.plan = plan
        self.writers = {name: PyramidWriter(file, spec) for name, (file, spec) in self._specs().items()}

    @classmethod
    def open(cls, path: Path) -> Self:
        """The unfinished output at ``path``, with the plan that it was begun with."""
        plan = read_plan(path)
        assert plan is not None, f"{path} holds no unfinished output"
        return cls(path, cls.plan_type.from_json(plan))  # type: ignore[arg-type]

    def is_published(self) -> bool:
        """Whether the complete output of this plan can be read; its run may still have to clean up."""
        return is_published(self.path, self.plan.to_json())

    def is_complete(self) -> bool:
        """Whether the complete output of this plan is there, and nothing is left to do."""
        return self.is_published() and not (self.path / WORK).exists()

    def check(self, *, overwrite: bool = False) -> None:
        """Check that `begin` is possible; writes nothing.

        Raises:
            ExistsError: something else is there, and overwriting was not requested.
            InputError: an unfinished output of another plan is there; lists the differences.
        """
        # in this order: an output that other parts complete in the meantime is published before it is not begun
        if not overwrite and (is_begun_by(self.path, self.plan.to_json()) or self.is_published()):
            return
        if not is_abandoned(self.path):
            for folder in self._folders():
                if not is_empty(folder) and read_plan(folder) is None:
                    check_replaceable(folder, overwrite)

    def begin(self, *, overwrite: bool = False) -> bool:
        """Create the stores, or resume those of the same plan; False if they are complete. Errors as of `check`."""
        self.check(overwrite=overwrite)
        if not overwrite and self.is_published():
            self.clean_up()
            return False
        if overwrite or read_plan(self.path) is None:
            for folder in self._folders():
                remove_whole(folder)
            create(self.path, self.plan.to_json(), list(self.writers.values()))
        return True

    def ledger(self, name: str = "all") -> Ledger:
        """A ledger to write to; every process that works on the output needs its own."""
        return Ledger(self.path / WORK / f"{name}.ledger")

    def done(self) -> dict[str, Any]:
        """Entries of all ledgers whose shards are on disk."""
        entries = read_ledgers(self.path / WORK)
        return {key: entry for key, entry in entries.items() if self._holds(key, entry)}

    def missing_blocks(self) -> list[int]:
        """Numbers of the blocks that are not done."""
        done = self.done()
        return [number for number in range(self.plan.num_blocks) if block_key(number) not in done]

    def write_block(self, number: int, pixels: BlockPixels | None) -> tuple[str, Any]:
        """Write a block to its stores; when this returns, it is on disk.

        Args:
            number: of the block.
            pixels: its content; None for zeros only.

        Returns:
            Key and value for the ledger.
        """
        entry: dict[str, Any] = dict(pixels.notes) if pixels else {}
        for name, shard in self._shards(number).items():
            digest = self.writers[name].write_shard(shard, pixels.stores[name]) if pixels else ShardDigest(0, 0)
            entry[name] = list(digest)
        return block_key(number), entry

    def finish(self, ledger: Ledger) -> None:
        """Build the coarser levels and make the stores readable, all blocks being done. May be repeated after a crash.

        Args:
            ledger: where finished shards are recorded.
        """
        done = self.done()
        for name, writer in self.writers.items():
            for shard in writer.coarse_shards():
                key = " ".join(map(str, (name, shard.number, *shard.start)))
                if key not in done:
                    ledger.record(key, list(writer.build(shard)))
        self._publish(done)
        ledger.close()
        self.clean_up()

    def clean_up(self) -> None:
        """Remove everything that only an unfinished output needs. May be repeated."""
        for writer in self.writers.values():
            writer.settle()
        clear_work(self.path)

    @abstractmethod
    def _specs(self) -> dict[str, tuple[Path, PyramidSpec]]:
        """Folder and specification of each store."""

    @abstractmethod
    def _shards(self, block: int) -> dict[str, Shard]:
        """The shards that a block fills, by the names of their stores."""

    @abstractmethod
    def _publish(self, done: Mapping[str, Any]) -> None:
        """Make the stores readable.

        Args:
            done: entries of the ledgers.
        """

    def _folders(self) -> Sequence[Path]:
        """Folders that the output replaces."""
        return [self.path]

    def _holds(self, key: str, entry: Any) -> bool:
        kind, number, *start = key.split()
        if kind == "block":
            shards = self._shards(int(number)).items()
            return all(self.writers[name].holds(shard, ShardDigest(*entry[name])) for name, shard in shards)
        if not start:  # a block of features, as earlier versions recorded it
            return False
        return self.writers[kind].holds(Shard(int(number), tuple(map(int, start)), ()), ShardDigest(*entry))


def block_key(number: int) -> str:
    """Key of a block in the ledger."""
    return f"block {number}"
