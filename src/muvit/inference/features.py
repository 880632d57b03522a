"""Token features of a whole slide: for each level an OME-Zarr image with a pixel per patch, and a table of tile means.

Like a prediction, the features are made by a plan, block by block, and noted in a ledger when they are on disk, so that
a run that was killed goes on where it stopped and makes the same bytes.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.inference.inputs import prepare_slide
from muvit.inference.predict import resolve_device
from muvit.inference.run.blocks import ready
from muvit.inference.run.context import ContextMemory, grouped, ungrouped
from muvit.inference.run.feature_plan import FeaturePlan, FeatureType, LevelFeatures, plan_features
from muvit.inference.run.feature_store import FeatureOutput
from muvit.inference.run.lock import OutputLock
from muvit.inference.run.reading import SlideTiles, read_tiles
from muvit.inference.run.resume import clear_work, is_made_by, is_published
from muvit.levels import Level
from muvit.models.context import encode_context
from muvit.models.encoder import MuViTEncoder
from muvit.models.segmentation_model import encoder_views
from muvit.progress import Progress

_LOG = logging.getLogger(__name__)


def extract_features(
    encoder: MuViTEncoder,
    slide: Slide,
    output: Path | str,
    preprocessing: Preprocessing,
    *,
    levels: Sequence[Level] | None = None,
    dtype: FeatureType = "float16",
    batch_size: int = 8,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the encoder's last tokens for every patch of a slide.

    Each level is tiled by itself, without overlap; a tile is encoded together with one crop of every other level, the
    coarser ones around it and the finer ones in its middle. An encoder that attends ``coarse_to_fine`` needs no finer
    ones, and encodes coarse crops once for all tiles inside them.

    ``output`` receives an OME-Zarr image ``level_<level>`` ``(D, *patches)`` for each level, in which pixel *i* covers
    the world from ``i * patch * level`` on; and ``pooled.csv``, a row for each tile: its level, its world box clipped
    to the image (lower corner, then upper corner, (z)yx), and the mean of its features.

    Args:
        encoder: takes the slide's channels and levels; it is moved to ``device``, and back when done.
        slide: the image; levels of the encoder that it does not store are computed from those that it does.
        output: folder to create, by custom named ``*.zarr``.
        preprocessing: crop size, normalisation and padding, as in training.
        levels: those whose features to write, out of the encoder's; unset, all.
        dtype: of the stored features.
        batch_size: tiles per forward pass.
        device: where to run; by default CUDA (under bfloat16 autocast) if there is any, else the CPU.
        num_workers: processes that read tiles ahead of the device; 0 reads in between.
        overwrite: replace what is at ``output``, complete or not.
        progress: called after each block.

    Returns:
        ``output``.

    Raises:
        InputError: encoder, slide, preprocessing and options do not fit each other, or other features were begun at
            ``output``, or somebody else is writing it. All of this is found before anything is written.
        ExistsError: something else is at ``output``, and ``overwrite`` is false.
        ReadError: pixels of the slide are corrupt; names file, level and window.
    """
    plan = plan_extraction(
        encoder, slide, output, preprocessing, levels=levels, dtype=dtype, device=device, overwrite=overwrite
    )
    run_extraction(
        plan,
        encoder,
        slide,
        output,
        batch_size=batch_size,
        device=device,
        num_workers=num_workers,
        overwrite=overwrite,
        progress=progress,
    )
    return Path(output)


def plan_extraction(
    encoder: MuViTEncoder,
    slide: Slide,
    output: Path | str,
    preprocessing: Preprocessing,
    *,
    levels: Sequence[Level] | None = None,
    dtype: FeatureType = "float16",
    device: str | torch.device | None = None,
    overwrite: bool = False,
) -> FeaturePlan:
    """The first half of `extract_features`: everything is checked, and nothing is written."""
    target = resolve_device(device)
    slide = prepare_slide(encoder_views(encoder.config), slide, preprocessing)
    plan = plan_features(encoder, slide, preprocessing, levels=levels, dtype=dtype, device=target)
    if overwrite or not is_published(Path(output), plan.to_json()):
        FeatureOutput(Path(output), plan).check(overwrite=overwrite)
    return plan


