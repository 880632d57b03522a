"""The terminal: progress bars, SIGTERM as Ctrl-C, and failures of the machine in one sentence."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """Progress of a task; called with (done, total).

    Args:
        title: name of the task.
        unit: name of one step.
    """

    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit = title, unit
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show ``done`` of ``total``."""
        if self._bar is None:  # not before the first step, so that an early error stands alone
            self._bar = tqdm(desc=self._title, unit=self._unit, total=total, file=sys.stderr, mininterval=0.5)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Callable[[int, int], None]:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM, with which the queue of a cluster ends a job, into KeyboardInterrupt.

    The run then ends its processes, and prints how to resume.

    Raises:
        KeyboardInterrupt: SIGTERM was received.
    """
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_KILLED = "a process of this run was killed from outside, by the system most likely, when memory was full"
_LESS = "Make batches or crops smaller"


def failure(error: Exception) -> str | None:
    """One sentence on a failure of the machine, and one on what to do about it; None for any other error."""
    if isinstance(error, OSError):  # a disk that is full, a folder that may not be written
        return f"{error.filename or 'file system'}: {error.strerror or error}."
    torch = sys.modules.get("torch")  # an error of torch has loaded it
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"the memory of the GPU is full. {_LESS}."
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return f"memory is full. {_LESS}."
    if isinstance(error, RuntimeError) and _lost_peer(error):
        return "a process that trains together with this one died, or cannot be reached any more."
    if isinstance(error, BrokenProcessPool):
        return f"{_KILLED}. {_LESS}."
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return f"{_KILLED}. {_LESS}, or let fewer processes read ahead (num_workers)."
    return None


def _lost_peer(error: RuntimeError) -> bool:
    """Whether an error of collective communication, by Gloo or NCCL, ended a training run of several processes."""
    return "/gloo/" in str(error) or type(error).__name__.startswith("Dist")
