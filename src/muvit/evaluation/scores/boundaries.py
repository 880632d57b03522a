"""Agreement of the outlines of classes: boundary F1 and Hausdorff distance of whole label slides.

Boundaries are found block by block, and only their pixels are kept; nearest distances between the two sets of pixels
come from a k-d tree. So the distances are exact on a slide of any size, and the memory follows the length of the
outlines, not the area: about 100 bytes for each pixel of them.

A boundary pixel of a class is a pixel of it beside (along an axis) a pixel of another class. The border of the image
and the border of ignored pixels are not boundaries, since they are not annotated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.levels import level_factors

BLOCK_PIXELS = 1 << 22
"""Pixels of a block at most."""


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Start and size of cubes that cover an image; sides are powers of two, as chunks of pyramids mostly are."""
    side = 1 << ((BLOCK_PIXELS.bit_length() - 1) // len(shape))
    for start in product(*(range(0, extent, side) for extent in shape)):
        yield start, tuple(min(side, extent - a) for a, extent in zip(start, shape, strict=True))


def count_blocks(shape: tuple[int, ...]) -> int:
    """Number of blocks that `blocks` gives."""
    return sum(1 for _ in blocks(shape))


HAUSDORFF_PERCENTILE = 95
"""Percentage of the distances that lie within HD95."""

MAX_BOUNDARY_PIXELS = 50_000_000
"""Boundary pixels of one slide beyond which the trees would take more than about 5 GB."""


@dataclass(frozen=True, kw_only=True)
class BoundaryConfig:
    """Settings of the comparison of boundaries."""

    tolerance: float = 2.0
    """Distance up to which a boundary pixel counts as found."""
    unit: Literal["px", "um"] = "px"
    """Unit of the tolerance and of all distances: pixels of the finest level, or micrometers."""
    level: float = 1
    """Level of the label pyramids to compare at; a coarser one is faster, and exact to about one of its pixels."""

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise InputError("boundary tolerance", expected="a distance >= 0", got=self.tolerance)
        if self.unit not in ("px", "um"):
            raise InputError("boundary unit", expected="px or um", got=repr(self.unit))


@dataclass(frozen=True, kw_only=True)
class BoundaryCounts:
    """Counts of boundary pixels of one slide, or of several together; every array is ``(K)``."""

    num_true: NDArray[np.int64]
    """Boundary pixels of the truth."""
    num_predicted: NDArray[np.int64]
    """Boundary pixels of the prediction."""
    found_true: NDArray[np.int64]
    """Those of the truth with a predicted one within the tolerance."""
    found_predicted: NDArray[np.int64]
    """Those of the prediction with a true one within the tolerance."""

    @property
    def f1(self) -> NDArray[np.float64]:
        """Boundary F1 of each class: harmonic mean of the shares of predicted and of true boundary that are right.

        0 where only one of both has a boundary, NaN where none has.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            precision, recall = self.found_predicted / self.num_predicted, self.found_true / self.num_true
            f1 = 2 * precision * recall / (precision + recall)
        is_any, is_none_found = self.num_true + self.num_predicted > 0, self.found_true + self.found_predicted == 0
        return np.where(is_any, np.where(is_none_found, 0.0, f1), np.nan)


def compare_boundaries(
    prediction: Slide, truth: Slide, num_classes: int, config: BoundaryConfig, ignore: Sequence[int] = ()
) -> tuple[BoundaryCounts, NDArray[np.float64]]:
    """Compare the outlines of two label slides of one shape.

    Args:
        prediction: predicted labels, each a class.
        truth: true labels.
        num_classes: classes, background included.
        config: tolerance, unit and level.
        ignore: true values whose pixels are left out.

    Returns:
        The counts, and the 95th percentile of the Hausdorff distance of each class ``(K)``: the larger one of both
        directions, NaN where prediction or truth has no boundary of the class.

    Raises:
        InputError: a slide does not store the level, or is without pixel size though the unit asks for it, or there are
            more than `MAX_BOUNDARY_PIXELS`.
    """
    spacing = _spacing(truth, config)
    prediction.level_shape(config.level)  # refuses a level that is not stored
    true, predicted = _boundary_pixels(prediction, truth, num_classes, config, ignore)
    counts = np.zeros((4, num_classes), np.int64)
    hausdorff = np.full(num_classes, np.nan)
    for c, (t, p) in enumerate(zip(true, predicted, strict=True)):
        counts[:2, c] = len(t), len(p)
        if not len(t) or not len(p):
            continue
        to_prediction, to_truth = nearest_distances(t * spacing, p * spacing)
        counts[2:, c] = (to_prediction <= config.tolerance).sum(), (to_truth <= config.tolerance).sum()
        hausdorff[c] = max(np.percentile(d, HAUSDORFF_PERCENTILE) for d in (to_prediction, to_truth))
    num_true, num_predicted, found_true, found_predicted = counts
    found = BoundaryCounts(
        num_true=num_true, num_predicted=num_predicted, found_true=found_true, found_predicted=found_predicted
    )
    return found, hausdorff


def boundary_mask(labels: NDArray[np.integer], counted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels beside one of another label along some axis, both of them counted; all arrays ``(*space)``."""
    is_boundary = np.zeros(labels.shape, bool)
    for axis in range(labels.ndim):
        one, other = ((slice(None),) * axis + (part,) for part in (slice(None, -1), slice(1, None)))
        differs = (labels[one] != labels[other]) & counted[one] & counted[other]
        is_boundary[one] |= differs
        is_boundary[other] |= differs
    return is_boundary


def nearest_distances(
    points: NDArray[np.floating], others: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance from each of ``points`` ``(N, ndim)`` to the nearest of ``others`` ``(M, ndim)``, and the reverse."""
    trees = [cKDTree(p, balanced_tree=False, compact_nodes=False) for p in (points, others)]
    return trees[1].query(points, workers=-1)[0], trees[0].query(others, workers=-1)[0]


def _spacing(truth: Slide, config: BoundaryConfig) -> NDArray[np.float64]:
    """Size of a pixel of the level along each axis, in the unit of the config."""
    factors = np.array(level_factors(config.level, truth.ndim))
    if config.unit == "px":
        return factors
    if truth.pixel_size_um is None:
        raise InputError(
            truth.path,
            expected="a pixel size, since the boundary tolerance is in um",
            got="none",
            hint="Give the tolerance in pixels.",
        )
    return factors * truth.pixel_size_um


def _boundary_pixels(
    prediction: Slide, truth: Slide, num_classes: int, config: BoundaryConfig, ignore: Sequence[int]
) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]]:
    """Positions ``(N, ndim)`` of the boundary pixels of each class, in pixels of the level: of the truth, and of the
    prediction."""
    found: tuple[list[list[NDArray[np.int32]]], ...] = tuple([[] for _ in range(num_classes)] for _ in range(2))
    total = 0
    for start, size in blocks(truth.level_shape(config.level)):
        # a rim of one pixel shows the neighbours; beyond the image it repeats the border, where nothing differs
        window = [a - 1 for a in start], [n + 2 for n in size]
        true, predicted = (s.read(config.level, *window, padding="edge")[0] for s in (truth, prediction))
        counted = ~np.isin(true, tuple(ignore))
        for labels, pixels in zip((true, predicted), found, strict=True):
            inner = (slice(1, -1),) * labels.ndim
            is_boundary = boundary_mask(labels, counted)[inner]
            places, classes = (np.argwhere(is_boundary) + np.array(start)).astype(np.int32), labels[inner][is_boundary]
            total += len(places)
            if total > MAX_BOUNDARY_PIXELS:
                raise InputError(
                    f"boundaries of {prediction.path}",
                    expected=f"at most {MAX_BOUNDARY_PIXELS:,} pixels of them",
                    got="more",
                    hint="Compare a coarser level of the labels, or leave boundaries out.",
                )
            for c in np.unique(classes):
                pixels[int(c)].append(places[classes == c])
    empty = np.empty((0, truth.ndim), np.int32)
    true, predicted = ([np.concatenate([empty, *parts]) for parts in pixels] for pixels in found)
    return true, predicted
