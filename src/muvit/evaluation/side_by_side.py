"""Several models at once, each trained and used in a process of its own."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from muvit.data.preprocessing import Preprocessing
from muvit.data.slides import open_slide
from muvit.evaluation.epochs import read_curves
from muvit.evaluation.variants import Variant
from muvit.inference.plan import AS_PUBLISHED
from muvit.inference.predict import predict_slide
from muvit.models import load_model
from muvit.training.recipe import Recipe
from muvit.training.run import CHECKPOINT
from muvit.training.train import train_segmenter

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all, over all variants."""

_SECONDS = "training_seconds.txt"


@dataclass(frozen=True)
class _Job:
    output: Path
    slides: tuple[Path, ...]
    resume: bool
    overwrite: bool


@dataclass(frozen=True)
class Trained:
    """A variant that is trained, and has labelled its slides."""

    folder: Path
    """Of the model."""
    seconds: float
    """That training took."""
    curves: dict[str, tuple[list[float], list[float]]]
    """Steps and values of the training loss and the validation score."""
    parameters: int
    """That were trained."""


class _CountSteps(Callback):
    def __init__(self, index: int) -> None:
        self.index = index

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        _steps[self.index] = trainer.global_step  # also of earlier runs that this one goes on with


def train_and_label(
    variants: Sequence[Variant],
    slides: Sequence[Path],
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
) -> list[Trained]:
    """Train each variant into ``runs/<slug>``, and label slides into ``predictions/<slug>/<slide>.ome.zarr``.

    Raises:
        MuViTError: that of the first variant that fails; the others end with it.
    """
    job = _Job(output, tuple(slides), resume, overwrite)
    cores = os.cpu_count() or 1
    at_once = min(len(variants), cores)
    total = sum(_num_steps(variant.recipe) for variant in variants)
    context = multiprocessing.get_context("spawn")
    steps = context.RawArray("Q", len(variants))  # without a lock, which a worker could take to its grave
    with ProcessPoolExecutor(at_once, context, _start_worker, (cores // at_once, steps)) as pool:
        others = set(multiprocessing.active_children())
        jobs = [pool.submit(_work, variant, job, index) for index, variant in enumerate(variants)]
        try:
            _follow(jobs, steps, total, progress)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                error.add_note(f"The comparison in {output} goes on with --resume.")
            pool.shutdown(cancel_futures=True, wait=False)
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
                worker.join()
            raise
        return [future.result() for future in jobs]


def _follow(jobs: list[Future[Trained]], steps: Iterable[int], total: int, progress: Progress | None) -> None:
    running = set(jobs)
    while running:
        finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in finished:
            future.result()  # a failure ends the comparison at once
        if progress is not None:
            progress(sum(steps), total)


def _num_steps(recipe: Recipe) -> int:
    return recipe.run.epochs * (recipe.data.samples_per_epoch // recipe.data.batch_size)


_steps: Any = []
"""Steps done by each variant, in memory that all workers share."""


def _start_worker(threads: int, steps: Any) -> None:
    global _steps
    _steps = steps
    torch.set_num_threads(max(1, min(threads, torch.get_num_threads())))  # no more than the environment allows
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Who is killed cannot end its processes, which would wait for work, with all their memory, for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(variant: Variant, job: _Job, index: int) -> Trained:
    run = job.output / "runs" / variant.slug
    recipe = replace(variant.recipe, run=replace(variant.recipe.run, progress=False))  # the bar counts for all
    started = job.resume and (run / CHECKPOINT).exists()
    began, before = time.perf_counter(), _seconds_before(run) if started else 0.0
    again = job.overwrite or job.resume  # what has not finished an epoch is begun anew
    folder = train_segmenter(recipe, run, resume=started, overwrite=again, callbacks=[_CountSteps(index)])
    seconds = before + time.perf_counter() - began
    _steps[index] = _num_steps(recipe)  # also if it was complete already, or has stopped early
    (run / _SECONDS).write_text(f"{seconds:.1f}\n")
    model, preprocessing = load_model(folder), Preprocessing.load(folder)
    for path in job.slides:
        slide = open_slide(path)
        target = job.output / "predictions" / variant.slug / f"{slide.name}.ome.zarr"
        target.parent.mkdir(parents=True, exist_ok=True)
        # predicting is short, so a resumed comparison does it anew
        predict_slide(model, slide, target, preprocessing, options=AS_PUBLISHED, batch_size=16, overwrite=again)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Trained(folder, seconds, read_curves(run, ("train_loss", "val_mdsc")), parameters)


def _seconds_before(run: Path) -> float:
    """Training time of a run so far, as far as it was noted."""
    noted = run / _SECONDS
    return float(noted.read_text()) if noted.exists() else 0.0
