"""Whole-slide prediction: tiles with their context in, an OME-Zarr label pyramid out; killed, it goes on."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.derived import complete_slide
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.inference.inputs import prepare_slide
from muvit.inference.run.engine import Work, run_dask, run_local
from muvit.inference.run.ledger import Ledger
from muvit.inference.run.lock import OutputLock
from muvit.inference.run.plan import Plan, PredictOptions
from muvit.inference.run.prepare import make_plan
from muvit.inference.run.reading import SlideTiles
from muvit.inference.run.resume import is_published, read_plan
from muvit.inference.run.store import Output, prediction_status
from muvit.inference.tiling.seams import Seams
from muvit.models.segmentation_model import SegmentationModel
from muvit.progress import Progress

_LOG = logging.getLogger(__name__)

_PATIENCE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Who computes a prediction, and how; nothing of it changes the result, but for the rounding of arithmetic."""

    engine: Literal["local", "dask"] = "local"
    """Here, with one process for each device; or on a Dask cluster, whose workers see the same files."""
    device: str | None = None
    """Such as cpu, cuda, mps, or several with commas between (cuda:0,cuda:1); unset, a GPU if there is one."""
    batch_size: int = 8
    """Tiles computed at once."""
    num_workers: int = 0
    """Processes that read ahead, for each device; 0 reads in between. They are spawned, so a script must guard its own
    start by ``if __name__ == "__main__"``."""
    scheduler: str | None = None
    """Address of a running Dask cluster; unset, one is started on this machine."""
    dask_workers: int | None = None
    """Workers of the Dask cluster that is started; unset, one for each device."""
    part: str | None = None
    """Only this part of the blocks, as in 3/8: for job arrays. The job that comes last completes the output."""

    def __post_init__(self) -> None:
        if self.engine not in ("local", "dask"):
            raise InputError("engine", expected="local or dask", got=repr(self.engine))
        least = {"batch_size": 1, "num_workers": 0} | ({} if self.dask_workers is None else {"dask_workers": 1})
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise InputError(name, expected=f"at least {lowest}", got=getattr(self, name))
        if self.engine != "dask":
            for name in ("scheduler", "dask_workers"):
                if getattr(self, name) is not None:
                    raise InputError(name, expected="engine dask, whose cluster it is for", got=f"engine {self.engine}")
        if self.part is not None:
            number, of = self.share
            if not 1 <= number <= of:
                raise InputError("part", expected="a part such as 3/8, counted from 1", got=repr(self.part))

    @property
    def share(self) -> tuple[int, int]:
        """Number of this part, counted from 1, and of all."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.part or "1/1")
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @property
    def devices(self) -> list[torch.device]:
        """The devices, checked.

        Raises:
            InputError: this machine has no such device.
        """
        return resolve_devices(self.device)


def predict_slide(
    model: SegmentationModel,
    slide: Slide,
    output: Path | str,
    preprocessing: Preprocessing,
    *,
    options: PredictOptions | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    engine: Engine | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Label every pixel of a slide and write the labels as an OME-Zarr pyramid.

    The labels have the pixels of the model's finest level, the class names and colours of ``preprocessing``, and the
    pixel size of the slide. They depend neither on batches and blocks nor on workers and devices (but for the rounding
    of the model's arithmetic). The store is readable when it is complete. A run that is killed or fails leaves an
    unfinished one: the same call goes on from there and makes the same bytes as if nothing had happened. Where a call
    finds what it would make, complete, it leaves it as it is.

    Args:
        model: takes the slide's channels and levels; it is moved to the device, and back when done.
        slide: the image; levels of the model that it does not store are computed from those that it does.
        output: folder of the label image to create, by custom named ``*.ome.zarr``; inside the ``labels`` folder of an
            OME-Zarr image it becomes one of that image's labels. Probabilities and entropy lie beside it:
            ``one.ome.zarr``, ``one.probabilities.ome.zarr``.
        preprocessing: how the model saw crops in training, and what its classes are.
        options: what is predicted, and how tiles are laid and joined; by default as in the paper.
        batch_size: tiles per forward pass.
        device: where to run; by default CUDA if there is any, else the CPU.
        num_workers: processes that read tiles ahead of the device; 0 reads in between. They are spawned, so a script
            must guard its own start by ``if __name__ == "__main__"``.
        engine: all there is to say of who computes, in place of the three before.
        overwrite: replace a store at ``output``, complete or not.
        progress: called after each batch.

    Returns:
        ``output``.

    Raises:
        InputError: model, slide, preprocessing and options do not fit each other, or a weight is NaN or infinite, or
            another plan was begun at ``output``, or somebody else is writing it. All of this is found before anything
            is written.
        ExistsError: something else is at ``output``, and ``overwrite`` is false.
        ReadError: pixels of the slide are corrupt; names file, level and window.
    """
    if engine is None:
        name = None if device is None else str(device)
        engine = Engine(device=name, batch_size=batch_size, num_workers=num_workers)
    slide = prepare_slide(model.views, slide, preprocessing)
    plan = plan_prediction(model, slide, output, preprocessing, options=options, engine=engine)
    run_prediction(plan, model, slide, output, engine=engine, overwrite=overwrite, progress=progress)
    return Path(output)


