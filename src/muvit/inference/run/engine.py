"""Execution of jobs: begin or resume the output, compute the missing blocks, and complete it.

The process that computes a block also writes its shards, and no other process writes them. The number of processes
changes nothing but the time.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, BrokenExecutor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch

from muvit.errors import InputError, MuViTError, ReadError
from muvit.inference.run.blocks import CountTiles, Job, Setup, ready
from muvit.inference.run.cluster import run_dask
from muvit.inference.run.execution import Execution
from muvit.inference.run.resume import Ledger, read_plan
from muvit.locks import OutputLock
from muvit.progress import Progress
from muvit.workers import without_interrupts, worker_pool

_LOG = logging.getLogger(__name__)

_LOCK_WAIT_S = 60.0
_POLL_S = 0.5


def run_job(
    job: Job, execution: Execution | None = None, *, overwrite: bool = False, progress: Progress | None = None
) -> bool:
    """Execute a job, or the rest of it that earlier runs left.

    Args:
        job: the work.
        execution: devices and processes.
        overwrite: start over, whatever earlier runs made.
        progress: called after each batch, with numbers of tiles.

    Returns:
        Whether the output is complete; else other parts have to complete it.

    Raises:
        InputError: another plan was begun at the output, another process is writing it, or results are not finite.
        ExistsError: something else is at the output, and ``overwrite`` is false.
        MuViTError: pixels could not be read, or a process died.
        OSError: the output cannot be written.
    """
    store, execution = job.store, execution or Execution()
    if not overwrite and store.is_complete():
        return True
    number, of = execution.share
    name = "all" if execution.part is None else f"part-{number}-of-{of}"
    with OutputLock(store.path) as lock, OutputLock(store.path, f"{name}.lock") as own:
        if execution.part is None:
            lock.require()
            begun = store.begin(overwrite=overwrite)
        else:
            begun = _begin_part(job, lock, own, overwrite)
        if not begun:
            return True
        with _hint_to_resume(store.path), store.ledger(name) as ledger:
            blocks = [block for block in store.missing_blocks() if block % of == number - 1]
            _compute(job, blocks, execution, ledger, progress)
            if execution.part is not None and not (lock.acquire() and not store.missing_blocks()):
                _LOG.info("part %s of %s is done; others are not", execution.part, store.path)
                return False
            store.finish(ledger)
    return True


def verify_job(job: Job, execution: Execution | None = None) -> None:
    """Check the complete output of a job: every byte, and the blocks that are recorded as empty.

    All files are compared with their checksums. Blocks for which tiles are computed and whose pixels are all 0 have no
    file: they are computed once more.

    Args:
        job: the work.
        execution: devices; the first one computes.

    Raises:
        ReadError: a file is missing or was changed, or an empty block is not empty; names it.
        MuViTError: pixels could not be read, or results are not finite.
    """
    store, execution = job.store, execution or Execution()
    store.verify(checksums=True)
    empty, device = store.empty_shards(), execution.devices[0]
    setup = Setup(
        device=device, batch_size=execution.batch_size, num_workers=execution.readers(device), count=lambda _: None
    )
    with ready(job.model, device):
        for number, pixels in job.make_blocks(job.model, job.slide, store.plan, list(empty), setup):
            if pixels is not None and any(pixels.stores[name].any() for name in empty[number]):
                raise ReadError(
                    store.path,
                    expected=f"pixels in block {number}, as the model computes them",
                    got="none, as its ledger said",
                    hint="Begin the output anew (--overwrite).",
                )


def _begin_part(job: Job, lock: OutputLock, own: OutputLock, overwrite: bool) -> bool:
    """Create the output, or join the parts that have, and share the lock with them; False if it is complete."""
    if overwrite:
        raise InputError("overwrite", expected="all parts to work on one output", got="one part that would replace it")
    own.require()
    until = time.monotonic() + _LOCK_WAIT_S
    while True:
        if lock.acquire():
            begun = job.store.begin()
            if lock.acquire(shared=True):
                return begun
        elif lock.acquire(shared=True):
            if read_plan(lock.output) is not None:
                return job.store.begin()
            lock.release()
        if time.monotonic() > until:
            raise lock.refusal()
        time.sleep(0.1)


def _compute(job: Job, blocks: Sequence[int], execution: Execution, ledger: Ledger, progress: Progress | None) -> None:
    if not blocks:
        return
    count = _counter(job, blocks, progress)
    if execution.backend == "dask":
        run_dask(job, blocks, execution, ledger, count)
    elif len(execution.devices) == 1:
        _run_here(job, blocks, execution, execution.devices[0], ledger, count)
    else:
        _run_on_devices(job, blocks, execution, count)


def _counter(job: Job, blocks: Sequence[int], progress: Progress | None) -> CountTiles:
    """Turn numbers of tiles just done into calls of ``progress``."""
    if progress is None:
        return lambda _: None
    plan = job.store.plan
    total = sum(map(plan.num_computed, range(plan.num_blocks)))
    done = total - sum(map(plan.num_computed, blocks))

    def count(tiles: int) -> None:
        nonlocal done
        done += tiles
        progress(done, total)

    return count


def _run_here(
    job: Job, blocks: Sequence[int], execution: Execution, device: torch.device, ledger: Ledger, count: CountTiles
) -> None:
    """Compute blocks in this process; a thread writes each while the next is computed."""
    with ready(job.model, device), ThreadPoolExecutor(max_workers=1) as writer:
        pending: Future[None] | None = None
        setup = Setup(
            device=device, batch_size=execution.batch_size, num_workers=execution.readers(device), count=count
        )
        for number, pixels in job.make_blocks(job.model, job.slide, job.store.plan, blocks, setup):
            if pending is not None:
                pending.result()
            pending = writer.submit(lambda n, p: ledger.record(*job.store.write_block(n, p)), number, pixels)
            del pixels  # freed as soon as they are written
        if pending is not None:
            pending.result()


def _run_on_devices(job: Job, blocks: Sequence[int], execution: Execution, count: CountTiles) -> None:
    """Compute blocks in one process for each device, which records them in its own ledger."""
    devices = execution.devices
    try:
        with worker_pool(len(devices)) as pool:
            with without_interrupts():
                running = {
                    pool.submit(_run_share, job, blocks[i :: len(devices)], execution, device, f"device-{i}")
                    for i, device in enumerate(devices)
                }
            with _counting_done(job, blocks, count) as count_new:
                while running:
                    finished, running = wait(running, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
                    count_new()
                    for future in finished:
                        future.result()
    except BrokenExecutor as error:
        died = f"{job.store.path}: the process of one of the {len(devices)} devices died."
        raise MuViTError(died) from error


def _run_share(job: Job, blocks: Sequence[int], execution: Execution, device: torch.device, name: str) -> None:
    """Compute the blocks of one device, in a process of its own."""
    with job.store.ledger(name) as ledger:
        _run_here(job, blocks, execution, device, ledger, lambda _: None)


@contextmanager
def _counting_done(job: Job, blocks: Sequence[int], count: CountTiles) -> Iterator[Callable[[], None]]:
    """A function that counts the tiles of blocks that other processes have recorded since its last call."""
    left = set(blocks)

    def count_new() -> None:
        for number in left - set(job.store.missing_blocks()):
            left.remove(number)
            count(job.store.plan.num_computed(number))

    yield count_new
    count_new()


@contextmanager
def _hint_to_resume(output: Path) -> Iterator[None]:
    """Add to every error how to resume."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"The unfinished output {output} is kept: run the same command again to resume.")
        raise
