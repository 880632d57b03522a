"""Mapping of stored label values (or colours) to classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muvit.errors import InputError, ReadError
from muvit.labels import IGNORED
from muvit.plain_yaml import read_yaml

IGNORE_NAME = "ignore"
"""Name in a label map for the values that become `IGNORED`."""

Value = int | tuple[int, int, int]
"""A label value, or the (red, green, blue) that stands for it."""


@dataclass(frozen=True)
class LabelMap:
    """Classes and the stored values of each.

    Args:
        classes: stored values, all numbers or all colours, of each class; the first class is 0. What is called
            ``ignore`` is no class.

    Raises:
        InputError: no classes, too many, or a value that is no label value or belongs to two classes.
    """

    classes: Mapping[str, tuple[Value, ...]]

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) < IGNORED:
            raise InputError("label map", expected=f"1 to {IGNORED - 1} classes", got=len(self.names))
        values = [value for values in self.classes.values() for value in values]
        for value in values:
            is_color = isinstance(value, tuple) and len(value) == 3 and all(v in range(256) for v in value)
            if not (is_color or (isinstance(value, int) and not isinstance(value, bool))):
                raise InputError("label map", expected="whole numbers or colours of 3 numbers up to 255", got=value)
            if values.count(value) > 1:
                raise InputError("label map", expected="every value in one class", got=f"{value} more than once")
        if len({isinstance(value, tuple) for value in values}) != 1:
            raise InputError("label map", expected="either numbers or colours", got=values or "no values")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, from class 0."""
        return tuple(name for name in self.classes if name != IGNORE_NAME)

    @property
    def is_colors(self) -> bool:
        """Whether the stored values are colours."""
        return any(isinstance(value, tuple) for values in self.classes.values() for value in values)

    @classmethod
    def read(cls, file: Path) -> "LabelMap":
        """Read a YAML file of classes, in order, each with its value or list of values.

        Raises:
            ReadError: there is no such file, or it is no such map.
            InputError: the map does not fit.
        """
        content = read_yaml(file, "YAML that gives the values of each class")
        if not isinstance(content, dict):
            raise ReadError(file, expected="YAML that gives the values of each class", got=repr(content))
        return cls({str(name): _as_values(values) for name, values in content.items()})

    def to_json(self) -> dict[str, list[Any]]:
        """As a JSON object, classes in order."""
        return {
            name: [list(value) if isinstance(value, tuple) else value for value in values]
            for name, values in self.classes.items()
        }

    def decode(self, pixels: np.ndarray[Any, Any], file: Path) -> np.ndarray[Any, Any]:
        """Classes of stored pixels.

        Args:
            pixels: ``(1, *space)`` values, or ``(3, *space)`` colours.
            file: source of the pixels, for the message.

        Returns:
            ``(*space)`` uint8, `IGNORED` where nothing counts.

        Raises:
            InputError: a value is in no class.
        """
        if len(pixels) != (3 if self.is_colors else 1):
            expected = "labels in colours (red, green, blue)" if self.is_colors else "labels in one channel"
            hint = "A label map (--label_map) says which values, or colours, are which class."
            raise InputError(file, expected=expected, got=f"{len(pixels)} channel(s)", hint=hint)
        stored = _packed(pixels) if self.is_colors else pixels[0].astype(np.int64)
        codes, classes = self._table()
        place = np.searchsorted(codes, stored).clip(max=len(codes) - 1)
        is_unknown = codes[place] != stored
        if is_unknown.any():
            value = tuple(channel[is_unknown][0].item() for channel in pixels)
            raise InputError(
                file,
                expected=f"labels of the classes {', '.join(self.names)} only",
                got=f"{'the colour' if self.is_colors else 'the value'} {value if self.is_colors else value[0]}",
                hint="Say in a label map (--label_map) which class it is, or list it under ignore.",
            )
        return classes[place]

    def _table(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Stored values as numbers in ascending order, and the class of each."""
        pairs = [(value, name) for name, values in self.classes.items() for value in values]
        codes = np.array([_packed(np.array(v)) if isinstance(v, tuple) else v for v, _ in pairs], np.int64)
        classes = [IGNORED if name == IGNORE_NAME else self.names.index(name) for _, name in pairs]
        order = codes.argsort()
        return codes[order], np.array(classes, np.uint8)[order]


def _packed(colors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One number for each colour ``(3, ...)``."""
    red, green, blue = colors.astype(np.int64)
    packed: np.ndarray[Any, Any] = (red << 16) + (green << 8) + blue
    return packed


def _as_values(content: Any) -> tuple[Value, ...]:
    if not isinstance(content, list):
        return (content,)
    return tuple(tuple(value) if isinstance(value, list) else value for value in content)


def vote(votes: Sequence[np.ndarray[Any, Any]], num_classes: int) -> np.ndarray[Any, Any]:
    """Class that most annotators chose for each pixel; of equally frequent ones the first.

    Args:
        votes: ``(*space)`` classes by each annotator; `IGNORED` is no vote.
        num_classes: number of classes.

    Returns:
        ``(*space)`` uint8, `IGNORED` where nobody voted.
    """
    counts = np.stack([sum((v == value).astype(np.uint8) for v in votes) for value in range(num_classes)])
    return np.where(counts.any(0), counts.argmax(0), IGNORED).astype(np.uint8)
