"""Record of everything that was written into a store, by which missing, foreign and damaged shards are found.

It stands in the attributes of the group of the store (``muvit``, ``manifest``), which are written last, in one step: a
store and its record are never apart. Each level has the checksum of its metadata, and size and checksum of each shard
in row-major order, also of shards that have no file since all their pixels are 0.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from muvit.data.pyramids.ngff import read_json
from muvit.errors import ReadError

_RESTORE = "Restore it from a copy, or make the store again."
# what other software may add to the metadata of an array changes no pixel
_METADATA = (
    "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs"
)  # fmt: skip


class ShardDigest(NamedTuple):
    """Size and checksum of a shard, to find out whether it is on disk as it was written."""

    size: int
    """Bytes of its file; 0 if there is none, as all its pixels are 0."""
    crc32: int
    """Checksum of the file; 0 if there is none."""

    @classmethod
    def of(cls, content: bytes | None) -> Self:
        """Digest of the content of a file; None if there is none."""
        return cls(0, 0) if content is None else cls(len(content), zlib.crc32(content))

    @classmethod
    def on_disk(cls, file: Path) -> Self:
        """Digest of a file, which need not be there."""
        try:
            return cls.of(file.read_bytes())
        except FileNotFoundError:
            return cls.of(None)

    def is_held_by(self, file: Path) -> bool:
        """Whether a file has this size; 0 if it is not there."""
        return _size(file) == self.size


@dataclass(frozen=True, kw_only=True)
class LevelRecord:
    """One level of a store as it was written."""

    metadata: str
    """Checksum of the metadata of the array."""
    shards: tuple[ShardDigest, ...]
    """Digest of each shard, row-major."""

    @classmethod
    def of(cls, metadata: Mapping[str, Any], shards: Sequence[ShardDigest]) -> Self:
        """The record of an array with this metadata and these shards."""
        return cls(metadata=_checksum(metadata), shards=tuple(shards))

    def to_json(self) -> dict[str, str]:
        """As a JSON object."""
        shards = (f"{digest.size}:{digest.crc32:08x}" if digest.size else "0" for digest in self.shards)
        return {"metadata": self.metadata, "shards": " ".join(shards)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        parts = [text.partition(":") for text in content["shards"].split()]
        digests = (ShardDigest(int(size), int(crc32 or "0", 16)) for size, _, crc32 in parts)
        return cls(metadata=str(content["metadata"]), shards=tuple(digests))

    def check(
        self, folder: Path, metadata: Mapping[str, Any], *, checksums: bool = False, hint: str = _RESTORE
    ) -> None:
        """Refuse an array that is not as it was written.

        Args:
            folder: of the array.
            metadata: of the array, as found there.
            checksums: read all shards; otherwise only their presence and size are checked.
            hint: what to do, for the error.

        Raises:
            ReadError: metadata or shards differ from the record; names the first, and counts them.
        """
        grid = shard_grid(metadata) if _checksum(metadata) == self.metadata else ()
        if math.prod(grid) != len(self.shards) or not grid:
            raise ReadError(folder / "zarr.json", expected="the metadata that were written", got="others", hint=hint)
        damages = list(self._damages(folder, grid, checksums=checksums))
        if damages:
            file, expected, got = damages[0]
            more = f", and {len(damages) - 1} more of {len(self.shards)} shards differ" if len(damages) > 1 else ""
            raise ReadError(file, expected=expected, got=f"{got}{more}", hint=hint)

    def _damages(self, folder: Path, grid: tuple[int, ...], *, checksums: bool) -> Iterator[tuple[Path, str, str]]:
        for index, digest in zip(np.ndindex(*grid), self.shards, strict=True):
            file = shard_file(folder, index)
            size = _size(file)
            if size != digest.size:
                expected = f"a shard of {digest.size} bytes" if digest.size else "no shard, as all its pixels are 0"
                yield file, expected, f"{size} bytes" if size else "nothing there"
            elif checksums and ShardDigest.on_disk(file) != digest:
                yield file, "the bytes that were written", "others"


def read_manifest(folder: Path) -> dict[str, LevelRecord] | None:
    """The record of each level of a store; None for stores of other software and of earlier versions.

    Raises:
        ReadError: it is damaged.
    """
    file = folder / "zarr.json"
    attributes = read_json(file).get("attributes") if file.is_file() else None
    notes = attributes.get("muvit") if isinstance(attributes, dict) else None
    levels = notes.get("manifest") if isinstance(notes, dict) else None
    if levels is None:
        return None
    try:
        return {str(name): LevelRecord.from_json(level) for name, level in levels.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReadError(
            file, expected="a record of the shards of the store", got=f"{error!r}", hint=_RESTORE
        ) from error


def check_store(folder: Path, *, checksums: bool = False, hint: str = _RESTORE) -> bool:
    """Refuse a store that is not as it was written.

    Args:
        folder: of the store.
        checksums: read all bytes; otherwise only presence and size of the shards are checked.
        hint: what to do, for the error.

    Returns:
        Whether there is a record to compare with: False for stores of other software and of earlier versions.

    Raises:
        ReadError: metadata or shards differ from the record.
    """
    manifest = read_manifest(folder)
    for name, level in (manifest or {}).items():
        array = folder / name
        if not (array / "zarr.json").is_file():
            raise ReadError(array / "zarr.json", expected="the metadata of a level", got="nothing there", hint=hint)
        level.check(array, read_json(array / "zarr.json"), checksums=checksums, hint=hint)
    return manifest is not None


def shard_file(folder: Path, index: Sequence[int]) -> Path:
    """File of a shard of an array."""
    return folder.joinpath("c", *map(str, index))


def shard_grid(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Number of shards along each stored axis."""
    shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    return tuple(-(-n // edge) for n, edge in zip(metadata["shape"], shard, strict=True))


def _checksum(metadata: Mapping[str, Any]) -> str:
    fixed = {name: metadata.get(name) for name in _METADATA}
    return f"{zlib.crc32(json.dumps(fixed, sort_keys=True).encode()):08x}"


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0
