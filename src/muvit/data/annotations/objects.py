"""Annotated objects, whatever file they come from."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from muvit.data.annotations.config import UNCLASSIFIED
from muvit.errors import ReadError

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
        polygons = self._multipolygons()
        is_invalid = ~shapely.is_valid(polygons)
        polygons[is_invalid] = shapely.make_valid(polygons[is_invalid], method="structure", keep_collapsed=False)
        has_area = shapely.area(polygons) > 0
        self.num_without_area += int((~has_area).sum())
        self._warn(int(is_invalid.sum()), "outlines crossed themselves and were repaired: what they enclose is kept")
        self._warn(self.num_without_area, "objects without an area (points, lines) were left out")
        if not has_area.any():
            raise ReadError(
                self.file,
                expected="annotated areas",
                got="no polygon",
                hint="If nothing is there to annotate, draw a Region* around what was looked at; else leave file and "
                "image out.",
            )
        names = tuple(name for name, kept in zip(self.names, has_area, strict=True) if kept)
        return Annotations(file=self.file, polygons=polygons[has_area], class_names=names, colors=self.colors)

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

    def _warn(self, count: int, what: str) -> None:
        if count:
            _LOG.warning("%s: %d %s", self.file, count, what)


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


def read_bytes(file: Path) -> bytes:
    """The content of a file of annotations.

    Raises:
        ReadError: it cannot be read, or is larger than 2 GiB.
    """
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise ReadError(
                file,
                expected=f"annotations of at most {MAX_BYTES >> 30} GiB",
                got=f"{size / 2**30:.1f} GiB",
                hint="Export them as a label image instead.",
            )
        return file.read_bytes()
    except OSError as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(file, expected="a readable file", got=error.strerror or type(error).__name__) from error
