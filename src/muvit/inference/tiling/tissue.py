"""Tissue of a slide at a coarse level, so that empty glass is not computed."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muvit.data.slides.derived import with_levels
from muvit.data.slides.slide import Slide
from muvit.inference.tiling.tiles import TilePlan
from muvit.levels import Level, level_factors, level_name

_OVERVIEW_PX = 1 << 22
_BINS = 256


@dataclass(frozen=True, kw_only=True)
class TissueMask:
    """Tissue pixels of a coarse level."""

    level: Level
    """The coarse level."""
    mask: NDArray[np.bool_]
    """``(*space)`` of that level."""
    side: str
    """``dark`` or ``bright``: brightness of tissue relative to the background."""
    threshold: float
    """Brightness, from 0 to 1, between tissue and background."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, without the mask."""
        return {"level": level_name(self.level), "side": self.side, "threshold": self.threshold}


def find_tissue(slide: Slide, side: str = "auto") -> TissueMask:
    """Separate tissue from background by Otsu's threshold of brightness.

    The finest level of at most four million pixels is used, and computed where the slide has none. Brightness is the
    darkest channel where tissue is dark, as stains absorb only some colours, and otherwise the mean of the channels,
    each stretched from its lowest value to its highest. An image without contrast counts as tissue.

    Args:
        slide: the image.
        side: ``dark``, ``bright``, or ``auto``: dark for RGB of 8 bits, else bright.
    """
    from skimage.filters import threshold_otsu

    if side == "auto":
        side = "dark" if slide.num_channels == 3 and slide.dtype == np.uint8 else "bright"
    level = _overview_level(slide)
    slide = with_levels(slide, (level,))
    shape = slide.level_shape(level)
    channels = [_stretched(channel) for channel in slide.read(level, (0,) * slide.ndim, shape)]
    brightness = np.minimum.reduce(channels) if side == "dark" else np.mean(channels, axis=0)
    if brightness.min() == brightness.max():
        return TissueMask(level=level, mask=np.ones(shape, bool), side=side, threshold=float(brightness.max()))
    # scikit-image returns the centre of a histogram bin, all of which belongs to the dark side
    threshold = float(threshold_otsu(brightness, nbins=_BINS) + (brightness.max() - brightness.min()) / _BINS / 2)
    mask = brightness <= threshold if side == "dark" else brightness > threshold
    return TissueMask(level=level, mask=mask, side=side, threshold=threshold)


def tiles_with_tissue(plan: TilePlan, tissue: TissueMask) -> NDArray[np.bool_]:
    """Whether each tile of the grid writes to tissue, or within one coarse pixel of it, ``(*grid)``."""
    counts = tissue.mask.astype(np.int64)
    scale = zip(level_factors(plan.levels[0], counts.ndim), level_factors(tissue.level, counts.ndim), strict=True)
    for axis, (fine, coarse) in enumerate(scale):
        extent = counts.shape[axis]
        written = np.array([plan.written(axis, i) for i in range(plan.grid[axis])]) * (fine / coarse)
        # the last fine pixels that do not fill a coarse pixel belong to the last coarse pixel
        lower = (np.floor(written[:, 0]).astype(int) - 1).clip(0, extent - 1)
        upper = (np.ceil(written[:, 1]).astype(int) + 1).clip(1, extent)
        sums = np.concatenate([np.zeros_like(counts.take([0], axis)), counts.cumsum(axis)], axis)
        counts = sums.take(upper, axis) - sums.take(lower, axis)
    return counts > 0


def _overview_level(slide: Slide) -> Level:
    fitting = [level for level in slide.levels if math.prod(slide.level_shape(level)) <= _OVERVIEW_PX]
    if fitting:
        return fitting[0]
    coarsest = slide.levels[-1]
    factor = (math.prod(slide.level_shape(coarsest)) / _OVERVIEW_PX) ** (1 / slide.ndim)
    step = 2 ** math.ceil(math.log2(factor))
    factors = tuple(step * f for f in level_factors(coarsest, slide.ndim))
    return factors if len(set(factors)) > 1 else factors[0]


def _stretched(channel: NDArray[Any]) -> NDArray[np.float32]:
    values = np.nan_to_num(channel.astype(np.float32), posinf=0, neginf=0)
    if channel.dtype == np.uint8:
        return values / np.float32(255)
    low, high = values.min(), values.max()
    return (values - low) / max(high - low, np.finfo(np.float32).tiny)
