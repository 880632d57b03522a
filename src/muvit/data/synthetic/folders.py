"""Folders of drawn images and labels for training, validation and test: the one way to write a generated data set."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from muvit.data.pyramids.ngff import Color
from muvit.data.pyramids.spec import WholeLevel
from muvit.data.pyramids.writer import PyramidWriter
from muvit.durable import scratch_folder, swap_in, without_flushing, write_whole
from muvit.errors import ExistsError, InputError
from muvit.progress import Progress
from muvit.workers import without_interrupts, worker_pool

RECORD_NAME = "synthetic.json"
"""Written last into the folder of a data set: how it was made."""

GREY_LEVELS_PER_UNIT = 160
"""Stored uint8 = image x 160, saturating at 1.59, which no cell reaches.

One grey level is 1/6 of the noise's standard deviation, so nothing is lost against float16 at half its size.
"""

Pixels = NDArray[Any]

Draw = Callable[[int], tuple[Pixels | list[Pixels], Pixels]]
"""From an index to an image, float ``(*space)`` from 0 to about 1, and its label, uint8 ``(*space)``.

An image may be a list of all levels of the store, finest first; else the coarser ones are its area means.
"""


@dataclass(frozen=True, kw_only=True)
class Store:
    """Storage of drawn images and labels."""

    levels: tuple[WholeLevel, ...]
    """Downsampling factors."""
    label_names: dict[int, str]
    """Name of each class."""
    label_colors: dict[int, Color]
    """Red, green, blue, alpha of each class."""
    pixel_size_um: tuple[float, ...] | None = None
    """Micrometers per pixel along each axis."""


def split_indices(num_train: int, num_val: int, num_test: int) -> dict[str, range]:
    """Indices of the images of each split: the first train, the next validate, the last test.

    Raises:
        InputError: a count is negative, or all are 0.
    """
    counts = {"train": num_train, "val": num_val, "test": num_test}
    for split, count in counts.items():
        if count < 0:
            raise InputError(f"num_{split}", expected="0 or more", got=count)
    if sum(counts.values()) == 0:
        raise InputError("num_train, num_val, num_test", expected="at least one image", got="0 of each")
    edges = np.cumsum([0, *counts.values()]).tolist()
    return {split: range(*edges[n : n + 2]) for n, split in enumerate(counts)}


def describe(indices: dict[str, range], config: Any, **more: str) -> dict[str, Any]:
    """The record of a data set as JSON: its indices, the dataclass that its images were drawn from, and ``more``."""
    return {
        **more,
        "indices": {split: [chosen.start, chosen.stop] for split, chosen in indices.items()},
        "grey_levels_per_unit": GREY_LEVELS_PER_UNIT,
        "config": asdict(config),
    }


def write_data_set(
    folder: Path | str,
    draw: Draw,
    store: Store,
    indices: dict[str, range],
    record: dict[str, Any],
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Draw and store a data set.

    Writes ``folder/{train,val,test}/{images,labels}/<index>.ome.zarr``, images as uint8 (see `GREY_LEVELS_PER_UNIT`),
    and at last ``folder/synthetic.json``. Everything is written beside ``folder`` and moved when complete, so a run
    that fails or is interrupted leaves nothing behind.

    Args:
        folder: where to write.
        draw: draws image and label of an index; with several workers it must be picklable.
        store: how they are stored.
        indices: of the images of each split, as `split_indices` gives them.
        record: how the data set was made, for ``synthetic.json``.
        workers: number of processes, as of `write_pairs`.
        overwrite: replace a data set that is in ``folder``; other files in it stay.
        progress: called with the number of images done and of all after each image.

    Returns:
        The folder.

    Raises:
        InputError: ``workers`` is not positive.
        ExistsError: ``folder`` exists and is not empty, and ``overwrite`` is false.
    """
    workers, folder = _checked_workers(workers), Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise ExistsError(folder)
    with scratch_folder(folder) as scratch:
        for split in indices:
            for kind in ("images", "labels"):
                (scratch / split / kind).mkdir(parents=True)
        jobs = [(index, scratch / split) for split, chosen in indices.items() for index in chosen]
        write_pairs(jobs, draw, store, workers=workers, flush_each=False, progress=progress)
        folder.mkdir(exist_ok=True)
        (folder / RECORD_NAME).unlink(missing_ok=True)
        for split in indices:
            swap_in(scratch / split, folder / split, overwrite=True)
    write_whole(folder / RECORD_NAME, (json.dumps(record, indent=2) + "\n").encode())
    return folder


def write_pairs(
    jobs: Sequence[tuple[int, Path]],
    draw: Draw,
    store: Store,
    *,
    workers: int | None = None,
    flush_each: bool = True,
    progress: Progress | None = None,
) -> None:
    """Draw images and store each with its label as ``{images,labels}/<index>.ome.zarr`` below its folder.

    Args:
        jobs: index of each image, and its folder.
        draw: draws image and label of an index; with several workers it must be picklable.
        store: how they are stored.
        workers: number of processes, by default one per CPU core. They are spawned, so a script that calls this with
            more than one must guard its own start by ``if __name__ == "__main__"``.
        flush_each: have each image on disk before the next; false leaves that to the caller.
        progress: called with the number of images done and of all after each image.

    Raises:
        InputError: ``workers`` is not positive.
    """
    write = partial(_write_pair, draw=draw, store=store, flush_each=flush_each)
    with _mapping(min(_checked_workers(workers), len(jobs))) as apply:
        for done, _ in enumerate(apply(write, jobs), start=1):
            if progress is not None:
                progress(done, len(jobs))


@contextmanager
def _mapping(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A ``map`` over so many processes, or in this one."""
    if workers <= 1:
        yield map
        return
    with worker_pool(workers) as pool:

        def apply(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
            with without_interrupts():
                return pool.map(function, jobs)

        yield apply


def _checked_workers(workers: int | None) -> int:
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise InputError("workers", expected="1 or more", got=workers)
    return workers


def _write_pair(job: tuple[int, Path], draw: Draw, store: Store, flush_each: bool) -> None:
    index, folder = job
    image, label = draw(index)
    levels = [_grey(level) for level in image] if isinstance(image, list) else [_grey(image)]
    names: dict[str, Any] = {"label_names": store.label_names, "label_colors": store.label_colors}
    with nullcontext() if flush_each else without_flushing():
        _write(folder / "images" / f"{index:05d}.ome.zarr", levels, "image", store, channel_names=("cells",))
        _write(folder / "labels" / f"{index:05d}.ome.zarr", [label], "label", store, **names)


def _grey(image: Pixels) -> Pixels:
    return np.clip(np.rint(image * GREY_LEVELS_PER_UNIT), 0, 255).astype(np.uint8)


def _write(path: Path, levels: list[Pixels], kind: Literal["image", "label"], store: Store, **names: Any) -> None:
    """Write a store of these levels; those that are not given are made from the finest."""
    shape = levels[0].shape
    writer = PyramidWriter.create(
        path,
        shape=shape,
        num_channels=1,
        dtype=np.uint8,
        levels=store.levels,
        kind=kind,
        pixel_size_um=store.pixel_size_um,
        **names,
    )
    writer.write((0,) * len(shape), levels[0][None])
    if len(levels) == 1:
        writer.finish()
        return
    for shard in writer.coarse_shards():
        window = tuple(slice(a, a + n) for a, n in zip(shard.start, shard.size, strict=True))
        writer.write_shard(shard, levels[shard.number][None, *window])
    writer.publish()
