"""Pools of worker processes that never outlive their work."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

EXIT_WAIT_S = 5.0
"""Seconds that workers have to exit by themselves before they are killed."""

Initializer = Callable[..., None]


@contextmanager
def worker_pool(
    num_workers: int, initializer: Initializer | None = None, initargs: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """Pool of spawned processes, which end at once if its context is left by an error or the parent is killed.

    Each worker waits for the end of a pipe in a separate thread and then exits, even if it ignores signals. Submit
    work within `without_interrupts`.

    Args:
        num_workers: processes.
        initializer: called in each of them first.
        initargs: its arguments.
    """
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)
    others = set(multiprocessing.active_children())
    with told, tell, ProcessPoolExecutor(num_workers, context, _start, (told, initializer, initargs)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            tell.close()
            _end(set(multiprocessing.active_children()) - others)
            raise


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, which a terminal sends to all; the parent ends them."""
    resource_tracker.ensure_running()  # its start would unblock the signal in this process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_with_parent() -> None:
    """End this process within a second of its parent, instead of waiting for it until a connection times out."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _start(told: Connection, initializer: Initializer | None, initargs: tuple[Any, ...]) -> None:
    threading.Thread(target=_exit_with_parent, args=(told,), daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _exit_with_parent(told: Connection) -> None:
    """Exit if the parent closes its end of the pipe or dies: a killed parent cannot terminate its workers."""
    told.poll(None)
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(1)


def _end(workers: Iterable[BaseProcess]) -> None:
    """Wait for workers that were told to exit, and kill those that have not after `EXIT_WAIT_S`."""
    until = time.monotonic() + EXIT_WAIT_S
    try:
        for worker in workers:
            worker.join(max(0.0, until - time.monotonic()))
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
