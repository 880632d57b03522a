"""Annotated objects, and the settings of their classes."""

import gc
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import shapely

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
    class_column: str | None = None
    """Column of GeoParquet and SpatialData with the class of each object; unset, classification, or else class, and of
    shapes of SpatialData without these the name of their element."""
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


_LOG = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Color = tuple[int, int, int]

_ELLIPSE_POINTS = 256
MAX_BYTES = 1 << 31
"""Largest file of annotations that is read."""


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """The objects of a file that have an area, in its order."""

    file: Path
    """The file."""
    polygons: Array
    """``(n,)`` valid shapely polygons and multipolygons, (x, y)."""
    class_names: tuple[str, ...]
    """Class of each."""
    colors: dict[str, Color]
    """Red, green and blue of classes, as far as the file tells."""


@dataclass
class ObjectBuilder:
    """Collects the outlines of objects, and makes them into valid polygons all at once."""

    file: Path
    """The file that they come from."""
    names: list[str] = field(default_factory=list)
    """Class of each object."""
    colors: dict[str, Color] = field(default_factory=dict)
    """Colour of each class."""
    num_without_area: int = 0
    """Objects left out: points, lines, and outlines of less than 3 points."""
    _rings: list[Sequence[Any]] = field(default_factory=list)
    _ring_polygon: list[int] = field(default_factory=list)
    _polygon_object: list[int] = field(default_factory=list)

    def add(self, name: str | None, polygons: Sequence[Sequence[Any]], color: Color | None = None) -> None:
        """Add an object.

        Args:
            name: its class.
            polygons: rings of each of its polygons, the exterior first; a ring is a sequence of points (x, y, ...).
            color: red, green and blue of its class.

        """
        name, number = name or UNCLASSIFIED, len(self._polygon_object)
        for polygon in polygons:
            rings = [ring for ring in polygon if len(ring) >= 3]
            if rings:
                self._rings += rings
                self._ring_polygon += [len(self._polygon_object)] * len(rings)
                self._polygon_object.append(len(self.names))
        if len(self._polygon_object) == number:
            self.num_without_area += 1
            return
        self.names.append(name)
        if color is not None:
            self.colors.setdefault(name, color)

    def build(self) -> Annotations:
        """The objects as polygons; outlines that cross themselves are repaired, and warnings say what was changed.

        Raises:
            ReadError: there is no object with an area, or the points are no pairs of finite numbers.
        """
        return as_annotations(self.file, self._multipolygons(), self.names, self.colors, self.num_without_area)

    def _points(self) -> Array:
        """Points ``(n, 2)`` of all rings."""
        flat = chain.from_iterable
        try:
            lengths = set(map(len, flat(self._rings)))
            points = np.fromiter(flat(flat(self._rings)), np.float64)
        except (TypeError, ValueError):
            lengths, points = set(), np.empty(0)
        if len(lengths) != 1 or not lengths <= {2, 3} or not np.isfinite(points).all():
            raise ReadError(
                self.file,
                expected="outlines of points (x, y), all finite numbers",
                got="others",
                hint="Export the annotations again.",
            )
        return points.reshape(-1, lengths.pop())[:, :2]

    def _multipolygons(self) -> Array:
        if not self._rings:
            return np.empty(0, object)
        ring = np.repeat(np.arange(len(self._rings)), [len(points) for points in self._rings])
        rings = shapely.linearrings(self._points(), indices=ring)
        polygons = shapely.polygons(rings, indices=np.array(self._ring_polygon))
        return np.asarray(shapely.multipolygons(polygons, indices=np.array(self._polygon_object)))


def as_annotations(
    file: Path, polygons: Array, names: Sequence[str | None], colors: dict[str, Color], num_without_area: int = 0
) -> Annotations:
    """Objects as valid polygons; outlines that cross themselves are repaired, and warnings say what was changed.

    Args:
        file: the file that they come from.
        polygons: ``(n,)`` polygons and multipolygons of shapely; others, and None, have no area.
        names: class of each.
        colors: colour of each class.
        num_without_area: objects that were left out before.

    Raises:
        ReadError: there is no object with an area.
    """
    is_invalid = ~(shapely.is_valid(polygons) | shapely.is_missing(polygons))
    polygons[is_invalid] = shapely.make_valid(polygons[is_invalid], method="structure", keep_collapsed=False)
    has_area = shapely.area(polygons) > 0
    counts = {
        "outlines crossed themselves and were repaired: what they enclose is kept": int(is_invalid.sum()),
        "objects without an area (points, lines) were left out": num_without_area + int((~has_area).sum()),
    }
    for what, count in counts.items():
        if count:
            _LOG.warning("%s: %d %s", file, count, what)
    if not has_area.any():
        raise ReadError(
            file,
            expected="annotated areas",
            got="no polygon",
            hint="If nothing is there to annotate, draw a Region* around what was looked at; else leave file and "
            "image out.",
        )
    kept = tuple(name or UNCLASSIFIED for name, is_kept in zip(names, has_area, strict=True) if is_kept)
    return Annotations(file=file, polygons=polygons[has_area], class_names=kept, colors=colors)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Millions of points are made into lists at once, which are walked through again and again otherwise."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def ellipse(corners: Any) -> Array:
    """Points ``(256, 2)`` of the ellipse in the box around these points."""
    lower, upper = np.min(corners, axis=0), np.max(corners, axis=0)
    angle = np.linspace(0, 2 * np.pi, _ELLIPSE_POINTS, endpoint=False)
    unit = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.asarray((lower + upper) / 2 + (upper - lower) / 2 * unit)


def read_bytes(file: Path, limit: int | None = None) -> bytes:
    """The content of a file of annotations.

    Raises:
        ReadError: it cannot be read, or is larger than ``limit``, 2 GiB unless given.
    """
    limit = MAX_BYTES if limit is None else limit
    try:
        size = file.stat().st_size
        if size > limit:
            raise ReadError(
                file,
                expected=f"annotations of at most {limit >> 20} MiB",
                got=f"{size / 2**20:.0f} MiB",
                hint="Export them as a label image instead.",
            )
        return file.read_bytes()
    except OSError as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(file, expected="a readable file", got=error.strerror or type(error).__name__) from error
