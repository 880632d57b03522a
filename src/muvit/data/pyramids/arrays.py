"""Windowed reading of one zarr array, by two implementations behind one `request`.

`ShardedArray` decodes the arrays that this package writes (sharded, zstd with checksum) by plain positional reads: no
thread and no open file outlives a call, so it works in forked worker processes. `TensorStoreArray` reads every other
zarr array through tensorstore, whose threads do not survive a fork.
"""

import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import imagecodecs
import numpy as np

from muvit.data.pyramids.manifest import LevelRecord, ShardDigest, shard_file, shard_grid
from muvit.data.pyramids.ngff import read_json
from muvit.data.pyramids.remote import RemotePath, remote_context, wait_for
from muvit.errors import ReadError

_MISSING = 2**64 - 1
_CACHED_INDICES = 1024
_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_CHUNK_NAME = re.compile(r"(c\.)?\d+(\.\d+)*")
_tensorstore_process: int | None = None


class ZarrArray(Protocol):
    """A zarr array that is read by windows."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def request(self, start: tuple[int, ...], stop: tuple[int, ...]) -> Callable[[], np.ndarray[Any, Any]]:
        """A function that gives the window ``start`` to ``stop``, which lies inside the array.

        The window is read meanwhile where that needs nothing of this thread.
        """
        ...


def open_array(folder: Path, zarr_format: int, record: LevelRecord | None = None) -> ZarrArray:
    """Open the array in a folder.

    Args:
        folder: of the array.
        zarr_format: 2 or 3.
        record: what was written, if that is known.

    Raises:
        ReadError: there is none, its metadata are damaged, or shards are not as they were written.
    """
    file = folder / ("zarr.json" if zarr_format == 3 else ".zarray")
    if not file.is_file():
        raise ReadError(folder, expected=f"a zarr array with its {file.name}", got="no such file")
    metadata = read_json(file)
    if record is not None:
        record.check(folder, metadata)
    try:
        shape = tuple(int(n) for n in metadata["shape"])
        dtype = np.dtype(metadata["data_type"] if zarr_format == 3 else metadata["dtype"])
        if zarr_format == 3 and is_sharded_zstd(metadata) and not isinstance(folder, RemotePath):
            return ShardedArray(folder, metadata, None if record is None else record.shards)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ReadError(file, expected="the metadata of a numeric zarr array", got=f"{error!r}") from error
    return TensorStoreArray(folder, zarr_format, shape, dtype)


def count_chunks(folder: Path, zarr_format: int) -> tuple[int, int]:
    """Number of files of chunks (or shards) of an array, and the number that its shape has."""
    if zarr_format == 3:
        grid = shard_grid(read_json(folder / "zarr.json"))
    else:
        metadata = read_json(folder / ".zarray")
        grid = tuple(-(-n // edge) for n, edge in zip(metadata["shape"], metadata["chunks"], strict=True))
    names = (name for _, _, files in os.walk(folder) for name in files)
    return sum(_CHUNK_NAME.fullmatch(name) is not None for name in names), math.prod(grid)


def sharded_metadata(
    *, shape: Iterable[int], dtype: np.dtype[Any], axes: str, chunk: Iterable[int], shard: Iterable[int]
) -> dict[str, Any]:
    """Metadata of an array as this package writes it: zstd level 1, crc32c over every chunk and every shard's index.

    The zstd frames carry their own checksum over the decoded pixels too: it is checked for nothing while decoding.
    """
    inner = [
        {"name": "bytes", "configuration": {"endian": "little"}} if dtype.itemsize > 1 else {"name": "bytes"},
        {"name": "zstd", "configuration": {"level": 1, "checksum": True}},
        {"name": "crc32c"},
    ]
    sharding = {
        "chunk_shape": list(chunk), "codecs": inner, "index_codecs": _INDEX_CODECS, "index_location": "end"
    }  # fmt: skip
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": list(axes),
    }


def is_sharded_zstd(metadata: dict[str, Any]) -> bool:
    """Whether `ShardedArray` can decode an array with this metadata."""
    codecs = metadata["codecs"]
    if len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed" or metadata.get("storage_transformers"):
        return False
    sharding = codecs[0]["configuration"]
    encoding = metadata.get("chunk_key_encoding", {})
    inner = {codec["name"]: codec.get("configuration") or {} for codec in sharding["codecs"]}
    return (
        list(inner) in (["bytes", "zstd"], ["bytes", "zstd", "crc32c"])
        and inner["bytes"].get("endian", "little") == "little"
        and inner["zstd"].get("checksum") is True
        and sharding.get("index_location", "end") == "end"
        and sharding["index_codecs"] == _INDEX_CODECS
        and encoding.get("name") == "default"
        and (encoding.get("configuration") or {}).get("separator", "/") == "/"
    )


class ShardedArray:
    """Zarr v3 array of shards whose chunks are zstd frames with a checksum.

    Args:
        folder: of the array.
        metadata: of the array.
        shards: digest of each shard as it was written, row-major, if that is known.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any], shards: tuple[ShardDigest, ...] | None = None) -> None:
        sharding = metadata["codecs"][0]["configuration"]
        self.folder = folder
        self.shape = tuple(int(n) for n in metadata["shape"])
        self.dtype = np.dtype(metadata["data_type"])
        self._shard = tuple(int(n) for n in metadata["chunk_grid"]["configuration"]["chunk_shape"])
        self._chunk = tuple(int(n) for n in sharding["chunk_shape"])
        self._grid = tuple(s // c for s, c in zip(self._shard, self._chunk, strict=True))
        self._fill = metadata["fill_value"]
        self._written = None if shards is None else dict(zip(np.ndindex(*shard_grid(metadata)), shards, strict=True))
        self._trailer = 4 if sharding["codecs"][-1]["name"] == "crc32c" else 0
        self._index = lru_cache(maxsize=_CACHED_INDICES)(self._read_index)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_index"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index = lru_cache(maxsize=_CACHED_INDICES)(self._read_index)

    def request(self, start: tuple[int, ...], stop: tuple[int, ...]) -> Callable[[], np.ndarray[Any, Any]]:
        """As `read`, which is called by the result."""
        return partial(self.read, start, stop)

    def read(self, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """The window ``start`` to ``stop``; a chunk that was never stored has the fill value.

        Raises:
            ValueError, RuntimeError, OSError: a shard is missing or truncated, or a checksum does not fit.
        """
        pixels = np.empty([b - a for a, b in zip(start, stop, strict=True)], self.dtype)
        buffer = bytearray(math.prod(self._chunk) * self.dtype.itemsize)
        decoded = np.frombuffer(buffer, self.dtype.newbyteorder("<")).reshape(self._chunk)
        for shard in _cells(start, stop, self._shard):
            origin = [i * n for i, n in zip(shard, self._shard, strict=True)]
            lower = [max(a - o, 0) for a, o in zip(start, origin, strict=True)]
            upper = [min(b - o, n) for b, o, n in zip(stop, origin, self._shard, strict=True)]
            for chunk, data in self._chunks(shard, lower, upper):
                at = [o + i * n for o, i, n in zip(origin, chunk, self._chunk, strict=True)]
                inside, outside = _overlap(at, self._chunk, start, stop)
                if data is None:
                    pixels[outside] = self._fill
                else:
                    self._decode(data, buffer, shard, chunk)
                    pixels[outside] = decoded[inside]
        return pixels

    def _chunks(
        self, shard: tuple[int, ...], lower: list[int], upper: list[int]
    ) -> Iterator[tuple[tuple[int, ...], bytes | None]]:
        index = self._index(shard)
        chunks = _cells(lower, upper, self._chunk)
        if index is None:
            yield from ((chunk, None) for chunk in chunks)
            return
        file = os.open(self._file(shard), os.O_RDONLY)
        try:
            for chunk in chunks:
                offset, length = index[chunk].tolist()
                if offset == _MISSING:
                    yield chunk, None
                    continue
                data = os.pread(file, length, offset)
                if len(data) != length:
                    raise ValueError(f"{self._file(shard)} is truncated")
                yield chunk, data
        finally:
            os.close(file)

    def _decode(self, data: bytes, buffer: bytearray, shard: tuple[int, ...], chunk: tuple[int, ...]) -> None:
        try:
            found = imagecodecs.zstd_decode(data[: len(data) - self._trailer], out=buffer)
            if len(found) != len(buffer):
                raise ValueError(f"{len(found)} bytes instead of {len(buffer)}")
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"chunk {chunk} of {self._file(shard)} is corrupt ({error})") from error

    def _file(self, shard: tuple[int, ...]) -> Path:
        return shard_file(self.folder, shard)

    def _read_index(self, shard: tuple[int, ...]) -> np.ndarray[Any, Any] | None:
        length = 16 * math.prod(self._grid)
        try:
            with self._file(shard).open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                self._check_size(shard, size)
                stream.seek(max(size - length - 4, 0))
                data = stream.read()
        except FileNotFoundError:
            self._check_size(shard, 0)
            return None
        if len(data) != length + 4 or crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise ValueError(f"the index of {self._file(shard)} is truncated or does not fit its checksum")
        return np.frombuffer(data[:-4], "<u8").reshape(*self._grid, 2)

    def _check_size(self, shard: tuple[int, ...], size: int) -> None:
        if self._written is not None and self._written[shard].size != size:
            raise ValueError(f"{self._file(shard)} has {size} bytes, {self._written[shard].size} were written")


class TensorStoreArray:
    """Any zarr array that tensorstore reads, opened at the first read in each process."""

    def __init__(self, folder: Path, zarr_format: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.folder, self.zarr_format, self.shape, self.dtype = folder, zarr_format, shape, dtype
        self._store: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_store": None}

    def request(self, start: tuple[int, ...], stop: tuple[int, ...]) -> Callable[[], np.ndarray[Any, Any]]:
        """A function that waits for the window ``start`` to ``stop``, which the threads of tensorstore read meanwhile.

        Raises:
            ReadError: this process was forked from one that had used tensorstore.
            ValueError: tensorstore cannot read it; raised by the result, too.
        """
        require_unforked(self.folder)
        if self._store is None:
            self._store = open_store(self.folder, {"driver": "zarr3" if self.zarr_format == 3 else "zarr"})
        window = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        pending = self._store[window].read()
        return lambda: np.array(wait_for(pending, self.folder))


def encode_shard(metadata: dict[str, Any], pixels: np.ndarray[Any, Any]) -> bytes | None:
    """The bytes of one shard, the same for the same pixels; None if all of them have the fill value.

    Args:
        metadata: of its array, as `sharded_metadata` makes them.
        pixels: of the stored axes; no larger than a shard, smaller where the image ends before it.
    """
    require_unforked("a shard")
    import tensorstore

    shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    context = tensorstore.Context()  # its memory goes with it
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "memory"},
        "metadata": metadata | {"shape": shard},
        "create": True,
    }
    store = tensorstore.open(spec, context=context).result()
    store[tuple(slice(n) for n in pixels.shape)].write(pixels).result()
    memory = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
    found = memory.read("/".join(("c", *("0" for _ in shard)))).result()
    return bytes(found.value) if found.state == "value" else None


