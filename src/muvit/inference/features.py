"""Token features of a whole slide: for each level an OME-Zarr image with a pixel per patch, and a table of tile means.

Features are made like a prediction: by a plan, block by block, recorded in a ledger, and resumed after a crash.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.slide import Slide
from muvit.inference.inputs import check_target, prepare_slide
from muvit.inference.run.blocks import Job
from muvit.inference.run.engine import run_job
from muvit.inference.run.execution import Execution
from muvit.inference.run.feature_blocks import FeatureStore, encode_blocks
from muvit.inference.run.planning import FeatureType, plan_features
from muvit.levels import Level
from muvit.models.encoder import MuViTEncoder
from muvit.models.folder import FolderModel
from muvit.models.segmentation_model import encoder_views
from muvit.models.trained import TrainedModel, as_trained, encoder_of
from muvit.progress import Progress

_LOG = logging.getLogger(__name__)


def extract_features(
    encoder: MuViTEncoder | TrainedModel[Any],
    slide: Slide,
    output: Path | str,
    preprocessing: Preprocessing | None = None,
    *,
    levels: Sequence[Level] | None = None,
    dtype: FeatureType = "float16",
    batch_size: int = 8,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    execution: Execution | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the encoder's last tokens for every patch of a slide.

    Each level is tiled by itself, without overlap; a tile is encoded together with one crop of every other level,
    coarser crops around it and finer ones at its centre. An encoder that attends ``coarse_to_fine`` needs no finer
    ones, and encodes coarse crops once for all tiles inside them.

    ``output`` receives an OME-Zarr image ``level_<level>`` ``(D, *patches)`` for each level, in which pixel *i* covers
    the world from ``i * patch * level`` on; and ``pooled.csv``, a row for each tile: its level, its world box clipped
    to the image (lower corner, then upper corner, (z)yx), and the mean of its features.

    Args:
        encoder: takes the slide's channels and levels; it is moved to ``device``, and back when done. A
            `TrainedModel`, as `muvit.load_model` returns, brings its encoder and preprocessing.
        slide: the image; levels of the encoder that it does not store are computed from those that it does.
        output: folder to create, conventionally named ``*.zarr``.
        preprocessing: crop size, normalisation and padding, as in training; by default those of a `TrainedModel`.
        levels: those whose features to write, out of the encoder's; unset, all.
        dtype: of the stored features.
        batch_size: tiles per forward pass.
        device: where to run; by default CUDA (under bfloat16 autocast) if there is any, else the CPU.
        num_workers: processes that read tiles ahead of the device; 0 reads in between.
        execution: all settings of devices and processes, in place of the three before.
        overwrite: replace what is at ``output``, complete or not.
        progress: called after each batch.

    Returns:
        ``output``.

    Raises:
        InputError: encoder, slide, preprocessing and options do not fit each other, or other features were begun at
            ``output``, or another process is writing it. All of this is checked before anything is written.
        ExistsError: something else is at ``output``, and ``overwrite`` is false.
        ReadError: pixels of the slide are corrupt; names file, level and window.
    """
    if execution is None:
        name = None if device is None else str(device)
        execution = Execution(device=name, batch_size=batch_size, num_workers=num_workers)
    job = plan_extraction(
        encoder,
        slide,
        output,
        preprocessing,
        levels=levels,
        dtype=dtype,
        execution=execution,
        overwrite=overwrite,
    )
    run_extraction(job, execution, overwrite=overwrite, progress=progress)
    return Path(output)


def plan_extraction(
    encoder: MuViTEncoder | TrainedModel[Any],
    slide: Slide,
    output: Path | str,
    preprocessing: Preprocessing | None = None,
    *,
    levels: Sequence[Level] | None = None,
    dtype: FeatureType = "float16",
    execution: Execution | None = None,
    overwrite: bool = False,
) -> Job:
    """The first half of `extract_features`: all checks, with nothing written."""
    check_target(slide, output)
    trained = as_trained(encoder, preprocessing, FolderModel)
    network, preprocessing = encoder_of(trained.model, "encoder"), trained.preprocessing
    devices = (execution or Execution()).devices
    slide = prepare_slide(encoder_views(network.config), slide, preprocessing)
    plan = plan_features(network, slide, preprocessing, levels=levels, dtype=dtype, device=devices[0])
    store = FeatureStore(Path(output), plan)
    store.check(overwrite=overwrite)
    return Job(store=store, model=network, slide=slide, make_blocks=encode_blocks)


def run_extraction(
    job: Job, execution: Execution | None = None, *, overwrite: bool = False, progress: Progress | None = None
) -> bool:
    """The second half of `extract_features`: executes a job of `plan_extraction`, or the rest of it.

    Returns:
        Whether the output is complete; else other parts have to complete it.
    """
    is_complete = run_job(job, execution, overwrite=overwrite, progress=progress)
    if is_complete:
        _LOG.info("features of %s are in %s", job.slide.path, job.store.path)
    return is_complete
