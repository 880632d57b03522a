"""Whole-slide prediction: from tiles in their context to an OME-Zarr label pyramid; resumes after a crash."""

import logging
from pathlib import Path
from typing import Any

import torch

from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.slide import Slide
from muvit.inference.inputs import check_target, prepare_slide
from muvit.inference.run.blocks import Job
from muvit.inference.run.engine import run_job
from muvit.inference.run.execution import Execution
from muvit.inference.run.label_blocks import LabelStore, Status, predict_blocks, prediction_status
from muvit.inference.run.plan import PredictOptions
from muvit.inference.run.planning import plan_labels
from muvit.inference.run.reading import SlideTiles
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.trained import TrainedModel, as_trained
from muvit.progress import Progress

_LOG = logging.getLogger(__name__)


def predict_slide(
    model: SegmentationModel | TrainedModel[Any],
    slide: Slide,
    output: Path | str,
    preprocessing: Preprocessing | None = None,
    *,
    options: PredictOptions | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    execution: Execution | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Label every pixel of a slide and write the labels as an OME-Zarr pyramid.

    The labels have the pixels of the model's finest level, the class names and colours of ``preprocessing``, and the
    pixel size of the slide. They depend neither on batches and blocks nor on workers and devices (but for the rounding
    of the model's arithmetic). The store is readable once it is complete. A run that is killed or fails leaves an
    unfinished one: the same call resumes it, and the bytes are those of an undisturbed run. A complete output of the
    same call is left as it is.

    Args:
        model: takes the slide's channels and levels; it is moved to the device, and back when done. A `TrainedModel`,
            as `muvit.load_model` returns, brings its preprocessing.
        slide: the image; levels of the model that it does not store are computed from those that it does.
        output: folder of the label image to create, conventionally named ``*.ome.zarr``; in the ``labels`` folder of
            an OME-Zarr image it becomes one of that image's labels. Probabilities and entropy are beside it:
            ``one.ome.zarr``, ``one.probabilities.ome.zarr``.
        preprocessing: crop size, normalisation and padding as in training, and the classes; by default those of a
            `TrainedModel`.
        options: outputs, and how tiles are placed and joined.
        batch_size: tiles per forward pass.
        device: where to run; by default CUDA if there is any, else the CPU.
        num_workers: processes that read tiles ahead of the device; 0 reads in between. They are spawned, so a script
            must guard its own start by ``if __name__ == "__main__"``.
        execution: all settings of devices and processes, in place of the three before.
        overwrite: replace a store at ``output``, complete or not.
        progress: called after each batch. With refinement, tiles that turn out not to be needed count as done.

    Returns:
        ``output``.

    Raises:
        InputError: model, slide, preprocessing and options do not fit each other, or a weight is NaN or infinite, or
            another plan was begun at ``output``, or another process is writing it. All of this is checked before
            anything is written.
        ExistsError: something else is at ``output``, and ``overwrite`` is false.
        ReadError: pixels of the slide are corrupt; names file, level and window. Or the complete output of the same
            call has lost a part.
    """
    if execution is None:
        name = None if device is None else str(device)
        execution = Execution(device=name, batch_size=batch_size, num_workers=num_workers)
    job = plan_prediction(
        model, slide, output, preprocessing, options=options, execution=execution, overwrite=overwrite
    )
    run_prediction(job, execution, overwrite=overwrite, progress=progress)
    return Path(output)


def plan_prediction(
    model: SegmentationModel | TrainedModel[Any],
    slide: Slide,
    output: Path | str,
    preprocessing: Preprocessing | None = None,
    *,
    options: PredictOptions | None = None,
    execution: Execution | None = None,
    overwrite: bool = False,
) -> Job:
    """The first half of `predict_slide`: all checks, with nothing written."""
    check_target(slide, output)
    trained = as_trained(model, preprocessing, SegmentationModel)
    network, preprocessing = trained.model, trained.preprocessing
    devices = (execution or Execution()).devices
    network.views.check_size(preprocessing.crop_size)
    slide = prepare_slide(network.views, slide, preprocessing)
    plan = plan_labels(network, slide, preprocessing, options or PredictOptions(), devices[0])
    SlideTiles(slide, plan.tiling, plan.preprocessing).check()
    store = LabelStore(Path(output), plan)
    store.check(overwrite=overwrite)
    return Job(store=store, model=network, slide=slide, make_blocks=predict_blocks)


def run_prediction(
    job: Job, execution: Execution | None = None, *, overwrite: bool = False, progress: Progress | None = None
) -> Status | None:
    """The second half of `predict_slide`: executes a job of `plan_prediction`, or the rest of it.

    Returns:
        Label changes across the seams of tiles, and tiles that were left out by refinement; None if other parts have to
        complete the output.
    """
    if not run_job(job, execution, overwrite=overwrite, progress=progress):
        return None
    _LOG.info("labels of %s are in %s", job.slide.path, job.store.path)
    return prediction_status(job.store.path)
