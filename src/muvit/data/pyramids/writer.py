"""Writing an OME-Zarr 0.5 pyramid: blocks of the finest level in any order, coarser levels from them, metadata last.

A store that is being written has no root ``zarr.json``; its settings lie in ``unfinished.json``. The last step,
`PyramidWriter.publish`, puts the metadata in place with a record of all shards (`muvit.data.pyramids.manifest`), so a
store is readable only as a whole.

A resumable run writes whole shards by `PyramidWriter.write_shard`, keeps each digest, and does the steps of
`PyramidWriter.finish` one by one.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from muvit.data.pyramids.arrays import encode_shard, open_store, require_unforked, sharded_metadata
from muvit.data.pyramids.manifest import LevelRecord, ShardDigest, shard_file
from muvit.data.pyramids.ngff import (
    Color,
    Kind,
    group_json,
    label_attributes,
    multiscale_attributes,
    omero_attributes,
    read_json,
    register_label,
    write_json,
)
from muvit.data.pyramids.reduction import blocks, reduce_window
from muvit.data.pyramids.spec import PyramidSpec, WholeLevel, check_spec
from muvit.data.slides.formats import slide_name
from muvit.durable import make_folder, partial_files, sync_folder, write_whole
from muvit.errors import ExistsError, InputError, ReadError, first_line
from muvit.levels import level_name
from muvit.progress import Progress

UNFINISHED = "unfinished.json"

_REDUCED_PIXELS = 1 << 22


class Shard(NamedTuple):
    """One file of a pyramid: ``size`` pixels from ``start``, clipped to the image."""

    number: int
    """Of its level, the finest being 0."""
    start: tuple[int, ...]
    size: tuple[int, ...]


class PyramidWriter:
    """Writes one pyramid; made by `create`, or by `open` on a store that another writer has created.

    Several processes may each hold a writer of the same store (a writer is picklable) and write to different shards at
    once; one of them calls `finish` when all have written.

    Attributes:
        path: folder of the store.
        spec: how it is stored.
        digests: of written shards, by level and start; `publish` reads those that are missing here.
    """

    def __init__(self, path: Path, spec: PyramidSpec) -> None:
        self.path, self.spec = path, spec
        self.digests: dict[tuple[int, tuple[int, ...]], ShardDigest] = {}
        self._stores: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stores": {}}

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        shape: Sequence[int],
        num_channels: int,
        dtype: Any,
        axes: str | None = None,
        levels: Sequence[WholeLevel] | None = None,
        kind: Kind = "image",
        pixel_size_um: float | Sequence[float] | None = None,
        channel_names: Sequence[str] | None = None,
        label_names: dict[int, str] | None = None,
        label_colors: dict[int, Color] | None = None,
        has_background: bool = True,
        chunk: int | None = None,
        shard: int | None = None,
        overwrite: bool = False,
    ) -> "PyramidWriter":
        """Create an empty store.

        Args:
            path: folder to create, conventionally named ``*.ome.zarr``; inside the ``labels`` folder of an OME-Zarr
                image it becomes one of that image's labels.
            shape: pixels of the finest level, (t)(z)yx.
            num_channels: number of channels, 1 for labels.
            axes: one letter per axis of ``shape``: ``yx``, ``zyx``, ``tyx`` or ``tzyx``; three axes are zyx by default.
            dtype: integers up to 32 bits or floats; for labels any integers.
            levels: downsampling factors from 1 up, each a multiple of the one before, such as 4 or, where the axes
                differ, (1, 4, 4); by default powers of two until the longest side fits into one chunk.
            kind: ``image`` or ``label``.
            pixel_size_um: micrometers per pixel at the finest level, one number or one per axis (seconds along t).
            channel_names: one per channel.
            label_names: name of each label value.
            label_colors: (red, green, blue) or (red, green, blue, alpha) of each label value, 0 to 255.
            has_background: whether label 0 is background; else it is a class like the others.
            chunk: edge of a chunk in pixels; by default 256 in 2D, 64 in 3D, 16 in 4D.
            shard: edge of a shard in pixels, a multiple of the chunk; by default 4096 in 2D, 512 in 3D, 64 in 4D, and
                halved while a shard takes more than 256 MiB.
            overwrite: replace what is there, if it is a zarr store.

        Raises:
            InputError: an argument does not fit; nothing was touched.
            ExistsError: something is there and overwriting was not asked for, or it is no zarr store.
        """
        spec = check_spec(
            shape=shape,
            num_channels=num_channels,
            dtype=dtype,
            axes=axes,
            levels=levels,
            kind=kind,
            pixel_size_um=pixel_size_um,
            channel_names=channel_names,
            label_names=label_names,
            label_colors=label_colors,
            has_background=has_background,
            chunk=chunk,
            shard=shard,
        )
        return cls.create_from(path, spec, overwrite=overwrite)

    @classmethod
    def create_from(cls, path: str | Path, spec: PyramidSpec, *, overwrite: bool = False) -> "PyramidWriter":
        """Create an empty store from settings that `check_spec` has made.

        Raises:
            ExistsError: something is there and overwriting was not asked for, or it is no zarr store.
        """
        path = Path(path)
        check_replaceable(path, overwrite)
        if path.exists():
            shutil.rmtree(path)
        writer = cls(path, spec)
        writer.initialize()
        return writer

    def initialize(self) -> None:
        """Write the metadata of all arrays, still empty, and the settings; may be repeated."""
        for index in range(len(self.spec.levels)):
            make_folder(self.path / str(index))
            write_json(self.path / str(index) / "zarr.json", self._metadata(index))
        # last: a store with settings has all its arrays
        write_json(self.path / UNFINISHED, self.spec.to_json())
        sync_folder(self.path)

    @classmethod
    def open(cls, path: str | Path) -> "PyramidWriter":
        """Open an unfinished store for writing; also one whose `publish` was killed on the way.

        Raises:
            ReadError: there is none.
        """
        path = Path(path)
        if not (path / UNFINISHED).is_file():
            got = "a finished one" if (path / "zarr.json").exists() else "none"
            raise ReadError(path, expected="an unfinished OME-Zarr store", got=got)
        return cls(path, PyramidSpec.from_json(read_json(path / UNFINISHED)))

    def shards(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Start and size of every shard of the finest level, clipped to the image, in row-major order."""
        return blocks(self.spec.level_shape(0), self.spec.shard_shape(0))

    @property
    def num_coarse_shards(self) -> int:
        """Number of shards of all coarser levels: the steps of `finish`."""
        spec = self.spec
        return sum(
            math.prod(-(-n // s) for n, s in zip(spec.level_shape(i), spec.shard_shape(i), strict=True))
            for i in range(1, len(spec.levels))
        )

    def write(self, start: Sequence[int], block: np.ndarray[Any, Any]) -> None:
        """Write a block of the finest level; when this returns, it is on disk.

        Blocks that are whole shards (see `shards`; those at the border end with the image) are written in one go; for
        others the shard is read, changed and written again.

        Args:
            start: lower corner in pixels of the finest level.
            block: ``(C, *size)``, of the store's dtype, inside the image.

        Raises:
            InputError: the block does not fit the store.
        """
        spec = self.spec
        start = tuple(int(v) for v in start)
        subject = f"block at {start} for {self.path}"
        if (self.path / "zarr.json").exists():
            raise InputError(subject, expected="an unfinished store", got="a finished one")
        if block.dtype != np.dtype(spec.dtype):
            raise InputError(subject, expected=f"dtype {spec.dtype}", got=block.dtype)
        if block.ndim != len(spec.shape) + 1 or block.shape[0] != spec.num_channels or len(start) != len(spec.shape):
            expected = f"{spec.num_channels} channels and {len(spec.shape)} axes of space"
            raise InputError(subject, expected=expected, got=f"shape {block.shape}")
        stop = tuple(a + n for a, n in zip(start, block.shape[1:], strict=True))
        if not all(0 <= a < b <= n for a, b, n in zip(start, stop, spec.shape, strict=True)):
            raise InputError(subject, expected=f"a block inside the image {spec.shape}", got=f"{start} to {stop}")
        along = zip(start, stop, spec.shard_shape(0), spec.shape, strict=True)
        if all(a % edge == 0 and b == min(a + edge, n) for a, b, edge, n in along):
            self.write_shard(Shard(0, start, block.shape[1:]), block)
            return
        self.digests.clear()  # which shards it changes need not be known: those without a digest are read at the end
        self._window(0, start, stop).write(self._stored(block)).result()

    def write_shard(self, shard: Shard, block: np.ndarray[Any, Any]) -> ShardDigest:
        """Write one shard of any level; when this returns, it is on disk, and a kill before leaves it as it was.

        Args:
            shard: which one; see `shards` and `coarse_shards`.
            block: ``(C, *size)``, of the store's dtype. Equal blocks make equal files.
        """
        content = encode_shard(self._metadata(shard.number), self._stored(block))
        file = self.shard_file(shard)
        if content is not None:
            write_whole(file, content)
        elif file.exists():
            file.unlink()
            sync_folder(file.parent)
        self.digests[shard.number, shard.start] = ShardDigest.of(content)
        return ShardDigest.of(content)

    def shard_file(self, shard: Shard) -> Path:
        """File of a shard."""
        grid = [a // n for a, n in zip(shard.start, self.spec.shard_shape(shard.number), strict=True)]
        return shard_file(self.path / str(shard.number), self.spec.stored(grid, 0))

    def coarse_shards(self) -> Iterator[Shard]:
        """Every shard of the coarser levels, in an order in which each can be built from those before it."""
        for index in range(1, len(self.spec.levels)):
            for start, size in blocks(self.spec.level_shape(index), self.spec.shard_shape(index)):
                yield Shard(index, start, size)

    def build(self, shard: Shard) -> ShardDigest:
        """Make and write one shard of a coarser level; what it is made from (see `finish`) must be complete."""
        return self.write_shard(shard, self._reduced(*shard))

    def finish(self, progress: Progress | None = None, attributes: dict[str, Any] | None = None) -> None:
        """Build every coarser level, then make the store readable.

        A level of an image is the area mean of the level before (`muvit.data.pyramids.reduction.area_mean`), a level of
        labels the majority vote of the finest pixels (`muvit.data.pyramids.reduction.majority`). Memory stays bounded
        by a few shards. May be repeated after a crash.

        Args:
            progress: called after each of the `num_coarse_shards` steps.
            attributes: as of `publish`.
        """
        for done, shard in enumerate(self.coarse_shards(), start=1):
            self.build(shard)
            if progress is not None:
                progress(done, self.num_coarse_shards)
        self.publish(attributes)

    def publish(self, attributes: dict[str, Any] | None = None) -> None:
        """Make the store readable, all levels being complete. May be repeated after a crash.

        Args:
            attributes: further attributes of the store, beside those of OME; ``muvit`` gets the record of its shards.
        """
        for file in partial_files(self.path):  # of writers that were killed
            file.unlink()
        content = group_json(self._attributes())
        content["attributes"] |= attributes or {}
        content["attributes"]["muvit"] = {**content["attributes"].get("muvit", {}), "manifest": self._manifest()}
        write_json(self.path / "zarr.json", content)
        sync_folder(self.path)
        self.settle()

    def settle(self) -> None:
        """Remove the settings of a readable store and list it in its image, if it is a label. May be repeated."""
        (self.path / UNFINISHED).unlink(missing_ok=True)
        register_label(self.path)

    def _reduced(self, index: int, start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Window of a level computed from the level before, or of labels from the finest, piece by piece."""
        spec = self.spec
        source = index - 1 if spec.kind == "image" else 0
        factors = tuple(b // a for a, b in zip(spec.factors(source), spec.factors(index), strict=True))
        pixels = np.empty((spec.num_channels, *size), spec.dtype)
        reduce_window(
            lambda lower, upper: self._read(source, lower, upper),
            start,
            pixels,
            factors,
            spec.kind,
            extent=spec.level_shape(source),
            piece=self._piece(factors),
        )
        return pixels

    def _piece(self, factors: tuple[int, ...]) -> tuple[int, ...]:
        """Pixels along each axis that are reduced at once: whole chunks of the finer level, none decoded twice."""
        edges = []
        for factor in factors:
            edge = (_REDUCED_PIXELS / self.spec.num_channels) ** (1 / len(factors)) / factor
            whole = math.lcm(self.spec.chunk, factor) // factor
            edges.append(whole * round(edge / whole) if edge > whole else max(int(edge), 1))
        return tuple(edges)

    def _manifest(self) -> dict[str, Any]:
        """Record of all shards, as a JSON object."""
        levels = {}
        for index in range(len(self.spec.levels)):
            boxes = blocks(self.spec.level_shape(index), self.spec.shard_shape(index))
            digests = [
                self.digests.get((index, start)) or ShardDigest.on_disk(self.shard_file(Shard(index, start, size)))
                for start, size in boxes
            ]
            levels[str(index)] = LevelRecord.of(self._metadata(index), digests).to_json()
        return levels

    def _attributes(self) -> dict[str, Any]:
        spec = self.spec
        entry = multiscale_attributes(
            name=slide_name(self.path),
            axes=spec.stored_axes,
            levels=spec.levels,
            pixel_size_um=spec.pixel_size_um,
            kind=spec.kind,
        )
        if spec.kind == "label":
            legend = label_attributes(spec.label_names, spec.label_colors, has_background=spec.has_background)
            return {"multiscales": [entry], "image-label": legend}
        return {
            "multiscales": [entry],
            "omero": omero_attributes(spec.channel_names, np.dtype(spec.dtype), self._range()),
        }

    def _range(self) -> list[tuple[float, float]]:
        """Lowest and highest value of each channel at the coarsest level, or of at most a chunk of it."""
        last = len(self.spec.levels) - 1
        upper = tuple(min(n, 4 * self.spec.chunk) for n in self.spec.level_shape(last))
        flat = self._read(last, (0,) * len(upper), upper).reshape(self.spec.num_channels, -1)
        values = [channel[np.isfinite(channel)] for channel in flat]
        return [(float(v.min()), float(v.max())) if v.size else (0.0, 0.0) for v in values]

    def _stored(self, block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        axes = self.spec.stored_axes
        return np.moveaxis(block, 0, axes.index("c")) if "c" in axes else block[0]

    def _metadata(self, index: int) -> dict[str, Any]:
        spec = self.spec
        return sharded_metadata(
            shape=spec.stored(spec.level_shape(index), spec.num_channels),
            dtype=np.dtype(spec.dtype),
            axes=spec.stored_axes,
            chunk=spec.stored(spec.chunk_shape(index), spec.num_channels),
            shard=spec.stored(spec.shard_shape(index), spec.num_channels),
        )

    def _read(self, index: int, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        try:
            pixels = self._window(index, start, stop).read().result()
        except ValueError as error:  # raised by tensorstore for a wrong checksum
            raise ReadError(
                f"{self.path}, level {level_name(self.spec.levels[index])}, window {start} to {stop}",
                expected="the pixels that were written",
                got=first_line(error),
                hint="They were changed since: begin the output anew (--overwrite).",
            ) from error
        axes = self.spec.stored_axes
        return np.moveaxis(pixels, axes.index("c"), 0) if "c" in axes else pixels[None]

    def _window(self, index: int, start: tuple[int, ...], stop: tuple[int, ...]) -> Any:
        require_unforked(self.path)
        if index not in self._stores:
            self._stores[index] = open_store(self.path / str(index), {"driver": "zarr3"})
        window = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        return self._stores[index][self.spec.stored(window, slice(None))]


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Refuse to put a store in the place of something that may not be replaced.

    Raises:
        ExistsError: something is there and ``overwrite`` is False, or it is neither a zarr store nor an empty folder.
    """
    if not path.exists():
        return
    if not overwrite:
        raise ExistsError(path)
    is_store = any((path / name).is_file() for name in ("zarr.json", ".zgroup", UNFINISHED))
    if not is_store and not (path.is_dir() and not any(path.iterdir())):
        hint = "It is no OME-Zarr store, so not even overwriting replaces it: choose another output."
        raise ExistsError(path, hint=hint)
