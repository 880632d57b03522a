"""Several models at once, one on each device, each device with a process of its own."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from muvit.data.slides.open import open_slide
from muvit.durable import write_whole
from muvit.errors import InputError, MuViTError
from muvit.evaluation.report.runs import LivePage, write_run_page
from muvit.evaluation.studies.epochs import read_curves
from muvit.evaluation.variants import Variant
from muvit.inference.predict import predict_slide
from muvit.inference.run.execution import resolve_devices
from muvit.inference.run.plan import AS_PUBLISHED
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.trained import load_model
from muvit.progress import Progress
from muvit.training.fit import train_segmenter
from muvit.training.recipes import Recipe
from muvit.training.resume import has_state
from muvit.training.run_config import RunConfig
from muvit.training.runs import check_devices
from muvit.workers import without_interrupts, worker_pool

_SECONDS = "training_seconds.txt"


@dataclass(frozen=True)
class _Job:
    output: Path
    slides: tuple[Path, ...]
    resume: bool
    overwrite: bool


@dataclass(frozen=True)
class Trained:
    """A trained variant whose slides are labelled."""

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


def choose_devices(run: RunConfig, names: str | None = None) -> list[torch.device]:
    """The devices to train on, one model at a time on each.

    Args:
        run: says where to compute, if no devices are named: on all GPUs, if it allows and there are any.
        names: such as cuda:0,cuda:1, or cpu.

    Raises:
        InputError: this machine has no such device, or models are not trained on its kind, or ``run`` asks for several
            devices for one model.
    """
    if run.devices * run.num_nodes > 1:
        raise InputError(
            "run.devices and run.num_nodes",
            expected="1, as each model of a comparison is trained on one device",
            got=f"{run.devices} and {run.num_nodes}",
            hint="Name the devices that share the models out among them with devices (--devices).",
        )
    if names is None:
        check_devices(run)
        num_gpus = torch.cuda.device_count() if run.accelerator in ("auto", "gpu", "cuda") else 0
        if num_gpus:
            return [torch.device("cuda", index) for index in range(num_gpus)]
        has_mps = run.accelerator != "cpu" and torch.backends.mps.is_available()
        names = "mps" if has_mps else "cpu"
    devices = resolve_devices(names)
    for device in devices:
        if device.type not in ("cpu", "cuda", "mps"):
            raise InputError("devices", expected="devices of kind cpu, cuda or mps", got=str(device))
    return devices


def train_and_label(
    variants: Sequence[Variant],
    slides: Sequence[Path],
    output: Path,
    *,
    devices: Sequence[torch.device],
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
    watch: Callable[[list[tuple[int, int]]], None],
) -> list[Trained]:
    """Train each variant into ``runs/<slug>``, and label slides into ``predictions/<slug>/<slide>.ome.zarr``.

    Each device has a process that takes the next variant when it has done one, those with most work first; a CPU alone
    has a process for each core, and the last variants share all cores if they are fewer.

    ``watch`` is called again and again with the steps of each variant that are done, and all.

    Raises:
        MuViTError: that of the first variant that fails, or a process died; the others end with it.
    """
    job = _Job(output, tuple(slides), resume, overwrite)
    places = _places(devices, len(variants))
    order = sorted(range(len(variants)), key=lambda index: -_work_of(variants[index].recipe))
    totals = [_num_steps(variant.recipe) for variant in variants]
    context = multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    for place in places:
        free.put(place)
    steps = context.RawArray("Q", len(variants))  # without a lock, since a killed worker could not release it
    try:
        with worker_pool(len(places), _start_worker, (free, steps)) as pool:
            with without_interrupts():
                threads = _threads(len(variants), len(places))
                jobs = {
                    index: pool.submit(_train_and_label, variants[index], job, index, share)
                    for index, share in zip(order, threads, strict=True)
                }
            _follow(jobs.values(), steps, totals, progress, watch)
            return [jobs[index].result() for index in range(len(variants))]
    except BaseException as error:
        died = isinstance(error, BrokenExecutor)
        told = MuViTError(f"{output}: a process that trained or used a model died.") if died else error
        if not isinstance(told, InputError):
            told.add_note(f"The comparison in {output} goes on with --resume.")
        if died:
            raise told from error
        raise


def _num_cores() -> int:
    return os.cpu_count() or 1


def _places(devices: Sequence[torch.device], num_variants: int) -> list[torch.device]:
    """The device of each process: a CPU that is the only device is shared by as many as it has cores."""
    alone = [device.type for device in devices] == ["cpu"]
    return (list(devices) * _num_cores() if alone else list(devices))[:num_variants]


def _threads(num_variants: int, num_places: int) -> list[int]:
    """Threads of each variant in the order in which they begin: a last round that is not full shares all cores.

    They follow from the numbers alone, not from who is done when, so that rounding is the same each time.
    """
    last = num_variants % num_places
    return [_num_cores() // num_places] * (num_variants - last) + [_num_cores() // max(last, 1)] * last


def _follow(
    jobs: Iterable[Future[Trained]],
    steps: Iterable[int],
    totals: Sequence[int],
    progress: Progress | None,
    watch: Callable[[list[tuple[int, int]]], None],
) -> None:
    running = set(jobs)
    while running:
        finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in finished:
            future.result()  # a failure ends the comparison at once
        if progress is not None:
            progress(sum(steps), sum(totals))
        watch(list(zip(steps, totals, strict=True)))


def _num_steps(recipe: Recipe) -> int:
    return recipe.run.epochs * (recipe.data.samples_per_epoch // recipe.data.batch_size)


def _work_of(recipe: Recipe) -> int:
    """Views that training sees, a measure of its time."""
    return _num_steps(recipe) * recipe.data.batch_size * len(recipe.model.levels)


_steps: Any = []
"""Steps done by each variant, in memory that all workers share."""

_device = torch.device("cpu")
"""Device of this worker."""


_allowed_threads = 1
"""Threads that the environment of this worker allows."""


def _start_worker(free: Any, steps: Any) -> None:
    global _steps, _device, _allowed_threads
    _steps, _device, _allowed_threads = steps, _claim(free.get()), torch.get_num_threads()


def _claim(device: torch.device) -> torch.device:
    """Hide all GPUs but one from this process, before it uses any; the device as it is called from now on."""
    if device.type != "cuda":
        return device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = device.index or 0
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number].strip() if visible else str(number)
    return torch.device("cuda", 0)


def _train_and_label(variant: Variant, job: _Job, index: int, threads: int) -> Trained:
    torch.set_num_threads(max(1, min(threads, _allowed_threads)))
    run = job.output / "runs" / variant.slug
    # the bar counts for all variants
    own = replace(variant.recipe.run, accelerator=_device.type, devices=1, progress=False)  # type: ignore[arg-type]
    recipe = replace(variant.recipe, run=own)
    started = job.resume and has_state(run)
    began, before = time.perf_counter(), _seconds_before(run) if started else 0.0
    again = job.overwrite or job.resume  # what has not finished an epoch is begun anew
    callbacks = [_CountSteps(index), LivePage(run)]
    folder = train_segmenter(recipe, run, resume=started, overwrite=again, callbacks=callbacks)
    seconds = before + time.perf_counter() - began
    write_run_page(run, seconds)
    _steps[index] = _num_steps(recipe)  # also if it was complete already, or has stopped early
    write_whole(run / _SECONDS, f"{seconds:.1f}\n".encode())
    trained = load_model(folder, kind=SegmentationModel)
    for path in job.slides:
        slide = open_slide(path)
        target = job.output / "predictions" / variant.slug / f"{slide.name}.ome.zarr"
        target.parent.mkdir(parents=True, exist_ok=True)
        # predicting is short, so a resumed comparison does it anew
        predict_slide(
            trained.model,
            slide,
            target,
            trained.preprocessing,
            options=AS_PUBLISHED,
            batch_size=16,
            device=_device,
            overwrite=again,
        )
    parameters = sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
    return Trained(folder, seconds, read_curves(run, ("train_loss", "val_mdsc")), parameters)


def _seconds_before(run: Path) -> float:
    """Training time of a run so far, in seconds; 0 if unknown."""
    noted = run / _SECONDS
    return float(noted.read_text()) if noted.exists() else 0.0
