"""Conversion of images and label masks of any readable format to pyramids, in bounded memory."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from muvit.data.pyramids.exchange import Format, write_ome_tiff, write_zarr_04
from muvit.data.pyramids.ngff import Color, Kind, register_label
from muvit.data.pyramids.spec import WholeLevel, check_spec
from muvit.data.pyramids.writer import PyramidWriter, check_replaceable
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Palette, Slide
from muvit.durable import make_folder, scratch_folder, swap_in
from muvit.errors import ExistsError, InputError
from muvit.progress import Progress

_LOG = logging.getLogger(__name__)
_BAND_BYTES = 256 << 20


def convert_image(
    source: str | Path | Slide,
    target: str | Path,
    *,
    kind: Kind = "image",
    format: Format = "ome-zarr-0.5",
    levels: Sequence[WholeLevel] | None = None,
    pixel_size_um: float | Sequence[float] | None = None,
    channel_names: Sequence[str] | None = None,
    label_names: dict[int, str] | None = None,
    label_colors: dict[int, Color] | None = None,
    has_background: bool | None = None,
    nonfinite: Literal["error", "ignore"] = "error",
    attributes: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert an image to a pyramid.

    Reads and writes bands of whole shards, so memory stays at some hundred MiB for images of any size (PNG and JPEG
    files are decoded whole on top of that). The pyramid is built beside ``target`` and takes its place when complete: a
    conversion that fails or is killed leaves ``target`` as it was. A killed one also leaves a folder
    ``.<target>.*.partial`` beside it, which the next conversion to ``target`` removes. Other formats than OME-Zarr 0.5
    are written from such a pyramid, which takes its space in that folder for the time.

    Args:
        source: anything that `open_slide` reads, or a slide; its finest level is converted.
        target: folder to make, conventionally named ``*.ome.zarr``; the file, ``*.ome.tif``, for OME-TIFF.
        format: ``ome-zarr-0.5``, this package's own; ``ome-zarr-0.4`` or ``ome-tiff`` for other software.
        kind: ``image``, coarsened by area mean, or ``label``, coarsened by majority vote. Labels are integers in one
            channel; a colour table is ignored, its indices are the labels.
        levels: downsampling factors from 1 up, each a multiple of the one before, such as 4 or, where the axes differ,
            (1, 4, 4); by default powers of two.
        pixel_size_um: micrometers per pixel, one number or one per axis; by default what the source states.
        channel_names: one per channel; by default what the source states.
        label_names: name of each label value; by default what the source states.
        label_colors: (red, green, blue) or (red, green, blue, alpha) of each label value; by default the source's.
        has_background: whether label 0 is background; by default what the source states.
        nonfinite: pixels that are NaN or infinite are refused (``error``), or stored as they are and left out of the
            means of coarser levels (``ignore``).
        attributes: as of `PyramidWriter.publish`, for a store of OME-Zarr 0.5.
        overwrite: replace a store that is at ``target``.
        progress: called with the number of steps done and their total.

    Returns:
        ``target``.

    Raises:
        ReadError: the source cannot be read.
        InputError: an argument or the source does not fit.
        ExistsError: something is at ``target`` and overwriting was not asked for, or it is no zarr store.
    """
    target = Path(target)
    palette: Palette = "index" if kind == "label" else "rgb"
    slide = source if isinstance(source, Slide) else open_slide(source, palette=palette)
    if kind == "label":
        _check_label_source(slide)
    spec = check_spec(
        shape=slide.shape,
        num_channels=slide.num_channels,
        dtype=slide.dtype,
        axes=slide.axes,
        levels=levels,
        kind=kind,
        pixel_size_um=slide.pixel_size_um if pixel_size_um is None else pixel_size_um,
        channel_names=slide.channel_names if channel_names is None else channel_names,
        label_names=slide.label_names if label_names is None else label_names,
        label_colors=slide.label_colors if label_colors is None else label_colors,
        has_background=slide.has_background if has_background is None else has_background,
    )
    if format == "ome-tiff":
        if target.exists() and (not overwrite or target.is_dir()):
            raise ExistsError(target)
    else:
        check_replaceable(target, overwrite)
    # pixels that cannot be read at all are found before anything is written
    slide.read(1, (0,) * slide.ndim, tuple(min(n, 16) for n in slide.shape))
    with scratch_folder(target) as scratch:
        fresh = scratch / target.name  # the store is named as its target, which its metadata mention
        writer = PyramidWriter.create_from(fresh, spec)
        num_missing = _copy(slide, writer, nonfinite, progress, attributes)
        if format == "ome-zarr-0.5":
            swap_in(fresh, target, overwrite=overwrite)
        elif format == "ome-zarr-0.4":
            write_zarr_04(fresh, scratch / "0.4" / target.name, progress)
            swap_in(scratch / "0.4" / target.name, target, overwrite=overwrite)
        else:
            write_ome_tiff(fresh, scratch / "file", progress)
            make_folder(target.parent)
            (scratch / "file").replace(target)
    if format != "ome-tiff":
        register_label(target)
    if num_missing:
        _LOG.warning("%s: %d values that are NaN or infinite", target, num_missing)
    return target


