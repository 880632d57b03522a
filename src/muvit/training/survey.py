"""Facts about labelled slides, to choose settings by: sizes, brightness, classes, and the width of their objects."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, maximum
from skimage.measure import label as connected_components

from muvit.data.annotations.objects import AnnotationConfig
from muvit.data.crops.balance import locate_classes
from muvit.data.folders import class_legend, open_labelled_folder
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.labels import BACKGROUND

_MAX_SLIDES = 12
"""Slides that are looked into, spread over the folder."""
_WINDOW_PX = 256
_WINDOWS = 6
"""Windows that are read of each slide, and around each class on it."""


@dataclass(frozen=True, kw_only=True)
class ClassFacts:
    """A class in the labels."""

    value: int
    """Its label value."""
    name: str
    """Its name."""
    share: float
    """Share of all labelled pixels."""
    width_px: float
    """Width of its objects in world pixels, twice the largest distance from a pixel of an object to its outside: half
    of the pixels of the class lie in wider ones. 512 where windows of 256 pixels show nothing else."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Facts about a folder of labelled 2D slides."""

    slides: tuple[Slide, ...]
    """All slides."""
    labels: tuple[Slide, ...]
    """Labels of each."""
    classes: tuple[ClassFacts, ...]
    """Classes that occur, by value; ignored values are left out."""
    ignored: tuple[int, ...]
    """Label values that are no class: beyond a gap after the others, as 255 is."""
    brightness: tuple[tuple[float, float], ...]
    """Lower and upper percentile (0.2 and 99.8) of the pixels of each slide that was looked into."""

    @property
    def foreground(self) -> tuple[ClassFacts, ...]:
        """Classes without the background, if there is one."""
        has_background = self.labels[0].has_background
        return tuple(one for one in self.classes if one.value != BACKGROUND or not has_background)

    @property
    def longest_side(self) -> int:
        """Pixels of the longest side of any slide."""
        return max(max(slide.shape) for slide in self.slides)

    @property
    def shortest_side(self) -> int:
        """Pixels of the shortest side of any slide."""
        return min(min(slide.shape) for slide in self.slides)


def survey_folder(folder: Path, annotations: AnnotationConfig | None = None) -> Survey:
    """Look into the labelled slides of a folder.

    Of at most 12 slides a few windows are read, and the coarse scan of labels that `locate_classes` makes.

    Args:
        folder: holds ``images`` and ``labels``; or a table of slides.
        annotations: what annotations stand for, as in a recipe.

    Raises:
        ReadError: a folder or slide cannot be read.
        InputError: the slides are no 2D images of one type and number of channels, or there is one class only.
    """
    pairs = open_labelled_folder(folder, annotations=annotations)
    slides, labels = (tuple(part) for part in zip(*pairs, strict=True))
    _check(slides)
    chosen = sorted({int(i) for i in np.linspace(0, len(pairs) - 1, _MAX_SLIDES)})
    rng = np.random.default_rng(0)
    brightness = tuple(_brightness(slides[i], rng) for i in chosen)
    areas: dict[int, float] = {}
    widths: dict[int, list[tuple[float, int]]] = {}
    for i in chosen:
        for found in locate_classes(i, labels[i], 1):
            areas[found.value] = areas.get(found.value, 0) + found.area
            places = found.points[:: -(-len(found.points) // _WINDOWS)] * np.array(found.spacing)
            widths.setdefault(found.value, []).extend(_widths(labels[i], found.value, places))
    ignored = {value for label in labels for value in label.ignored_labels}
    named = {value for label in labels for value in label.label_names}
    values = sorted((named | set(areas)) - ignored)
    gap = next((i for i, value in enumerate(values) if value != i), len(values))
    ignored |= set(values[gap:])
    if gap < 2:
        expected = "labels of at least two classes, with values 0, 1 and so on"
        raise InputError(folder, expected=expected, got=f"the values {', '.join(map(str, values))}")
    names, total = class_legend(labels[0], gap)[0], sum(area for value, area in areas.items() if value not in ignored)
    classes = tuple(
        ClassFacts(
            value=value,
            name=names.get(value, f"class {value}"),
            share=areas[value] / total,
            width_px=_median(widths[value]),
        )
        for value in values[:gap]
        if value in areas
    )
    stated = {value for label in labels for value in label.ignored_labels}
    return Survey(
        slides=slides, labels=labels, classes=classes, ignored=tuple(sorted(ignored - stated)), brightness=brightness
    )


def _check(slides: Sequence[Slide]) -> None:
    first = slides[0]
    for slide in slides:
        if slide.axes != "yx":
            hint = "For volumes, start from recipes/synthetic_volumes.yaml."
            raise InputError(slide.path, expected="a 2D image", got=f"one with axes {slide.axes}", hint=hint)
        if (slide.num_channels, slide.dtype) != (first.num_channels, first.dtype):
            expected = f"{first.num_channels} channels of {first.dtype}, as {first.path} has"
            raise InputError(slide.path, expected=expected, got=f"{slide.num_channels} of {slide.dtype}")


def _window(slide: Slide, centre: Sequence[float] | NDArray[np.floating]) -> NDArray[Any]:
    """Pixels ``(C, H, W)`` of level 1 around a place, moved inside the slide."""
    size = [min(_WINDOW_PX, n) for n in slide.shape]
    axes = zip(centre, size, slide.shape, strict=True)
    return slide.read(1, [int(min(max(c - s // 2, 0), n - s)) for c, s, n in axes], size)


def _brightness(slide: Slide, rng: np.random.Generator) -> tuple[float, float]:
    windows = [_window(slide, rng.uniform(0, slide.shape).tolist()).ravel() for _ in range(_WINDOWS)]
    pixels = np.concatenate(windows).astype(np.float64)
    finite = pixels[np.isfinite(pixels)]
    low, high = np.percentile(finite, (0.2, 99.8)) if finite.size else (0.0, 0.0)
    return float(low), float(high)


def _widths(label: Slide, value: int, places: NDArray[np.floating]) -> list[tuple[float, int]]:
    """Width and number of pixels of the objects of a class in windows around some of its pixels."""
    found: list[tuple[float, int]] = []
    for place in places:
        mask = _window(label, place)[0] == value
        if mask.all():
            found.append((2.0 * _WINDOW_PX, mask.size))
            continue
        objects = connected_components(mask, connectivity=1)
        counts = np.bincount(objects.ravel())
        depth = maximum(distance_transform_edt(mask), objects, np.arange(1, len(counts)))
        found += zip((2 * np.asarray(depth)).tolist(), counts[1:].tolist(), strict=True)
    return found


def _median(weighted: Sequence[tuple[float, int]]) -> float:
    """The value below and above which lies half of the weight; 1 of none."""
    values, weights = np.array(sorted(weighted) or [(1.0, 1)]).T
    return float(values[np.searchsorted(np.cumsum(weights), weights.sum() / 2)])