def plan_prediction(
    model: SegmentationModel,
    slide: Slide,
    output: Path | str,
    preprocessing: Preprocessing,
    *,
    options: PredictOptions | None = None,
    engine: Engine | None = None,
) -> Plan:
    """The first half of `predict_slide`: all but what lies at ``output`` is checked, and nothing is written."""
    if slide.path.resolve().is_relative_to(Path(output).resolve()):
        raise InputError("output", expected="a folder that does not hold the image", got=output)
    devices = (engine or Engine()).devices
    model.views.check_size(preprocessing.crop_size)
    slide = prepare_slide(model.views, slide, preprocessing)
    plan = make_plan(model, slide, preprocessing, options or PredictOptions(), devices[0])
    SlideTiles(slide, plan.tiling, plan.preprocessing).check()
    return plan


def run_prediction(
    plan: Plan,
    model: SegmentationModel,
    slide: Slide,
    output: Path | str,
    *,
    engine: Engine | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Seams | None:
    """The second half of `predict_slide`: does what `plan_prediction` has planned, or what is left of it.

    Returns:
        How tiles fit together in the complete output; None if it is for other parts to complete.
    """
    output, engine = Path(output), engine or Engine()
    slide = complete_slide(slide, plan.tiling.levels)
    number, of = engine.share
    name = "all" if engine.part is None else f"part-{number}-of-{of}"
    with OutputLock(output) as lock, OutputLock(output, f"{name}.lock") as own:
        if engine.part is None:
            begun = _begin(lock.require(), plan, overwrite)
        else:
            begun = _begin_part(lock, own, plan, overwrite)
        if begun is None:
            return prediction_status(output).seams
        with _tell_how_to_go_on(output), begun.ledger(name) as ledger:
            blocks = [block for block in begun.missing_blocks() if block % of == number - 1]
            _compute(
                Work(
                    output=begun,
                    model=model,
                    slide=slide,
                    blocks=blocks,
                    batch_size=engine.batch_size,
                    num_workers=engine.num_workers,
                ),
                engine,
                ledger,
                progress,
            )
            if engine.part is not None and not (lock.acquire() and not begun.missing_blocks()):
                _LOG.info("part %s of %s is done; others are not", engine.part, output)
                return None
            seams = begun.finish(ledger)
    _LOG.info("labelled %s, written to %s", slide.path, output)
    return seams


def _begin(lock: OutputLock, plan: Plan, overwrite: bool) -> Output | None:
    """Create the output, or go on with it; None if it is complete. The lock is held alone."""
    if is_published(lock.output, plan.to_json()) and not overwrite:  # by an earlier call, or by other parts
        Output(lock.output, plan).settle()
        return None
    return Output.begin(lock.output, plan, overwrite=overwrite)


def _begin_part(lock: OutputLock, own: OutputLock, plan: Plan, overwrite: bool) -> Output | None:
    """Create the output, or join the parts that have, and hold the lock together with them; None if it is complete."""
    if overwrite:
        raise InputError(
            "overwrite", expected="all parts to work on one output", got="one part that would begin it anew"
        )
    own.require()
    until = time.monotonic() + _PATIENCE_S
    while True:
        if lock.acquire():
            begun = _begin(lock, plan, overwrite)
            if lock.acquire(shared=True):
                return begun
        elif lock.acquire(shared=True):
            if read_plan(lock.output) is not None:
                return Output.begin(lock.output, plan)
            lock.release()
        if time.monotonic() > until:
            raise lock.refusal()
        time.sleep(0.1)


def _compute(work: Work, engine: Engine, ledger: Ledger, progress: Progress | None) -> None:
    count = _counter(work, progress)
    if not work.blocks:
        return
    if engine.engine == "local":
        run_local(work, engine.devices, ledger, count)
        return
    names = [None] if engine.device is None else engine.device.split(",")
    run_dask(work, names, ledger, count, scheduler=engine.scheduler, num_processes=engine.dask_workers)


def _counter(work: Work, progress: Progress | None) -> Callable[[int], None]:
    """What to call with the number of tiles just done."""
    if progress is None:
        return lambda _: None
    tiling = work.output.plan.tiling
    total = sum(map(tiling.num_computed, range(tiling.num_blocks)))
    done = total - sum(map(tiling.num_computed, work.blocks))

    def count(tiles: int) -> None:
        nonlocal done
        done += tiles
        progress(done, total)

    return count


@contextmanager
def _tell_how_to_go_on(output: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(f"The unfinished output {output} is kept: the same call goes on from there.")
        raise


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device of this name, or by default CUDA if there is any, else the CPU.

    Raises:
        InputError: this machine has no such device, or torch knows none of this name.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type == "cuda" and (found.index or 0) < torch.cuda.device_count():
            return torch.device("cuda", found.index or 0)  # not used yet: that would take memory of every GPU
        return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InputError("device", expected="a device of this machine", got=f"{device!r} ({reason})") from error


def resolve_devices(names: str | None) -> list[torch.device]:
    """The devices of these names, with commas between; by default the one of `resolve_device`.

    Raises:
        InputError: this machine has no such device, or torch knows none of this name.
    """
    return [resolve_device(name.strip() or None) for name in (names or "").split(",")]
