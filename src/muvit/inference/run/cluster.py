"""Execution of jobs on a Dask cluster, whose workers see the same files as this process.

Workers take the model from a copy beside the output. A block that fails, or whose worker dies, is tried again, at most
`RETRIES` times, while the others continue.
"""

import hashlib
import logging
import math
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from muvit.data.slides.slide import Slide
from muvit.errors import InputError, MuViTError, first_line
from muvit.inference.run.blocks import BlockMaker, CountTiles, Job, Setup
from muvit.inference.run.execution import Execution
from muvit.inference.run.plan import hash_model
from muvit.inference.run.resume import PLAN, WORK, Ledger
from muvit.inference.run.store import BlockStore
from muvit.models.folder import FolderModel
from muvit.models.trained import load_network
from muvit.workers import without_interrupts

_LOG = logging.getLogger(__name__)

RETRIES = 3
"""Number of retries of a block that failed or whose worker died."""

_WORKERLESS_S = 120.0


def run_dask(job: Job, blocks: Sequence[int], execution: Execution, ledger: Ledger, count: CountTiles) -> None:
    """Compute blocks on a running cluster, or on one that is started on this machine.

    The i-th worker of a cluster started here takes the i-th device, in turn; without devices CUDA if the worker has
    any, else the CPU.

    Args:
        job: the work.
        blocks: numbers of the blocks to compute.
        execution: devices, and the cluster.
        ledger: where blocks are recorded.
        count: called with the number of tiles just done.

    Raises:
        InputError: Dask is not installed, or the model cannot be loaded from a folder.
        MuViTError: blocks failed in every attempt; lists them.
    """
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise InputError(
            "backend dask",
            expected="Dask distributed",
            got=str(error),
            hint="Install it with: pip install 'muvit[dask]'",
        ) from error
    _save_model(job)
    if execution.scheduler is not None:
        try:
            client = Client(execution.scheduler)
        except (OSError, ValueError) as error:
            expected = "the address of a running Dask scheduler"
            raise InputError("scheduler", expected=expected, got=first_line(error)) from error
        with _quiet_client(), client:
            _distribute(client, job, blocks, execution, ledger, count, workerless_s=math.inf)
        return
    num_devices = 1 if execution.device is None else len(execution.device.split(","))
    # retries are counted here, for each block by itself, and not by the scheduler
    with dask.config.set({"distributed.scheduler.allowed-failures": 0, "distributed.worker.daemon": False}):
        with without_interrupts():
            cluster = LocalCluster(
                n_workers=execution.dask_workers or num_devices,
                threads_per_worker=1,
                processes=True,
                dashboard_address=":0",
                memory_limit=0,
            )
        with cluster, Client(cluster) as client:
            _distribute(client, job, blocks, execution, ledger, count, workerless_s=_WORKERLESS_S)


@dataclass(frozen=True, kw_only=True)
class _RemoteJob:
    """A job as it is sent to workers, which read plan and model from disk once."""

    store_type: type[BlockStore[Any]]
    path: Path
    plan_key: str
    slide: Slide
    make_blocks: BlockMaker
    batch_size: int
    num_workers: int
    devices: tuple[str | None, ...]


def _distribute(
    client: Any,
    job: Job,
    blocks: Sequence[int],
    execution: Execution,
    ledger: Ledger,
    count: CountTiles,
    *,
    workerless_s: float,
) -> None:
    """Submit blocks, as many at a time as there are workers, and record those that are done.

    Raises:
        MuViTError: blocks failed in every attempt, the scheduler is lost, or the cluster had no worker for
            ``workerless_s``.
    """
    last_seen = time.monotonic()
    waiting, failures, failed = deque(blocks), Counter[int](), dict[int, BaseException]()
    running: dict[Any, int] = {}
    path = job.store.path.resolve()
    remote = _RemoteJob(
        store_type=type(job.store),
        path=path,
        plan_key=_plan_key(path),
        slide=job.slide,
        make_blocks=job.make_blocks,
        batch_size=execution.batch_size,
        num_workers=execution.num_workers or 0,
        devices=(None,) if execution.device is None else tuple(execution.device.split(",")),
    )
    while waiting or running:
        capacity = _capacity(client, path)
        last_seen = time.monotonic() if capacity else last_seen
        if time.monotonic() - last_seen > workerless_s:
            raise MuViTError(f"{path}: all workers of the cluster died, and none came back in {workerless_s:g} s")
        while waiting and len(running) < max(capacity, 1):
            number = waiting.popleft()
            running[client.submit(_make_block, remote, number, pure=False)] = number
        for future in [future for future in running if future.done()]:
            number = running.pop(future)
            if future.status == "finished":
                ledger.record(*future.result())
                count(job.store.plan.num_computed(number))
                continue
            error = future.exception() if future.status == "error" else MuViTError("the cluster lost it")
            failures[number] += 1
            _LOG.warning("block %d of %s failed: %s", number, path, error)
            if failures[number] > RETRIES:
                failed[number] = error
            else:
                waiting.append(number)
        time.sleep(0.05)
    if failed:
        listed = "; ".join(f"block {number}: {error}" for number, error in sorted(failed.items()))
        raise MuViTError(f"{path}: {len(failed)} of {len(blocks)} blocks failed {RETRIES + 1} times each. {listed}")


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Let the client not log what it also raises, with its tracebacks."""
    logs = [logging.getLogger(f"distributed.{part}") for part in ("client", "utils")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _capacity(client: Any, path: Path) -> int:
    """Number of threads of all workers.

    Raises:
        MuViTError: the scheduler is lost.
    """
    try:
        return sum(client.nthreads().values())
    except (OSError, RuntimeError) as error:  # the client has waited for it
        raise MuViTError(f"{path}: the scheduler of the cluster was lost ({first_line(error)}).") from error


def _save_model(job: Job) -> None:
    """Save a copy of the model for the workers."""
    folder = job.store.path / WORK / "model"
    if not folder.exists():
        job.model.save(folder)
    if hash_model(load_network(folder)) != job.store.plan.model:
        got = type(job.model).__name__
        raise InputError("backend dask", expected="a model that can be loaded from its folder", got=got)


def _make_block(job: _RemoteJob, number: int) -> tuple[str, Any]:
    """Compute and write one block on a worker; returns key and value for the ledger."""
    from distributed import get_worker

    name = get_worker().name
    device = job.devices[name % len(job.devices) if isinstance(name, int) else 0]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    store, model = _open(job.store_type, job.path, job.plan_key, device)
    setup = Setup(
        device=next(model.parameters()).device,
        batch_size=job.batch_size,
        # a daemon may not start processes
        num_workers=0 if multiprocessing.current_process().daemon else job.num_workers,
        count=lambda _: None,
    )
    ((_, pixels),) = job.make_blocks(model, job.slide, store.plan, [number], setup)
    _check_plan(job.path, job.plan_key)
    return store.write_block(number, pixels)


@lru_cache(maxsize=1)
def _open(
    store_type: type[BlockStore[Any]], path: Path, plan_key: str, device: str
) -> tuple[BlockStore[Any], FolderModel]:
    """Output and model, which a worker keeps from block to block."""
    _check_plan(path, plan_key)
    return store_type.open(path), load_network(path / WORK / "model", device).eval()


def _plan_key(path: Path) -> str:
    file = path / WORK / PLAN
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def _check_plan(path: Path, plan_key: str) -> None:
    """Refuse to write an output of another plan: a worker may outlive its run, and another run may have begun."""
    if _plan_key(path) != plan_key:
        raise InputError(path, expected="the output that this worker was started for", got="another one")
