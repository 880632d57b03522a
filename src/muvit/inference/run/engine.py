"""Who makes the blocks of an output: this process, one process for each device, or the workers of a Dask cluster.

Whoever makes a block writes its shards too; nobody else writes them. How many there are changes nothing but the time.
"""

import hashlib
import logging
import math
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, BrokenExecutor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from muvit.data.slides.slide import Slide
from muvit.errors import InputError, MuViTError
from muvit.inference.run.blocks import predict_blocks, ready
from muvit.inference.run.ledger import Ledger
from muvit.inference.run.plan import Plan, hash_model
from muvit.inference.run.resume import PLAN, WORK, read_plan
from muvit.inference.run.store import Output
from muvit.inference.workers import without_interrupts, worker_pool
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.trained import load_network

_LOG = logging.getLogger(__name__)

RETRIES = 3
"""How often a block is tried again on a cluster after it failed or its worker died."""

CountTiles = Callable[[int], None]
"""Called with the number of tiles just done."""

_POLL_S = 0.5
_PATIENCE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What there is to do."""

    output: Output
    """Where blocks go."""
    model: SegmentationModel
    """In any state; it comes back as it was."""
    slide: Slide
    """The image, with all levels of the model."""
    blocks: Sequence[int]
    """Numbers of the blocks to make."""
    batch_size: int
    """Tiles per forward pass."""
    num_workers: int
    """Processes that read ahead, for each process that computes."""


def run_local(work: Work, devices: Sequence[torch.device], ledger: Ledger, count: CountTiles) -> None:
    """Make blocks in this process or, on several devices, in one process for each.

    Args:
        work: what there is to do.
        devices: where to run.
        ledger: where blocks are noted; the processes of several devices have their own.
        count: called as tiles are done.

    Raises:
        MuViTError: pixels could not be read, the model's answer is not finite, or a process died.
        OSError: the output cannot be written.
    """
    if len(devices) == 1:
        _make_blocks(work, devices[0], ledger, count)
        return
    try:
        with worker_pool(len(devices)) as pool:
            with without_interrupts():
                running = {
                    pool.submit(
                        _make_share,
                        work.output.path,
                        work.output.plan,
                        work.model,
                        work.slide,
                        work.blocks[i :: len(devices)],
                        work.batch_size,
                        work.num_workers,
                        device,
                        f"device-{i}",
                    )
                    for i, device in enumerate(devices)
                }
            with _counting_done(work, count) as look:
                while running:
                    finished, running = wait(running, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
                    look()
                    for future in finished:
                        future.result()
    except BrokenExecutor as error:
        died = f"{work.output.path}: the process of one of the {len(devices)} devices died."
        raise MuViTError(died) from error


def _make_blocks(work: Work, device: torch.device, ledger: Ledger, count: CountTiles) -> None:
    """Make blocks in this process; a thread writes each while the next is computed."""
    with ready(work.model, device), ThreadPoolExecutor(max_workers=1) as writer:
        pending: Future[None] | None = None
        made = predict_blocks(
            work.model,
            work.slide,
            work.output.plan,
            work.blocks,
            device=device,
            batch_size=work.batch_size,
            num_workers=work.num_workers,
            count=count,
        )
        for number, pixels in made:
            if pending is not None:
                pending.result()
            pending = writer.submit(lambda n, p: ledger.record(*work.output.write_block(n, p)), number, pixels)
            del pixels  # they go as soon as they are written
        if pending is not None:
            pending.result()


def _make_share(
    path: Path,
    plan: Plan,
    model: SegmentationModel,
    slide: Slide,
    blocks: Sequence[int],
    batch_size: int,
    num_workers: int,
    device: torch.device,
    name: str,
) -> None:
    """The part of one device, in a process of its own."""
    output = Output(path, plan)
    work = Work(output=output, model=model, slide=slide, blocks=blocks, batch_size=batch_size, num_workers=num_workers)
    with output.ledger(name) as ledger:
        _make_blocks(work, device, ledger, lambda _: None)


@contextmanager
def _counting_done(work: Work, count: CountTiles) -> Iterator[Callable[[], None]]:
    """Something to call now and then, which counts the tiles of blocks that others have noted since."""
    left = set(work.blocks)

    def look() -> None:
        for number in left - set(work.output.missing_blocks()):
            left.remove(number)
            count(work.output.plan.tiling.num_computed(number))

    yield look
    look()


# -- Dask --------------------------------------------------------------------------------------------------------------


def run_dask(
    work: Work,
    devices: Sequence[str | None],
    ledger: Ledger,
    count: CountTiles,
    *,
    scheduler: str | None = None,
    num_processes: int | None = None,
) -> None:
    """Make blocks on a Dask cluster whose workers see the same files as this process.

    Workers take the model from a copy beside the output. A block that fails, or whose worker dies, is tried again, at
    most `RETRIES` times; the others go on.

    Args:
        work: what there is to do.
        devices: where workers run: the i-th worker of a cluster of our own takes the i-th, in turn; None: CUDA if the
            worker has any, else the CPU.
        ledger: where blocks are noted.
        count: called as tiles are done.
        scheduler: address of a running cluster; by default one is started here.
        num_processes: workers of the cluster that is started, by default one for each device.

    Raises:
        InputError: Dask is not installed, or the model cannot be loaded from a folder.
        MuViTError: blocks failed to the end; lists them.
    """
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise InputError(
            "engine dask",
            expected="Dask distributed",
            got=str(error),
            hint="Install it with: pip install 'muvit[dask]'",
        ) from error
    _leave_model(work)
    if scheduler is not None:
        with Client(scheduler) as client:
            _drive(client, work, devices, ledger, count, patience_s=math.inf)
        return
    # a worker that dies is our affair: we count, for each block by itself
    with dask.config.set({"distributed.scheduler.allowed-failures": 0, "distributed.worker.daemon": False}):
        with without_interrupts():
            cluster = LocalCluster(
                n_workers=num_processes or len(devices),
                threads_per_worker=1,
                processes=True,
                dashboard_address=":0",
                memory_limit=0,
            )
        with cluster, Client(cluster) as client:
            _drive(client, work, devices, ledger, count, patience_s=_PATIENCE_S)


def _drive(
    client: Any,
    work: Work,
    devices: Sequence[str | None],
    ledger: Ledger,
    count: CountTiles,
    *,
    patience_s: float,
) -> None:
    """Hand out blocks, as many at a time as there are workers, and note those that come back.

    A cluster without any worker is waited for as long as ``patience_s``.
    """
    last_seen = time.monotonic()
    waiting, failures, failed = deque(work.blocks), Counter[int](), dict[int, BaseException]()
    running: dict[Any, int] = {}
    path, key = work.output.path.resolve(), _plan_key(work.output.path)
    while waiting or running:
        capacity = sum(client.nthreads().values())
        last_seen = time.monotonic() if capacity else last_seen
        if time.monotonic() - last_seen > patience_s:
            raise MuViTError(f"{path}: all workers of the cluster died, and none came back in {patience_s:g} s")
        while waiting and len(running) < max(capacity, 1):
            number = waiting.popleft()
            future = client.submit(
                _make_block,
                path,
                key,
                work.slide,
                number,
                work.batch_size,
                work.num_workers,
                tuple(devices),
                pure=False,
            )
            running[future] = number
        for future in [future for future in running if future.done()]:
            number = running.pop(future)
            if future.status == "finished":
                ledger.record(*future.result())
                count(work.output.plan.tiling.num_computed(number))
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
        raise MuViTError(
            f"{path}: {len(failed)} of {len(work.blocks)} blocks failed {RETRIES + 1} times each. {listed}"
        )


def _leave_model(work: Work) -> None:
    """Put a copy of the model where workers find it."""
    folder = work.output.path / WORK / "model"
    if not folder.exists():
        work.model.save(folder)
    if hash_model(load_network(folder)) != work.output.plan.model:
        got = type(work.model).__name__
        raise InputError("engine dask", expected="a model that comes back from its folder", got=got)


def _make_block(
    path: Path,
    plan_key: str,
    slide: Slide,
    number: int,
    batch_size: int,
    num_workers: int,
    devices: tuple[str | None, ...],
) -> tuple[str, Any]:
    """Make and write one block on a worker; returns what the ledger is to list."""
    from distributed import get_worker

    name = get_worker().name
    device = devices[name % len(devices) if isinstance(name, int) else 0]
    output, model = _session(path, plan_key, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    made = predict_blocks(
        model,
        slide,
        output.plan,
        [number],
        device=next(model.parameters()).device,
        batch_size=batch_size,
        # a daemon may not start processes
        num_workers=0 if multiprocessing.current_process().daemon else num_workers,
        count=lambda _: None,
    )
    ((_, pixels),) = made
    _check_plan(path, plan_key)
    return output.write_block(number, pixels)


@lru_cache(maxsize=1)
def _session(path: Path, plan_key: str, device: str) -> tuple[Output, SegmentationModel]:
    """What a worker keeps from block to block."""
    _check_plan(path, plan_key)
    plan = read_plan(path)
    assert plan is not None
    model = load_network(path / WORK / "model", device, kind=SegmentationModel)
    return Output(path, Plan.from_json(plan)), model.eval()


def _plan_key(path: Path) -> str:
    file = path / WORK / PLAN
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def _check_plan(path: Path, plan_key: str) -> None:
    """A worker may outlive the run that it works for; what another run has begun since is not its to write."""
    if _plan_key(path) != plan_key:
        raise InputError(path, expected="the output that this worker was told to work on", got="another one")
