"""What features of a slide are to be, as plain data: everything that decides the bytes of the output."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import yaml

from muvit.data.crops.placement import Placement, tile_placements
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.pyramids.spec import PyramidSpec, check_spec
from muvit.data.pyramids.writer import Shard
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.inference.inputs import check_weights
from muvit.inference.run.context import shares_contexts
from muvit.inference.run.plan import hash_model
from muvit.inference.tiling.tiles import TilePlan
from muvit.levels import Level, level_factors, level_name
from muvit.models.encoder import MuViTEncoder
from muvit.models.segmentation_model import encoder_views
from muvit.version import __version__

FeatureType = Literal["float16", "float32"]

_CHUNK_BYTES, _SHARD_BYTES = 1 << 20, 64 << 20


@dataclass(frozen=True, kw_only=True)
class LevelFeatures:
    """How the features of one level are made and stored."""

    index: int
    """Which level of the encoder it is."""
    tiling: TilePlan
    """Tiles of this level, which ends with its last patch, in their context."""
    store: PyramidSpec
    """An image with a pixel for each patch and a channel for each feature."""

    @property
    def patch(self) -> tuple[int, ...]:
        """Pixels of the level along each axis of a patch."""
        return tuple(n // m for n, m in zip(self.tiling.shape, self.store.shape, strict=True))

    @property
    def folder(self) -> str:
        """Name of its store."""
        return f"level_{level_name(self.tiling.levels[0])}"

    def in_patches(self, pixels: Sequence[int]) -> tuple[int, ...]:
        """Pixels of the level, multiples of the patch, as numbers of patches."""
        return tuple(n // p for n, p in zip(pixels, self.patch, strict=True))

    def shard(self, block: int) -> Shard:
        """The shard that a block of the tiling fills."""
        start, size = self.tiling.block(block)
        return Shard(0, self.in_patches(start), self.in_patches(size))


@dataclass(frozen=True, kw_only=True)
class FeaturePlan:
    """Everything that decides the bytes of the features of a slide."""

    levels: tuple[LevelFeatures, ...]
    """What is made, finest first."""
    preprocessing: Preprocessing
    """Crop size, normalisation, padding."""
    precision: str
    """``float32``, or ``bfloat16`` for autocast."""
    model: dict[str, str]
    """Class of the encoder, and the hash of its configuration and weights."""
    image: dict[str, Any]
    """Path, size, type, levels and fingerprint of the image."""

    @property
    def shares_contexts(self) -> bool:
        """Whether coarse crops lie on a grid where many tiles share them."""
        return self.levels[0].tiling.placement == "grid"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        levels = {f.folder: {"tiling": asdict(f.tiling), "store": f.store.to_json()} for f in self.levels}
        content: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "version": __version__,
                    "model": self.model,
                    "image": self.image,
                    "precision": self.precision,
                    "preprocessing": yaml.safe_load(self.preprocessing.to_yaml()),
                    "features": levels,
                }
            )
        )
        return content


def plan_features(
    encoder: MuViTEncoder,
    slide: Slide,
    preprocessing: Preprocessing,
    *,
    levels: Sequence[Level] | None,
    dtype: FeatureType,
    device: torch.device,
) -> FeaturePlan:
    """The plan of `extract_features`, whose arguments and errors it shares."""
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
    # a tile must begin with a patch: the last ones stick out of the image by less than one
    shapes[0] = tuple(n * p for n, p in zip(patches, patch, strict=True))
    tiling = TilePlan(
        shapes=tuple(shapes),
        levels=levels,
        crop_size=crop,
        block_size=tuple(n * p for n, p in zip(store.shard_shape(0), patch, strict=True)),
        placement=placement,
        free_views=preprocessing.free_views,
    )
    return LevelFeatures(index=index, tiling=tiling, store=store)


def _edge(pixels: float, ndim: int) -> int:
    """The largest power of two whose ``ndim``-th power is at most so many pixels."""
    return 1 << max(0, math.floor(math.log2(max(pixels, 1)) / ndim))