def run_extraction(
    plan: FeaturePlan,
    encoder: MuViTEncoder,
    slide: Slide,
    output: Path | str,
    *,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """The second half of `extract_features`: does what `plan_extraction` has planned, or what is left of it."""
    output, target = Path(output), resolve_device(device)
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise InputError(name, expected=f"at least {least}", got=value)
    slide = prepare_slide(encoder_views(encoder.config), slide, plan.preprocessing)
    made = FeatureOutput(output, plan)
    if is_made_by(output, plan.to_json()) and not overwrite:
        return
    is_complete = is_published(output, plan.to_json()) and not overwrite
    with OutputLock(output).require():
        if is_complete:  # but its run was killed just before its end
            clear_work(output)
            return
        made.begin(overwrite=overwrite)
        missing = [(features, made.missing_blocks(features)) for features in plan.levels]
        total = sum(f.tiling.num_computed(block) for f in plan.levels for block in range(f.tiling.num_blocks))
        done = total - sum(f.tiling.num_computed(block) for f, blocks in missing for block in blocks)
        with made.ledger() as ledger, ready(encoder, target):
            for features, blocks in missing:
                for block, values in _make_blocks(
                    encoder, slide, plan, features, blocks, target, batch_size, num_workers
                ):
                    ledger.record(*made.write_block(features, block, values))
                    done += features.tiling.num_computed(block)
                    if progress is not None:
                        progress(done, total)
        made.finish()
    _LOG.info("features of %s on %s, written to %s", slide.path, target, output)


def _make_blocks(
    encoder: MuViTEncoder,
    slide: Slide,
    plan: FeaturePlan,
    features: LevelFeatures,
    blocks: Sequence[int],
    device: torch.device,
    batch_size: int,
    num_workers: int,
) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """Number and features ``(D, *patches)`` of each block; nothing is remembered from one block to the next."""
    tiling = features.tiling
    finer = () if plan.shares_contexts else encoder.levels[: features.index]
    batches = read_tiles(
        SlideTiles(slide, tiling, plan.preprocessing, finer=finer),
        [
            tiles[first : first + batch_size]
            for tiles in map(tiling.computed_tiles, blocks)
            for first in range(0, len(tiles), batch_size)
        ],
        device=device,
        num_workers=num_workers,
    )
    for number in blocks:
        block, shard, missing = tiling.block(number), features.shard(number), tiling.num_computed(number)
        memory = ContextMemory(encoder) if plan.shares_contexts else None
        pixels = np.zeros((features.store.num_channels, *shard.size), features.store.dtype)
        while missing:
            batch = next(batches)
            maps = _encode(encoder, plan, features, batch, memory, device)
            for tile, values in zip(map(tiling.tile, batch["tile"].tolist()), maps, strict=True):
                source, place = (_patches(part, features.patch) for part in (tile.source, tile.target(block)))
                with np.errstate(over="ignore"):  # what is too large is found below
                    pixels[(slice(None), *place)] = values[(slice(None), *source)]
            missing -= len(maps)
        if not np.isfinite(pixels).all():
            raise InputError(
                f"features in {features.folder} at {block.start}",
                expected=f"finite numbers of {pixels.dtype}",
                got="NaN or infinity",
                hint="Store them as float32 (--dtype float32), or look at the pixels there.",
            )
        yield number, pixels


@torch.inference_mode()
def _encode(
    encoder: MuViTEncoder,
    plan: FeaturePlan,
    features: LevelFeatures,
    batch: dict[str, Tensor],
    memory: ContextMemory | None,
    device: torch.device,
) -> np.ndarray[Any, Any]:
    """Tokens of the tiles of a batch as maps ``(B, D, *grid)``."""
    img, bbox = (batch[name].to(device, non_blocking=True) for name in ("img", "bbox"))
    with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bfloat16"):
        if memory is not None:
            tiles = [features.tiling.tile(number).windows for number in batch["tile"].tolist()]
            groups, parts = grouped(windows[1:] for windows in tiles), []
            for coarse, of in groups.items():
                context = memory.context(img[of[:1], 1:], bbox[of[:1], 1:], coarse)
                parts.append(encode_context(encoder, img[of, :1], bbox[of, :1], context).tokens)
            tokens = ungrouped(parts, groups.values())
        elif features.index == 0:
            tokens = encoder.encode(img, bbox, only_finest=True).tokens
        else:
            tokens = encoder(img, bbox)[0].unflatten(1, (len(encoder.levels), -1))[:, features.index]
    maps: np.ndarray[Any, Any] = encoder.to_maps(tokens, img.shape[3:])[:, 0].float().cpu().numpy()
    return maps


def _patches(part: Sequence[slice], patch: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(along.start // p, along.stop // p) for along, p in zip(part, patch, strict=True))
