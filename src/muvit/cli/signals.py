"""Being told from outside to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stopped_as_by_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, by which the queue of a cluster ends a job, do what Ctrl-C does.

    The processes of the run are then ended too, and the user is told how to go on.

    Raises:
        KeyboardInterrupt: it was sent.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
