"""Numbers and lists as the text of a report."""

import math
from collections.abc import Iterable, Sequence


def format_score(value: float) -> str:
    """A score with three decimals."""
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def format_count(number: int) -> str:
    """A large number in thousands or millions."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def format_duration(seconds: float) -> str:
    """A time in the units that suit it."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s"


def join_lines(parts: Iterable[str]) -> str:
    """Parts of a page, one per line."""
    return "\n".join(parts)


def list_names(names: Sequence[str]) -> str:
    """Names in a sentence: ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
