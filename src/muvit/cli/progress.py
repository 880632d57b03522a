"""A progress bar on the terminal."""

import sys
from collections.abc import Callable

from tqdm import tqdm


class Progress:
    """Shows how far a task is; called with (done, total).

    Args:
        title: what is being done.
        unit: what is counted.
    """

    def __init__(self, title: str, unit: str) -> None:
        self._bar = tqdm(desc=title, unit=unit, file=sys.stderr, mininterval=0.5, leave=True)

    def __call__(self, done: int, total: int) -> None:
        """Show ``done`` of ``total``."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Callable[[int, int], None]:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
