"""Treat SIGTERM like Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
