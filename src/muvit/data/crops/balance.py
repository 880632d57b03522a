"""Sampling: the order of the samples of an epoch, and crops that show the classes equally often."""

import hashlib
import json
import logging
import math
import operator
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from muvit.data.slides.slide import Slide
from muvit.durable import write_whole
from muvit.errors import InputError
from muvit.labels import BACKGROUND
from muvit.levels import Level, level_factors, level_name

_LOG = logging.getLogger(__name__)


class EpochSampler(Sampler[int]):
    """Sample numbers that never repeat: epoch ``e`` of a data set of ``n`` samples is ``e * n ... (e + 1) * n - 1``.

    A data set that derives each sample from its number alone (`NestedCrops`) thus shows new crops in every epoch, the
    same ones for any number of workers or processes, and a run that is resumed in mid-epoch continues where it stopped.

    Args:
        num_samples: samples per epoch, over all processes.
        epoch: first epoch.
        start: samples of that epoch, over all processes, that were already drawn.
        rank: number of this process.
        num_replicas: number of processes, which take turns; a remainder that does not divide evenly is dropped.

    Raises:
        InputError: a number is out of range.
    """

    def __init__(
        self, num_samples: int, *, epoch: int = 0, start: int = 0, rank: int = 0, num_replicas: int = 1
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise InputError("rank", expected=f"0 <= rank < {num_replicas} replicas", got=rank)
        if not 0 <= start <= num_samples or epoch < 0:
            got = f"start {start} of {num_samples} samples in epoch {epoch}"
            raise InputError("start", expected="0 <= start <= samples per epoch, epoch >= 0", got=got)
        self.num_samples = num_samples
        self.epoch = epoch
        self.start = start
        self.rank = rank
        self.num_replicas = num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch, which begins at its first sample if it is another (called by Lightning)."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Samples of a whole epoch for this process, also of one that was begun before."""
        return self.num_samples // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.num_samples + self.start + self.rank
        remaining = (self.num_samples - self.start) // self.num_replicas
        return iter(range(first, first + remaining * self.num_replicas, self.num_replicas))


Balance = Literal["none", "foreground", "classes"]

_MAX_READ_PX = 2**24  # of one label image: a slide of 100,000 px is read at 1/32, where cells are still there
_MAX_SCANNED_PX = 2**20  # of which every n-th pixel is scanned
_MAX_BLOCK_PX = 2**22
_MAX_POINTS = 1024  # kept per class and slide


class ClassPixels(NamedTuple):
    """Pixels of one class in one label image, as found in a coarse scan."""

    slide: int
    """Index of the label image."""
    value: int
    """The class, as stored."""
    area: float
    """World pixels of the class, estimated."""
    points: np.ndarray
    """``(n, ndim)``, some of its pixels, evenly chosen, as multiples of ``spacing``."""
    spacing: tuple[float, ...]
    """World pixels between scanned pixels along each axis."""


def locate_classes(slide: int, label: Slide, level: Level) -> list[ClassPixels]:
    """Find the places of each class in a coarse scan of a label image, in bounded time and memory.

    Reads the finest stored level of at most 16 million pixels, or else the coarsest, block by block, and scans every
    n-th of its pixels, at most a million. A class that has vanished at that level is not found.

    What is found is kept in a hidden file, ``.classes.json`` in the folder of the label image, or beside its file
    ``.<name>.classes.json``, if that can be written, and read from there until the labels are written again.

    Args:
        slide: index of the label image, for the result.
        label: the label image.
        level: level at which labels will be used; nothing finer is scanned.
    """
    version = label.version()
    if version is None:
        return _find_classes(slide, label, level)
    levels = [level_name(known) for known in (*label.stored_levels, level)]
    facts = [_INDEX_FORMAT, version, label.name, label.shape, str(label.dtype), levels]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    is_folder = label.path.is_dir()
    file = label.path / ".classes.json" if is_folder else label.path.with_name(f".{label.name}.classes.json")
    found = _read_index(slide, label.ndim, file, key)
    if found is None:
        found = _find_classes(slide, label, level)
        _write_index(found, file, key)
    return found


_INDEX_FORMAT = 1


def _read_index(slide: int, ndim: int, file: Path, key: str) -> list[ClassPixels] | None:
    """The index that `_write_index` wrote of these labels, or None."""
    try:
        index = json.loads(file.read_bytes())
        if index["key"] != key:
            return None
        return [
            ClassPixels(slide, value, area, np.array(points, np.int32).reshape(-1, ndim), tuple(spacing))
            for value, area, points, spacing in index["classes"]
        ]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _write_index(found: Sequence[ClassPixels], file: Path, key: str) -> None:
    classes = [(entry.value, entry.area, entry.points.tolist(), entry.spacing) for entry in found]
    try:
        write_whole(file, json.dumps({"key": key, "classes": classes}).encode())
    except OSError as error:
        _LOG.debug("classes of labels are not kept: %s", error)


def _find_classes(slide: int, label: Slide, level: Level) -> list[ClassPixels]:
    seen, spacing = _scan(label, level)
    flat = seen.ravel()
    order = np.argsort(flat, kind="stable")
    values, firsts, counts = np.unique(flat[order], return_index=True, return_counts=True)
    found = []
    for value, first, count in zip(values.tolist(), firsts.tolist(), counts.tolist(), strict=True):
        chosen = order[first : first + count : math.ceil(count / _MAX_POINTS)]
        points = np.stack(np.unravel_index(chosen, seen.shape), axis=-1).astype(np.int32)
        found.append(ClassPixels(slide, int(value), count * math.prod(spacing), points, spacing))
    return found


def _scan(label: Slide, finest: Level) -> tuple[np.ndarray, tuple[float, ...]]:
    """Pixels of a label image on a coarse grid ``(*space)``, and the grid's spacing per axis in world pixels."""
    least = level_factors(finest, label.ndim)
    # levels that are not stored cost reading the finest
    usable = [v for v in label.stored_levels if all(map(operator.ge, level_factors(v, label.ndim), least))] or [finest]
    small = (level for level in usable if math.prod(label.level_shape(level)) <= _MAX_READ_PX)
    level = next(small, usable[-1])
    shape = label.level_shape(level)
    step = math.ceil((math.prod(shape) / _MAX_SCANNED_PX) ** (1 / len(shape)))
    block = step * max(1, int(_MAX_BLOCK_PX ** (1 / len(shape))) // step)
    seen = np.empty([math.ceil(n / step) for n in shape], dtype=label.dtype)
    for start in product(*(range(0, n, block) for n in shape)):
        size = tuple(min(block, n - a) for a, n in zip(start, shape, strict=True))
        pixels = label.read(level, start, size)[0][(slice(None, None, step),) * len(shape)]
        seen[tuple(slice(a // step, a // step + n) for a, n in zip(start, pixels.shape, strict=True))] = pixels
    return seen, tuple(factor * step for factor in level_factors(level, label.ndim))


class ForegroundIndex:
    """Draw foreground pixels from a set of label images.

    ``foreground``: uniformly over all foreground pixels. ``classes``: first one of the foreground classes, all
    equally likely, then uniformly over its pixels.

    Args:
        labels: the label images.
        found: the results of `locate_classes` for them.
        level: level at which pixels are wanted, stored in every label image.
        balance: ``foreground`` or ``classes``.
        not_foreground: stored values of the background and of ignored labels.

    Raises:
        InputError: there is no foreground.
    """

    def __init__(
        self,
        labels: Sequence[Slide],
        found: Sequence[ClassPixels],
        *,
        level: Level,
        balance: Balance,
        not_foreground: Sequence[int] = (BACKGROUND,),
    ) -> None:
        foreground = [entry for entry in found if entry.value not in not_foreground]
        if not foreground:
            raise InputError(f"balance '{balance}'", expected="labels with some foreground", got="background only")
        self._labels = tuple(labels)
        self._level = level
        groups: dict[int, list[ClassPixels]] = {}
        for entry in foreground:
            groups.setdefault(entry.value if balance == "classes" else 0, []).append(entry)
        self._groups = [(np.cumsum([entry.area for entry in group]), group) for group in groups.values()]

    def draw(self, rng: np.random.Generator) -> tuple[int, tuple[int, ...]]:
        """Index of a label image and one of its foreground pixels ``(ndim)``, in pixels of the wanted level."""
        areas, group = self._groups[rng.integers(len(self._groups))]
        entry = group[int(np.searchsorted(areas, rng.random() * areas[-1], side="right"))]
        return entry.slide, self._refine(rng, entry, entry.points[rng.integers(len(entry.points))])

    def _refine(self, rng: np.random.Generator, entry: ClassPixels, point: np.ndarray) -> tuple[int, ...]:
        """A pixel of the class in the area of one scanned pixel; its middle if the class is not found there."""
        label = self._labels[entry.slide]
        ratio = np.array(entry.spacing) / level_factors(self._level, label.ndim)
        last = np.array(label.level_shape(self._level)) - 1
        start = np.minimum(np.floor(point * ratio).astype(int), last)
        size = np.clip(np.ceil((point + 1) * ratio).astype(int), start + 1, last + 1) - start
        offset = size // 2
        if size.max() > 1:
            pixels = label.read(self._level, tuple(start.tolist()), tuple(size.tolist()))[0]
            hits = np.argwhere(pixels == entry.value)
            offset = hits[rng.integers(len(hits))] if len(hits) else offset
        return tuple((start + offset).tolist())