def _check_label_source(slide: Slide) -> None:
    if slide.path.suffix.lower() in (".jpg", ".jpeg"):
        raise InputError(
            slide.path,
            expected="labels in a lossless format",
            got="a JPEG, whose compression changes label values",
            hint="Threshold it and save it as PNG or TIFF.",
        )
    if slide.num_channels != 1:
        raise InputError(
            slide.path,
            expected="labels in one channel",
            got=f"{slide.num_channels} channels ({', '.join(slide.channel_names)})",
            hint="Save the mask as a grey or palette image whose values are the labels.",
        )
    if slide.dtype.kind not in "iu":
        raise InputError(slide.path, expected="labels of an integer dtype", got=slide.dtype)


def _copy(
    slide: Slide,
    writer: PyramidWriter,
    nonfinite: str,
    progress: Progress | None,
    attributes: dict[str, Any] | None,
) -> int:
    """Write all levels; the number of values of the finest that are NaN or infinite."""
    bands, num_missing = list(_bands(writer)), 0
    total = len(bands) + writer.num_coarse_shards
    for done, (start, size) in enumerate(bands, start=1):
        num_missing += _copy_band(slide, writer, start, size, nonfinite)
        if progress is not None:
            progress(done, total)
    writer.finish(None if progress is None else lambda done, _: progress(len(bands) + done, total), attributes)
    return num_missing


def _copy_band(
    slide: Slide, writer: PyramidWriter, start: tuple[int, ...], size: tuple[int, ...], nonfinite: str
) -> int:
    band = slide.read(1, start, size)
    missing = np.argwhere(~np.isfinite(band)) if band.dtype.kind == "f" else np.empty((0, band.ndim), np.intp)
    if len(missing) and nonfinite == "error":
        place = [int(a + b) for a, b in zip(start, missing[0][1:], strict=True)]
        hint = "Mend them, or pass nonfinite ignore (--nonfinite ignore)."
        raise InputError(slide.path, expected="finite pixels", got=f"NaN or infinity at {place}", hint=hint)
    width = writer.spec.shard_shape(0)[-1]
    for column in range(0, size[-1], width):
        writer.write((*start[:-1], start[-1] + column), band[..., column : column + width])
    return len(missing)


def _bands(writer: PyramidWriter) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Rows of neighbouring shards, as long as memory allows: strips of a TIFF run along whole rows."""
    spec = writer.spec
    shard = spec.shard_shape(0)
    fitting = max(_BAND_BYTES // spec.num_bytes(shard), 1) * shard[-1]
    for start, size in writer.shards():
        if start[-1] % fitting == 0:
            yield start, (*size[:-1], min(fitting, spec.shape[-1] - start[-1]))
