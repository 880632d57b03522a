"""Whole-slide prediction: tiles with their context in, an OME-Zarr label pyramid out, in memory for one block."""

import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from muvit.data.crops import CropConfig, read_views
from muvit.data.ome_zarr import PyramidWriter
from muvit.data.preprocessing import Preprocessing
from muvit.data.pyramid_writer import check_replaceable
from muvit.data.slides import Slide
from muvit.errors import InputError, MuViTError
from muvit.geometry import level_factors
from muvit.inference.tiling import TilePlan, assemble
from muvit.segmentation import SegmentationModel

_LOG = logging.getLogger(__name__)

PIXEL_SIZE_TOLERANCE = 0.1
"""Largest relative difference of pixel size between training and slide that is taken for the same."""

Progress = Callable[[int, int], None]
"""Called with the number of tiles done and of all tiles."""

# a tile, or why it could not be read: torch rewraps what a worker process raises, and the message would drown in traces
TileViews = dict[str, Any] | MuViTError


def predict_slide(
    model: SegmentationModel,
    slide: Slide,
    output: Path | str,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Label every pixel of a slide and write the labels as an OME-Zarr pyramid.

    The labels have the pixels of the model's finest level, the class names and colours of ``preprocessing``, and the
    pixel size of the slide. They depend neither on ``batch_size`` nor on ``num_workers``. On CUDA the model runs under
    bfloat16 autocast, elsewhere in its own precision. The store is readable when it is complete; if anything fails on
    the way, it is removed.

    Args:
        model: takes the slide's channels and levels; it is moved to ``device``, and back when done.
        slide: the image; it must store every level of the model.
        output: folder of the label image to create, by custom named ``*.ome.zarr``; inside the ``labels`` folder of an
            OME-Zarr image it becomes one of that image's labels.
        preprocessing: how the model saw crops in training, and what its classes are.
        batch_size: tiles per forward pass.
        device: where to run; by default CUDA if there is any, else the CPU.
        num_workers: processes that read tiles ahead of the device; 0 reads in between. They are spawned, so a script
            must guard its own start by ``if __name__ == "__main__"``.
        overwrite: replace a store at ``output``.
        progress: called after each batch.

    Returns:
        ``output``.

    Raises:
        InputError: model, slide and preprocessing do not fit each other, or a weight is NaN or infinite. All of this is
            found before anything is written.
        ExistsError: ``output`` exists and ``overwrite`` is false.
        ReadError: pixels of the slide are corrupt; names file, level and window.
    """
    output, target = Path(output), resolve_device(device)
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise InputError(name, expected=f"at least {least}", got=value)
    _check_output(output, slide, overwrite)
    _check_model(model, preprocessing)
    tiles = SlideTiles(model, slide, preprocessing)
    tiles.check()
    num_classes, finest = model.num_classes, level_factors(tiles.plan.levels[0], slide.ndim)
    sizes = slide.pixel_size_um
    writer = PyramidWriter.create(
        output,
        shape=tiles.plan.shape,
        num_channels=1,
        dtype=np.uint8 if num_classes <= 256 else np.uint16,
        kind="label",
        pixel_size_um=None if sizes is None else [size * f for size, f in zip(sizes, finest, strict=True)],
        label_names=dict(enumerate(preprocessing.class_names)),
        # a viewer that lays labels over the image must leave the background clear
        label_colors={i: (*rgb, 255 if i else 0) for i, rgb in enumerate(preprocessing.class_colors)},
        overwrite=overwrite,
    )
    try:
        tiles.plan = replace(tiles.plan, block_size=writer.spec.shard_shape(0))
        with _ready(model, target):
            labels = _predict_tiles(model, tiles, target, batch_size, num_workers, progress)
            for block, pixels in assemble(tiles.plan, labels, writer.spec.dtype):
                writer.write(block.start, pixels[None])
        writer.finish()
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    _LOG.info("labelled %s: %d tiles on %s, written to %s", slide.path, len(tiles), target, output)
    return output


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device of this name, or by default CUDA if there is any, else the CPU.

    Raises:
        InputError: this machine has no such device, or torch knows none of this name.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InputError("device", expected="a device of this machine", got=f"{device!r} ({reason})") from error


class SlideTiles(Dataset[TileViews]):
    """The tiles of one slide as a model sees them, numbered as in the plan.

    An item is ``{"tile": number, "img": (L, C, *space), "bbox": (L, 2, ndim)}``, or the error that reading met.

    Args:
        model: gives the levels.
        slide: the image.
        preprocessing: crop size, padding and normalisation.
    """

    def __init__(self, model: SegmentationModel, slide: Slide, preprocessing: Preprocessing) -> None:
        views, crop = model.views, preprocessing.crop_size
        if slide.ndim != views.ndim:
            raise InputError(
                slide.path, expected=f"{views.ndim} spatial axes, as the model has", got=f"shape {slide.shape}"
            )
        if slide.num_channels != views.in_channels:
            got = f"{slide.num_channels}: {', '.join(slide.channel_names)}"
            raise InputError(f"channels of {slide.path}", expected=f"{views.in_channels}, as the model has", got=got)
        _check_pixel_size(slide, preprocessing)
        self.slide = slide
        shapes = tuple(slide.level_shape(level) for level in views.levels)
        self.plan = TilePlan(shapes=shapes, levels=views.levels, crop_size=crop, block_size=shapes[0])
        self.config = CropConfig(
            levels=views.levels,
            size=crop,
            normalization=preprocessing.normalization,
            padding=preprocessing.padding,
        )

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> TileViews:
        try:
            return {"tile": number, **read_views(self.slide, self.plan.tile(number).windows, self.config)}
        except MuViTError as error:
            return error

    def check(self) -> None:
        """Read the first tile, which shows whether pixels can be read and normalised at all.

        Raises:
            MuViTError: they cannot.
        """
        first = self[0]
        if isinstance(first, MuViTError):
            raise first


def _predict_tiles(
    model: SegmentationModel,
    tiles: SlideTiles,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    progress: Progress | None,
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Number and labels ``(*crop_size)`` of every tile, in the plan's order."""
    loader = DataLoader(
        tiles,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        # a forked process would share CUDA and the store's threads, which neither of them survives
        multiprocessing_context=multiprocessing.get_context("spawn") if num_workers else None,
    )
    done = 0
    for batch in loader:
        if isinstance(batch, MuViTError):
            raise batch
        img, bbox = (batch[name].to(device, non_blocking=True) for name in ("img", "bbox"))
        yield from zip(batch["tile"].tolist(), _label(model, img, bbox).cpu().numpy(), strict=True)
        done += len(img)
        if progress is not None:
            progress(done, len(tiles))


@torch.inference_mode()
def _label(model: SegmentationModel, img: Tensor, bbox: Tensor) -> Tensor:
    """Most likely class of each pixel of the finest views, integers ``(B, *space)``."""
    with torch.autocast(img.device.type, torch.bfloat16, enabled=img.device.type == "cuda"):
        logits = model.label_logits(img, bbox)
    classes = logits.argmax(dim=1)
    return classes.to(torch.uint8 if logits.shape[1] <= 256 else torch.int32)


def _collate(items: list[TileViews]) -> Any:
    errors = [item for item in items if isinstance(item, MuViTError)]
    return errors[0] if errors else default_collate(items)


@contextmanager
def _ready(model: SegmentationModel, device: torch.device) -> Iterator[None]:
    """Put a model on a device and into evaluation; as it was, afterwards."""
    modes = {module: module.training for module in model.modules()}
    home = next(model.parameters()).device
    try:
        model.to(device).eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        model.to(home)


def _check_output(output: Path, slide: Slide, overwrite: bool) -> None:
    check_replaceable(output, overwrite)
    if slide.path.resolve().is_relative_to(output.resolve()):
        raise InputError("output", expected="a folder that does not hold the image", got=output)


def _check_model(model: SegmentationModel, preprocessing: Preprocessing) -> None:
    model.views.check_size(preprocessing.crop_size)
    if len(preprocessing.class_names) != model.num_classes:
        raise InputError(
            "class_names",
            expected=f"one for each of the model's {model.num_classes} classes",
            got=preprocessing.class_names,
        )
    for name, weight in model.state_dict().items():
        if not torch.isfinite(weight).all():
            raise InputError(f"weights of the model, {name}", expected="finite numbers", got="NaN or infinity")


def _check_pixel_size(slide: Slide, preprocessing: Preprocessing) -> None:
    trained, own = preprocessing.pixel_size_um, slide.pixel_size_um
    if trained is None or own is None:
        return
    if len(trained) != len(own) or not np.allclose(own, trained, rtol=PIXEL_SIZE_TOLERANCE, atol=0):
        raise InputError(
            f"pixel size of {slide.path}",
            expected=f"{trained} um, as in training (within {PIXEL_SIZE_TOLERANCE:.0%})",
            got=f"{own} um",
            hint="Resample the image, or remove pixel_size_um from preprocessing.yaml to go without this check.",
        )
