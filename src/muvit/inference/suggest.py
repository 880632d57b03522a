"""Regions of slides to annotate next: where a model is uncertain, unlike each other, on tissue, not annotated yet."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import shapely
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from muvit.checks import Bounds, NonNegative, PositiveInt, Share, check_fields
from muvit.data.crops.placement import place_at
from muvit.data.crops.slide_crops import read_views
from muvit.data.slides.formats import store_path
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.inference.inputs import prepare_slide
from muvit.inference.predict import predict_slide
from muvit.inference.run.execution import Execution
from muvit.inference.run.label_blocks import prediction_status
from muvit.inference.run.plan import PredictOptions, Tissue
from muvit.inference.tiling.region import write_region
from muvit.inference.tiling.tissue import find_tissue
from muvit.levels import level_factors
from muvit.models.segmenter import Segmenter
from muvit.models.trained import TrainedModel, encoder_of
from muvit.progress import Progress

REGION_CLASS = "Region*"
"""Class of regions in QuPath: the extent of what is annotated."""
_COLOR = (204, 121, 167)
_STEPS = 2  # regions begin at every half of their side
_PIXELS = 8  # least pixels of the entropy along the side of a region
_CANDIDATES = 8  # most uncertain regions for each one that is wanted, whose features are compared

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
class _Candidates:
    """Regions of one slide that may be proposed."""

    slide: Slide
    """With the levels of the model."""
    boxes: NDArray[np.float64]
    """``(n, 4)``: lower y and x, upper y and x, world pixels."""
    uncertainty: NDArray[np.float64]
    """``(n,)``, highest first."""


def suggest_regions(
    trained: TrainedModel[Any],
    slides: Sequence[Slide],
    predictions: Path,
    config: SuggestConfig | None = None,
    *,
    annotated: Mapping[str, shapely.Geometry] | None = None,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> list[Suggestion]:
    """Propose regions to annotate.

    Every slide is predicted with entropy. Regions of high mean entropy that do not touch are candidates; the most
    uncertain one comes first, and then always the one with the highest product of uncertainty and distance to the
    regions before, in features of the encoder (greedy k-center, Sener and Savarese 2018, weighted by uncertainty).

    Args:
        trained: a model that labels pixels; one with a multi-resolution encoder, unless ``diversity`` is 0.
        slides: two-dimensional images, as they were opened, of different names.
        predictions: folder of the predictions, ``<slide>.ome.zarr``. What is complete there, and has an entropy, is
            used; the rest is computed, and resumed if it was interrupted.
        config: number, size and choice.
        annotated: by slide, areas in pixels as stored, (x, y), from which regions keep their distance.
        execution: devices and processes.
        progress: called after each batch of a prediction.

    Returns:
        At most ``n`` regions, by rank.

    Raises:
        InputError: slides and model do not fit each other, or a slide is no two-dimensional image.
        CheckpointError: features are wanted of a model without an encoder.
    """
    config, execution = config or SuggestConfig(), execution or Execution()
    if config.diversity:
        encoder_of(trained.model, "model")
    side = config.region_px or _view_extent(trained)
    found = []
    for slide in slides:
        if slide.axes != "yx":
            raise InputError(slide.path, expected="a two-dimensional image", got=f"axes {slide.axes}")
        entropy = _entropy(trained, slide, predictions / f"{slide.name}.ome.zarr", config, execution, progress)
        known = None if annotated is None else annotated.get(slide.name)
        ready = prepare_slide(trained.model.views, slide, trained.preprocessing)
        found.append(_candidates(ready, entropy, side, config, known))
    chosen = _most_uncertain(found, _CANDIDATES * config.n)
    features = _features(trained, chosen, execution) if config.diversity else None
    return _greedy(chosen, features, config)


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


def _view_extent(trained: TrainedModel[Any]) -> int:
    """World pixels along the longest side of the finest view."""
    size = trained.preprocessing.crop_size
    factors = level_factors(trained.model.views.levels[0], len(size))
    return math.ceil(max(n * f for n, f in zip(size, factors, strict=True)))


def _entropy(
    trained: TrainedModel[Any],
    slide: Slide,
    path: Path,
    config: SuggestConfig,
    execution: Execution,
    progress: Progress | None,
) -> Slide:
    """The entropy of a prediction, which is computed unless it is there."""
    store = store_path(path, "entropy")
    if not (prediction_status(path).state == "complete" and store.exists()):
        options = PredictOptions(entropy=True, overlap=0, tissue=config.tissue)
        predict_slide(trained, slide, path, options=options, execution=execution, progress=progress)
    return open_slide(store)


def _candidates(
    slide: Slide, entropy: Slide, side: int, config: SuggestConfig, annotated: shapely.Geometry | None
) -> _Candidates:
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
    return _Candidates(slide=slide, boxes=boxes[picked], uncertainty=uncertainty[picked])


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


def _most_uncertain(found: Sequence[_Candidates], count: int) -> list[_Candidates]:
    """The candidates of all slides without the least uncertain ones, at most ``count``."""
    every = np.sort(np.concatenate([one.uncertainty for one in found]))[::-1]
    least = every[min(count, len(every)) - 1] if len(every) else 0.0
    kept = []
    for one in found:
        is_high = one.uncertainty >= least
        kept.append(replace(one, boxes=one.boxes[is_high], uncertainty=one.uncertainty[is_high]))
    return kept


def _features(trained: TrainedModel[Any], found: Sequence[_Candidates], execution: Execution) -> NDArray[np.float64]:
    """Mean features ``(n, D)`` of the finest views that cover each region, each feature standardised."""
    model, device = trained.model, execution.devices[0]
    encoder = encoder_of(model, "model").to(device).eval()
    uses_boxes = not isinstance(model, Segmenter) or model.config.boxes == "true"
    rows: list[NDArray[np.float64]] = []
    owners: list[int] = []
    region = 0
    for one in found:
        crops = [(region + i, views) for i, box in enumerate(one.boxes) for views in _views(trained, one.slide, box)]
        region += len(one.boxes)
        for first in range(0, len(crops), execution.batch_size):
            part = crops[first : first + execution.batch_size]
            batch = default_collate([views for _, views in part])
            bbox = batch["bbox"].to(device) if uses_boxes else None
            with torch.inference_mode():
                tokens = encoder.encode(batch["img"].to(device), bbox, only_finest=True).tokens
            rows.append(tokens.mean(1).double().cpu().numpy())
            owners += [number for number, _ in part]
    if not rows:
        return np.zeros((0, encoder.config.dim))
    features = np.zeros((region, encoder.config.dim))
    np.add.at(features, owners, np.concatenate(rows))
    features /= np.bincount(owners, minlength=region)[:, None]
    return np.asarray((features - features.mean(0)) / np.maximum(features.std(0), 1e-12))


def _views(trained: TrainedModel[Any], slide: Slide, box: NDArray[np.float64]) -> Iterator[dict[str, torch.Tensor]]:
    """Views whose finest ones cover a region, evenly."""
    preprocessing, levels = trained.preprocessing, trained.model.views.levels
    config = preprocessing.crops(levels)
    shapes = [slide.level_shape(level) for level in levels]
    lower, upper = box[:2], box[2:]
    seen = np.array(config.size) * level_factors(levels[0], 2)
    counts = np.maximum(1, np.ceil((upper - lower) / seen).astype(int))
    for index in np.ndindex(*counts.tolist()):
        center = lower + (np.array(index) + 0.5) * (upper - lower) / counts
        placed = place_at(
            preprocessing.placement, shapes, levels, config.size, center.tolist(), free_views=preprocessing.free_views
        )
        views = read_views(slide, placed.windows, config)
        yield {"img": views["img"], "bbox": placed.boxes.float()}


def _greedy(
    found: Sequence[_Candidates], features: NDArray[np.float64] | None, config: SuggestConfig
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
