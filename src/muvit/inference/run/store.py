"""Stores of an output while they are made: created with their plan, filled block by block, published as a whole.

`muvit.inference.run.resume` describes the marks of an unfinished output.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from numpy.typing import NDArray

from muvit.data.pyramids.manifest import ShardDigest, check_store
from muvit.data.pyramids.ngff import read_json
from muvit.data.pyramids.spec import PyramidSpec
from muvit.data.pyramids.writer import PyramidWriter, Shard, check_replaceable
from muvit.durable import remove_whole
from muvit.errors import ReadError
from muvit.inference.run.plan import Plan, hash_plan
from muvit.inference.run.resume import (
    PLAN,
    WORK,
    Ledger,
    as_plan,
    clear_work,
    create,
    is_abandoned,
    is_begun_by,
    is_empty,
    is_published,
    read_ledgers,
    read_plan,
)

ANEW = "Begin the output anew (--overwrite), or restore it from a copy."

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
        with as_plan(path / WORK / PLAN):
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
            ReadError: the complete output of this plan is there, but for a part that is missing.
        """
        # in this order: an output that other parts complete in the meantime is published before it is not begun
        if not overwrite and is_begun_by(self.path, self.plan.to_json()):
            return
        if not overwrite and self.is_published():
            self.verify()
            return
        if not is_abandoned(self.path):
            for folder in self._folders():
                if not is_empty(folder) and not (folder / WORK / PLAN).is_file():
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
        return Ledger(self.path / WORK / f"{name}.ledger", self._plan_hash)

    def done(self) -> dict[str, Any]:
        """Entries of all ledgers whose shards are on disk."""
        entries = read_ledgers(self.path / WORK, self._plan_hash)
        return {key: entry for key, entry in entries.items() if self._holds(key, entry)}

    def verify(self, *, checksums: bool = False) -> None:
        """Check that the complete output is on disk as it was written.

        Args:
            checksums: read all bytes; otherwise only presence and size of the shards are checked.

        Raises:
            ReadError: it is not; names the first file.
        """
        for writer in self.writers.values():
            if not (writer.path / "zarr.json").is_file():
                raise ReadError(writer.path, expected="a store of the output", got="none", hint=ANEW)
            if not check_store(writer.path, checksums=checksums, hint=ANEW):
                got = "none, as of earlier versions"
                raise ReadError(writer.path, expected="a record of its shards", got=got, hint=ANEW)

    def empty_shards(self) -> dict[int, list[str]]:
        """Blocks of the complete output for which tiles are computed, with the stores where all their pixels are 0."""
        empty: dict[int, list[str]] = {}
        in_blocks = {name for name, writer in self.writers.items() if _is_in_blocks(writer)}
        for number in filter(self.plan.num_computed, range(self.plan.num_blocks)):
            for name, shard in self._shards(number).items():
                if name in in_blocks and not self.writers[name].shard_file(shard).exists():
                    empty.setdefault(number, []).append(name)
        return empty

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
                    done[key] = list(writer.build(shard))
                    ledger.record(key, done[key])
        for key, entry in done.items():
            for name, (shard, digest) in self._recorded(key, entry).items():
                self.writers[name].digests[shard.number, shard.start] = digest
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

    def _is_plausible(self, block: int, entry: Mapping[str, Any]) -> bool:
        """Whether an entry of the ledger can be about a block for which tiles were computed."""
        return True

    @cached_property
    def _plan_hash(self) -> str:
        return hash_plan(self.plan.to_json())

    def _holds(self, key: str, entry: Any) -> bool:
        recorded = self._recorded(key, entry)
        files = [(self.writers[name].shard_file(shard), digest) for name, (shard, digest) in recorded.items()]
        return bool(files) and all(digest.is_held_by(file) for file, digest in files)

    def _recorded(self, key: str, entry: Any) -> dict[str, tuple[Shard, ShardDigest]]:
        """The shards that an entry of the ledger is about; none if no run of this plan can have made it."""
        try:
            kind, number, *start = key.split()
            if kind != "block":
                spec, shard = self.writers[kind].spec, Shard(int(number), tuple(map(int, start)), ())
                grid = zip(shard.start, spec.level_shape(shard.number), spec.shard_shape(shard.number), strict=True)
                is_coarse = shard.number > 0 and all(0 <= a < n and a % edge == 0 for a, n, edge in grid)
                return {kind: (shard, _digest(entry))} if is_coarse else {}
            block = int(number)
            recorded = {name: (shard, _digest(entry[name])) for name, shard in self._shards(block).items()}
            if self.plan.num_computed(block):
                return recorded if self._is_plausible(block, entry) else {}
            return recorded if not any(digest.size for _, digest in recorded.values()) else {}
        except (LookupError, TypeError, ValueError):
            return {}


def _digest(entry: Any) -> ShardDigest:
    size, crc32 = entry
    if type(size) is not int or type(crc32) is not int or size < 0:
        raise TypeError("no digest of a shard")
    return ShardDigest(size, crc32)


def _is_in_blocks(writer: PyramidWriter) -> bool:
    """Whether a store has the shards of its writer still: pixels may have been brought onto the grid of the slide."""
    spec = writer.spec
    return tuple(read_json(writer.path / "0" / "zarr.json")["shape"]) == spec.stored(spec.shape, spec.num_channels)


def block_key(number: int) -> str:
    """Key of a block in the ledger."""
    return f"block {number}"
