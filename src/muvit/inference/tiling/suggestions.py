"""Regions to annotate, chosen from a map of uncertainty: on tissue, apart, unlike each other; plain data, no model."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import shapely
from numpy.typing import NDArray

from muvit.checks import Bounds, NonNegative, PositiveInt, Share, check_fields
from muvit.data.slides.slide import Slide
from muvit.inference.run.plan import Tissue
from muvit.inference.tiling.region import write_region
from muvit.inference.tiling.tissue import find_tissue
from muvit.levels import level_factors

REGION_CLASS = "Region*"
"""Class of regions in QuPath: the extent of what is annotated."""
_COLOR = (204, 121, 167)
_STEPS = 2  # regions begin at every half of their side
_PIXELS = 8  # least pixels of the entropy along the side of a region

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SuggestConfig:
    """Number, size and choice of the regions."""

    n: PositiveInt = 20
    """Regions to propose, on all slides together."""
    region_px: PositiveInt | None = None
    """Side of a region in pixels of the finest level; unset, that of the finest view of the model."""
    spacing: NonNegative = 1.0
    """Least gap between two regions, and to annotated ones, in sides of a region; 0 lets them touch."""
    tissue: Tissue = "auto"
    """Tissue that regions must hold, see muvit predict: all, auto, dark, bright or stained."""
    min_tissue: Share = 0.1
    """Least share of a region that is tissue."""
    diversity: Annotated[float, Bounds(min=0)] = 1.0
    """Weight of the distance between the features of regions: 0 takes the most uncertain ones, however alike."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A region to annotate."""

    slide: str
    """Name of the slide."""
    rank: int
    """1 is the first to annotate."""
    box: tuple[float, float, float, float]
    """Lower y and x, upper y and x, in pixels of the slide as stored."""
    uncertainty: float
    """Mean entropy of the class probabilities, from 0 (certain) to 1 (all classes equally likely)."""
    distance: float | None
    """Distance of its features to those of the nearest region before, in standard deviations; None for the first."""

    @property
    def polygon(self) -> shapely.Polygon:
        """Outline (x, y)."""
        y0, x0, y1, x1 = self.box
        return shapely.box(x0, y0, x1, y1)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Regions of one slide that may be proposed."""

    slide: Slide
    """With the levels of the model."""
    boxes: NDArray[np.float64]
    """``(n, 4)``: lower y and x, upper y and x, world pixels."""
    uncertainty: NDArray[np.float64]
    """``(n,)``, highest first."""


def find_candidates(
    slide: Slide, entropy: Slide, side: int, config: SuggestConfig, annotated: shapely.Geometry | None
) -> Candidates:
    """Regions of one slide that do not touch, the most uncertain first."""
    size = np.minimum(side, slide.shape)
    starts = [
        np.unique([*range(0, extent - n + 1, max(1, side // _STEPS)), extent - n])
        for n, extent in zip(size.tolist(), slide.shape, strict=True)
    ]
    corner = np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.float64)
    boxes = np.concatenate([corner, corner + size], axis=1)
    kept = np.ones(len(boxes), bool)
    if config.tissue != "all":
        tissue = find_tissue(slide, config.tissue)
        step = np.array(level_factors(tissue.level, 2))
        kept &= _box_means(tissue.mask.astype(np.float64), boxes, step) >= config.min_tissue
    gap = config.spacing * side
    if annotated is not None:
        scale = np.array(slide.pixel_scale[::-1])
        area = shapely.transform(annotated, lambda points: points / scale)
        shapely.prepare(area)
        y0, x0, y1, x1 = (boxes + np.array([-gap, -gap, gap, gap])).T
        around = shapely.box(x0, y0, x1, y1)
        # an outline that is shared is no overlap
        kept &= ~(shapely.intersects(area, around) & ~shapely.touches(area, around))
    uncertainty = _region_entropy(slide, entropy, boxes, side)
    order = np.flatnonzero(kept)[np.argsort(-uncertainty[kept], kind="stable")]
    picked: list[int] = []
    for index in order.tolist():  # the distance that is too small along both axes
        if not picked or (np.abs(corner[picked] - corner[index]) >= size + gap).any(1).all():
            picked.append(index)
    return Candidates(slide=slide, boxes=boxes[picked], uncertainty=uncertainty[picked])


def _region_entropy(slide: Slide, entropy: Slide, boxes: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Mean entropy in each box, from the coarsest level of which a box has enough pixels."""
    # of a prediction on the slide's own pixels, or on those of the model
    unit = np.array(slide.shape) / entropy.shape
    fine = [v for v in entropy.levels if (unit * level_factors(v, 2)).max() * _PIXELS <= side]
    level = fine[-1] if fine else entropy.levels[0]
    values = entropy.read(level, (0, 0), entropy.level_shape(level))[0].astype(np.float64)
    return _box_means(values, boxes, unit * level_factors(level, 2))


