"""A progress bar on the terminal."""

import sys
from collections.abc import Callable

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
