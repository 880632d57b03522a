"""Settings of annotations: their classes, and the meaning of what is not annotated."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from muvit.checks import check_fields
from muvit.errors import InputError, ReadError
from muvit.labels import WIDE_IGNORED

UNCLASSIFIED = "unclassified"
"""Class of objects that have none."""
CONFIG_NAMES = ("classes.json", "classes.yaml", "classes.yml")
"""Files with these settings, beside the annotations that they are about."""

_BACKGROUND = "background"
_QUPATH_IGNORED = "Ignore*"


@dataclass(frozen=True, kw_only=True)
class AnnotationConfig:
    """Labels that annotations stand for."""

    classes: dict[str, int | Literal["ignore"]] | None = None
    """Label value of each class, or ignore, such as {Tumour: 1, Stroma: 2, Artefact: ignore}; objects without a class
    are of the class unclassified. Unset, the classes found in the files in alphabetical order (class 2 before class
    10), from 1."""
    colors: dict[str, tuple[int, int, int]] | None = None
    """Red, green and blue of classes; unset, the colours in the files."""
    unannotated: Literal["background", "ignore"] = "background"
    """Meaning of what is not annotated: background (label 0), or ignored, where annotations are sparse."""
    region_class: str | None = "Region*"
    """Class of the objects that bound what was annotated: outside of them everything is ignored. An image without such
    objects counts as a whole; null: there is no such class."""
    overlap: Literal["area", "classes", "file"] = "area"
    """Object that counts where several overlap: the smaller (area), that of the class listed last (classes), or that
    later in the file (file)."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in (self.classes or {}).items():
            is_value = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < WIDE_IGNORED
            if not is_value and value != "ignore":
                raise InputError(
                    f"value of the class {name!r}",
                    expected=f"a whole number from 0 to {WIDE_IGNORED - 1}, or ignore",
                    got=repr(value),
                )
        if self.region_class is not None and self.region_class in (self.classes or {}):
            raise InputError("classes", expected="no value for the region_class", got=repr(self.region_class))

    def with_classes(self, found: Iterable[str]) -> "AnnotationConfig":
        """These settings with the classes that were found, unless they list classes themselves.

        ``background`` gets 0 and ``Ignore*``, as QuPath names it, is ignored.
        """
        if self.classes is not None:
            return self
        names = sorted(set(found) - {self.region_class}, key=_natural)
        values: dict[str, int | Literal["ignore"]] = {n: 0 for n in names if n.lower() == _BACKGROUND}
        values |= {n: "ignore" for n in names if n == _QUPATH_IGNORED}
        values |= {n: i for i, n in enumerate((n for n in names if n not in values), start=1)}
        return replace(self, classes=values)

    @property
    def label_names(self) -> dict[int, str]:
        """Name of each label value; classes that share a value are joined by a slash."""
        names: dict[int, str] = {}
        for name, value in (self.classes or {}).items():
            if value != "ignore":
                names[value] = f"{names[value]}/{name}" if value in names else name
        if self.unannotated == "background":
            names.setdefault(0, _BACKGROUND)
        return dict(sorted(names.items()))


def read_config(folder: Path) -> AnnotationConfig | None:
    """The settings in a folder of annotations, a file named ``classes.json``, ``.yaml`` or ``.yml``; None without one.

    Raises:
        ReadError: there are two, or the file cannot be read.
        InputError: it holds other settings.
    """
    from muvit.settings import read_settings

    files = [folder / name for name in CONFIG_NAMES if (folder / name).is_file()]
    if len(files) > 1:
        raise ReadError(folder, expected=f"one of {', '.join(CONFIG_NAMES)}", got="several")
    return read_settings(files[0], AnnotationConfig) if files else None


def config_of_names(names: Mapping[int, str]) -> AnnotationConfig:
    """Settings under which annotations get the label values that stored labels, or a model, have for these names."""
    classes: dict[str, int | Literal["ignore"]] = {_QUPATH_IGNORED: "ignore"}
    classes |= {name: value for value, name in names.items()}
    return AnnotationConfig(classes=classes)


def describe_classes(config: AnnotationConfig) -> str:
    """The classes and their label values in one line."""
    classes: dict[str, Any] = config.classes or {}
    return ", ".join(f"{name} {value if value == 'ignore' else f'= {value}'}" for name, value in classes.items())


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by their value."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]