def open_store(folder: Path, spec: dict[str, Any]) -> Any:
    """Open (or create) an array through tensorstore, with caches bounded for the whole process."""
    require_unforked(folder)
    import tensorstore

    if isinstance(folder, RemotePath):
        return wait_for(tensorstore.open({**spec, "kvstore": folder.store}, context=remote_context()), folder)
    # tensorstore refuses paths with `..`, and only the file system knows where that leads behind a link
    kvstore = {"driver": "file", "path": f"{folder.resolve()}/"}
    return tensorstore.open({**spec, "kvstore": kvstore}, context=_context()).result()


def require_unforked(subject: object) -> None:
    """Refuse tensorstore in a process forked from one that has used it: it would abort the process.

    Raises:
        ReadError: it is such a process; names ``subject``.
    """
    global _tensorstore_process
    _tensorstore_process = _tensorstore_process or os.getpid()
    if _tensorstore_process != os.getpid():
        raise ReadError(
            subject,
            expected="a process that was not forked after zarr arrays had been written or foreign ones read",
            got="a forked one",
            hint="Start worker processes with the 'forkserver' or 'spawn' method, or convert the image to read it.",
        )


@cache
def _context() -> Any:
    import tensorstore

    return tensorstore.Context({"cache_pool": {"total_bytes_limit": 16 << 20}})


def crc32c(data: bytes) -> int:
    """Castagnoli's cyclic redundancy check, of short data."""
    table, crc = _crc32c_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@cache
def _crc32c_table() -> tuple[int, ...]:
    def remainder(value: int) -> int:
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        return value

    return tuple(map(remainder, range(256)))


def _cells(start: Iterable[int], stop: Iterable[int], cell: Iterable[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(a // n, -(-b // n)) for a, b, n in zip(start, stop, cell, strict=True)))


def _overlap(
    origin: Iterable[int], extent: Iterable[int], start: Iterable[int], stop: Iterable[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Intersection of a cell and a window, as slices of the cell and slices of the window."""
    bounds = [(o, a, max(o, a), min(o + n, b)) for o, n, a, b in zip(origin, extent, start, stop, strict=True)]
    return tuple(slice(p - o, q - o) for o, _, p, q in bounds), tuple(slice(p - a, q - a) for _, a, p, q in bounds)
