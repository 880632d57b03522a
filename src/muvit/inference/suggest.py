"""Regions of slides to annotate next: where a model is uncertain, unlike each other, on tissue, not annotated yet."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

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
from muvit.inference.run.plan import PredictOptions
from muvit.inference.tiling.suggestions import (
    Candidates,
    SuggestConfig,
    Suggestion,
    choose,
    find_candidates,
    most_uncertain,
)
from muvit.levels import level_factors
from muvit.models.segmenter import Segmenter
from muvit.models.trained import TrainedModel, encoder_of
from muvit.progress import Progress

_CANDIDATES = 8  # most uncertain regions for each one that is wanted, whose features are compared


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
        found.append(find_candidates(ready, entropy, side, config, known))
    chosen = most_uncertain(found, _CANDIDATES * config.n)
    features = _features(trained, chosen, execution) if config.diversity else None
    return choose(chosen, features, config)


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


def _features(trained: TrainedModel[Any], found: Sequence[Candidates], execution: Execution) -> NDArray[np.float64]:
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
