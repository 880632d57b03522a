"""From a model, a slide and options to a plan; whatever does not fit is refused here, before any work."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from muvit.data.crops.placement import Placement, tile_placements
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.pyramids.spec import PyramidSpec, check_spec
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.inference.inputs import check_weights
from muvit.inference.run.context import shares_contexts
from muvit.inference.run.plan import FeaturePlan, LabelPlan, LevelFeatures, PredictOptions, hash_model
from muvit.inference.tiling.region import tiles_in_region
from muvit.inference.tiling.tiles import TilePlan, mask_runs
from muvit.inference.tiling.tissue import find_tissue, tiles_with_tissue
from muvit.labels import BACKGROUND
from muvit.levels import Level, level_factors
from muvit.models.encoder import MuViTEncoder
from muvit.models.segmentation_model import SegmentationModel, encoder_views

_LOG = logging.getLogger(__name__)

FeatureType = Literal["float16", "float32"]

_BLOCK_BYTES = 256 << 20
_CHUNK_BYTES, _SHARD_BYTES = 1 << 20, 64 << 20


def plan_labels(
    model: SegmentationModel,
    slide: Slide,
    preprocessing: Preprocessing,
    options: PredictOptions,
    device: torch.device,
) -> LabelPlan:
    """The plan of a prediction.

    Args:
        model: takes the slide's channels and levels.
        slide: the image, as `muvit.inference.inputs.prepare_slide` gives it.
        preprocessing: normalisation and padding of crops as in training, and the classes.
        options: outputs and tiles.
        device: device of the run, which decides the precision.

    Raises:
        InputError: model, slide, preprocessing and options do not fit each other, or a weight is NaN or infinite.
    """
    _check_model(model, preprocessing)
    if any(-axis > slide.ndim for axis in options.flips):
        raise InputError("flips", expected=f"axes from -{slide.ndim} to -1", got=options.flips)
    suitable = tile_placements(preprocessing.placement)
    if options.placement not in ("auto", *suitable):
        raise InputError(
            "placement", expected=f"auto or {' or '.join(suitable)}, as in training", got=options.placement
        )
    if options.precision == "auto":
        options = replace(options, precision="bfloat16" if device.type == "cuda" else "float32")
    placement: Placement = suitable[0] if options.placement == "auto" else options.placement
    if options.placement == "auto" and shares_contexts(model, preprocessing):
        placement = "grid"
    options = replace(options, placement=placement)
    levels = model.views.levels
    shapes = tuple(slide.level_shape(level) for level in levels)
    stores = _stores(slide, shapes[0], preprocessing, options, level_factors(levels[0], slide.ndim))
    tiling = TilePlan(
        shapes=shapes,
        levels=levels,
        crop_size=preprocessing.crop_size,
        block_size=stores["labels"].shard_shape(0),
        overlap=options.overlap_px(preprocessing.crop_size),
        blend=options.blend,
        half_stride=options.half_stride,
        placement=placement,
        free_views=preprocessing.free_views,
        refines=options.refine is not None,
    )
    tiling, tissue = _choose_tiles(tiling, slide, options)
    return LabelPlan(
        tiling=tiling,
        tissue=tissue,
        stores=stores,
        preprocessing=preprocessing,
        options=options,
        model=hash_model(model),
        image=slide.identify(),
    )


def plan_features(
    encoder: MuViTEncoder,
    slide: Slide,
    preprocessing: Preprocessing,
    *,
    levels: Sequence[Level] | None,
    dtype: FeatureType,
    device: torch.device,
) -> FeaturePlan:
    """The plan of `muvit.inference.features.extract_features`, which describes arguments and errors."""
    config = encoder.config
    encoder_views(config).check_size(preprocessing.crop_size)
    check_weights(encoder)
    wanted = config.levels if levels is None else tuple(levels)
    if not wanted or any(level not in config.levels for level in wanted):
        raise InputError("levels", expected=f"levels out of {config.levels}", got=wanted)
    if dtype not in get_args(FeatureType):
        raise InputError("dtype", expected="float16 or float32", got=repr(dtype))
    suitable = tile_placements(preprocessing.placement)
    placement: Placement = "grid" if shares_contexts(encoder, preprocessing) else suitable[0]
    indices = [index for index, level in enumerate(config.levels) if level in wanted]
    return FeaturePlan(
        levels=tuple(_plan_level(encoder, slide, preprocessing, index, dtype, placement) for index in indices),
        preprocessing=preprocessing,
        precision="bfloat16" if device.type == "cuda" else "float32",
        model=hash_model(encoder),
        image=slide.identify(),
    )


def _choose_tiles(tiling: TilePlan, slide: Slide, options: PredictOptions) -> tuple[TilePlan, dict[str, Any] | None]:
    """The tiling with the tiles that are computed, and how tissue was separated from background."""
    tissue = None if options.tissue == "all" else find_tissue(slide, options.tissue)
    chosen = np.ones(tiling.grid, bool)
    if tissue is not None:
        chosen &= tiles_with_tissue(tiling, tissue)
    if options.region is not None:
        chosen &= tiles_in_region(tiling, options.region, slide.pixel_scale)
    if not chosen.all():
        level = logging.INFO if chosen.any() else logging.WARNING
        _LOG.log(level, "%s: %d of %d tiles are computed", slide.path, chosen.sum(), chosen.size)
        tiling = replace(tiling, runs=mask_runs(chosen))
    return tiling, None if tissue is None else tissue.to_json()


def _stores(
    slide: Slide,
    shape: tuple[int, ...],
    preprocessing: Preprocessing,
    options: PredictOptions,
    factors: tuple[float, ...],
) -> dict[str, PyramidSpec]:
    """Specification of each store, all in blocks of one size."""
    sizes, num_classes = slide.pixel_size_um, len(preprocessing.class_names)
    common: dict[str, Any] = {
        "shape": shape,
        "axes": slide.axes,
        "pixel_size_um": None if sizes is None else [size * f for size, f in zip(sizes, factors, strict=True)],
    }
    labels: dict[str, Any] = {
        "num_channels": 1,
        "dtype": np.uint8 if num_classes <= 256 else np.uint16,
        "kind": "label",
        "label_names": dict(enumerate(preprocessing.class_names)),
        # viewers that overlay labels on the image show the background transparent
        "label_colors": {
            i: (*rgb, 0 if i == BACKGROUND and preprocessing.has_background else 255)
            for i, rgb in enumerate(preprocessing.class_colors)
        },
        "has_background": preprocessing.has_background,
    }
    common |= _blocking(check_spec(**common, **labels), options, num_classes)
    stores = {"labels": check_spec(**common, **labels)}
    if options.probabilities is not None:
        stores["probabilities"] = check_spec(
            **common,
            num_channels=num_classes,
            dtype=options.probabilities,
            channel_names=preprocessing.class_names,
        )
    if options.entropy:
        stores["entropy"] = check_spec(**common, num_channels=1, dtype=np.float16, channel_names=("entropy",))
    return stores


def _blocking(default: PyramidSpec, options: PredictOptions, num_classes: int) -> dict[str, int]:
    """Edges of chunk and shard."""
    if options.block_px is not None:
        edge, chunk = options.block_px, min(default.chunk, options.block_px)
        if edge % chunk:
            raise InputError("block_px", expected=f"a multiple of {chunk}, or less", got=edge)
        return {"chunk": chunk, "shard": edge}
    edge, chunk = default.shard, default.chunk
    pixel_bytes = 2 + (4 * num_classes if options.overlap or options.needs_scores else 0)
    while edge // 2 >= chunk and edge // 2 % chunk == 0 and edge ** len(default.shape) * pixel_bytes > _BLOCK_BYTES:
        edge //= 2
    return {"chunk": chunk, "shard": edge}


def _check_model(model: SegmentationModel, preprocessing: Preprocessing) -> None:
    model.views.check_size(preprocessing.crop_size)
    if len(preprocessing.class_names) != model.num_classes:
        raise InputError(
            "class_names",
            expected=f"one for each of the model's {model.num_classes} classes",
            got=preprocessing.class_names,
        )
    check_weights(model)


def _plan_level(
    encoder: MuViTEncoder, slide: Slide, preprocessing: Preprocessing, index: int, dtype: str, placement: Placement
) -> LevelFeatures:
    patch, levels, crop = encoder.config.patch, encoder.config.levels[index:], preprocessing.crop_size
    shapes = [slide.level_shape(level) for level in levels]
    patches = tuple(-(-n // p) for n, p in zip(shapes[0], patch, strict=True))
    bytes_each, ndim = encoder.config.dim * np.dtype(dtype).itemsize, len(patches)
    chunk = shard = _edge(_CHUNK_BYTES / bytes_each, ndim)
    shard *= _edge(_SHARD_BYTES / bytes_each / chunk**ndim, ndim)
    sizes, factors = slide.pixel_size_um, level_factors(levels[0], ndim)
    store = check_spec(
        shape=patches,
        axes=slide.axes,
        num_channels=encoder.config.dim,
        dtype=dtype,
        levels=(1,),
        pixel_size_um=None if sizes is None else [s * f * p for s, f, p in zip(sizes, factors, patch, strict=True)],
        channel_names=[f"feature {i}" for i in range(encoder.config.dim)],
        chunk=chunk,
        shard=shard,
    )
    # tiles begin with a patch: the last ones leave the image by less than one
    shapes[0] = tuple(n * p for n, p in zip(patches, patch, strict=True))
    tiling = TilePlan(
        shapes=tuple(shapes),
        levels=levels,
        crop_size=crop,
        block_size=tuple(n * p for n, p in zip(store.shard_shape(0), patch, strict=True)),
        placement=placement,
        free_views=preprocessing.free_views,
    )
    return LevelFeatures(tiling=tiling, store=store)


def _edge(pixels: float, ndim: int) -> int:
    """Largest power of two whose ``ndim``-th power is at most ``pixels``."""
    return 1 << max(0, math.floor(math.log2(max(pixels, 1)) / ndim))
