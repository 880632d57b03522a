"""The one way in which long work reports how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the number of steps done and of all steps."""
