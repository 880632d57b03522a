"""Writing a drawn data set: folders of images and labels for training, validation and test, whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muvit.data.pyramids.ngff import Color
from muvit.data.pyramids.spec import WholeLevel
from muvit.data.pyramids.writer import PyramidWriter
from muvit.errors import ExistsError, InputError

RECORD_NAME = "synthetic.json"
"""Written last into the folder of a data set: how it was made."""

GREY_LEVELS_PER_UNIT = 160
"""Stored uint8 = image x 160, saturating at 1.59."""

Pixels = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Store:
    """How drawn images and labels are stored."""

    levels: tuple[WholeLevel, ...]
    """Downsampling factors."""
    label_names: dict[int, str]
    """Name of each class."""
    label_colors: dict[int, Color]
    """Red, green, blue, alpha of each class."""
    pixel_size_um: tuple[float, ...] | None = None
    """Micrometers per pixel along each axis."""


def write_drawn(
    folder: Path | str,
    draw: Callable[[int], tuple[Pixels, Pixels]],
    store: Store,
    counts: Sequence[int],
    record: dict[str, Any],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draw and store a data set: the first indices train, the next validate, the last test.

    Writes ``folder/{train,val,test}/{images,labels}/<index>.ome.zarr``, images as uint8 (see `GREY_LEVELS_PER_UNIT`),
    and at last ``folder/synthetic.json``. Everything is written beside ``folder`` and moved when complete, so a run
    that fails or is interrupted leaves nothing behind.

    Args:
        folder: where to write.
        draw: image, float ``(*space)`` from 0 to about 1, and label, uint8 ``(*space)``, of an index.
        store: how they are stored.
        counts: images for training, validation and test.
        record: how the data set was made, for ``synthetic.json``.
        overwrite: replace a data set that stands in ``folder``; other files in it stay.
        progress: called with (images done, images in all) after each image.

    Returns:
        The folder.

    Raises:
        InputError: a count is negative, or all are 0.
        ExistsError: ``folder`` exists and is not empty, and ``overwrite`` is false.
    """
    if min(counts) < 0 or sum(counts) == 0:
        raise InputError("images to train, val, test", expected="0 or more, at least one in all", got=tuple(counts))
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise ExistsError(folder)
    edges = np.cumsum([0, *counts]).tolist()
    indices = {split: range(*edges[n : n + 2]) for n, split in enumerate(("train", "val", "test"))}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        for split, chosen in indices.items():
            for kind in ("images", "labels"):
                (Path(staging) / split / kind).mkdir(parents=True)
            for index in chosen:
                _write_pair(Path(staging) / split, index, *draw(index), store)
                if progress is not None:
                    progress(index + 1, edges[-1])
        folder.mkdir(exist_ok=True)
        (folder / RECORD_NAME).unlink(missing_ok=True)
        for split in indices:
            shutil.rmtree(folder / split, ignore_errors=True)
            (Path(staging) / split).replace(folder / split)
    described = {"indices": {split: [chosen.start, chosen.stop] for split, chosen in indices.items()}}
    (folder / RECORD_NAME).write_text(json.dumps(record | described, indent=2) + "\n")
    return folder


def _write_pair(split: Path, index: int, image: Pixels, label: Pixels, store: Store) -> None:
    grey = np.clip(np.rint(image * GREY_LEVELS_PER_UNIT), 0, 255).astype(np.uint8)
    names: dict[str, Any] = {"label_names": store.label_names, "label_colors": store.label_colors}
    for kind, pixels, options in (("image", grey, {"channel_names": ("cells",)}), ("label", label, names)):
        writer = PyramidWriter.create(
            split / f"{kind}s" / f"{index:05d}.ome.zarr",
            shape=pixels.shape,
            num_channels=1,
            dtype=np.uint8,
            levels=store.levels,
            kind=kind,  # type: ignore[arg-type]
            pixel_size_um=store.pixel_size_um,
            **options,
        )
        writer.write((0,) * pixels.ndim, pixels[None])
        writer.finish()