def _box_means(
    values: NDArray[np.float64], boxes: NDArray[np.float64], step: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean of the pixels ``(H, W)``, each ``step`` world pixels, whose centres lie in each box, one at least."""
    sums = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    extent = np.array(values.shape)
    low = np.minimum(np.ceil(boxes[:, :2] / step - 0.5).astype(int).clip(0), extent - 1)
    high = np.minimum(np.maximum(np.ceil(boxes[:, 2:] / step - 0.5).astype(int), low + 1), extent)
    (y0, x0), (y1, x1) = low.T, high.T
    total = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return np.asarray(total / (high - low).prod(1))


def most_uncertain(found: Sequence[Candidates], count: int) -> list[Candidates]:
    """The candidates of all slides without the least uncertain ones, at most ``count``."""
    every = np.sort(np.concatenate([one.uncertainty for one in found]))[::-1]
    least = every[min(count, len(every)) - 1] if len(every) else 0.0
    kept = []
    for one in found:
        is_high = one.uncertainty >= least
        kept.append(replace(one, boxes=one.boxes[is_high], uncertainty=one.uncertainty[is_high]))
    return kept


def choose(
    found: Sequence[Candidates], features: NDArray[np.float64] | None, config: SuggestConfig
) -> list[Suggestion]:
    """Regions by rank: each the best of the rest by uncertainty times distance to those before."""
    uncertainty = np.concatenate([one.uncertainty for one in found])
    boxes = np.concatenate([one.boxes for one in found])
    slides = [one.slide for one in found for _ in one.boxes]
    if len(boxes) < config.n:
        _LOG.warning("%d regions were asked for, and %d are far enough from each other", config.n, len(boxes))
    distance = np.full(len(boxes), np.inf)
    left = np.ones(len(boxes), bool)
    chosen: list[Suggestion] = []
    while left.any() and len(chosen) < config.n:
        weight = distance**config.diversity if chosen and features is not None else 1.0
        # of equal products, as where nothing is uncertain, the first
        best = int(np.where(left, uncertainty * weight, -1).argmax())
        slide, scale = slides[best], np.tile(slides[best].pixel_scale, 2)
        y0, x0, y1, x1 = (boxes[best] * scale).tolist()
        chosen.append(
            Suggestion(
                slide=slide.name,
                rank=len(chosen) + 1,
                box=(y0, x0, y1, x1),
                uncertainty=float(uncertainty[best]),
                distance=float(distance[best]) if np.isfinite(distance[best]) else None,
            )
        )
        left[best] = False
        if features is not None:
            apart = np.linalg.norm(features - features[best], axis=1) / math.sqrt(features.shape[1])
            distance = np.minimum(distance, apart)
    return chosen


def write_suggestions(suggestions: Sequence[Suggestion], slide: Slide, file: Path, *, overwrite: bool = False) -> None:
    """Write the regions of one slide as annotations of QuPath, of class ``Region*``, with rank and uncertainty.

    Args:
        suggestions: those of other slides are left out.
        slide: the image as it was opened.
        file: GeoJSON to write.
        overwrite: replace the file.

    Raises:
        ExistsError: the file exists and ``overwrite`` is false.
    """
    own = [one for one in suggestions if one.slide == slide.name]
    measured = [{"Rank": float(one.rank), "Uncertainty": round(one.uncertainty, 6)} for one in own]
    write_region(
        [one.polygon for one in own],
        slide,
        file,
        name=REGION_CLASS,
        color=_COLOR,
        measurements=measured,
        overwrite=overwrite,
    )
