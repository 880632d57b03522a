"""Tissue of a slide at a coarse level, so that empty glass is not computed."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from muvit.data.slides.derived import with_levels
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
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
    """``dark`` or ``bright``: brightness of tissue relative to the background; or ``stained``."""
    threshold: float
    """Brightness from 0 to 1, of stained tissue strength of colour, between tissue and background."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, without the mask."""
        return {"level": level_name(self.level), "side": self.side, "threshold": self.threshold}

    def points(self) -> NDArray[np.float64]:
        """Centres ``(n, ndim)`` of the tissue pixels, in world pixels."""
        return np.asarray((np.argwhere(self.mask) + 0.5) * level_factors(self.level, self.mask.ndim), np.float64)

    def polygons(self, shape: tuple[int, ...]) -> list[shapely.Polygon]:
        """Outlines of the tissue, in world pixels (x, y), of a stack those of all planes together.

        Args:
            shape: pixels of the image, axis order (t)(z)yx; the last coarse pixels may reach beyond it.
        """
        plane = np.asarray(self.mask.any(tuple(range(self.mask.ndim - 2))))
        return trace_mask(plane, level_factors(self.level, self.mask.ndim)[-2:], shape[-2:])


def trace_mask(mask: NDArray[np.bool_], step: tuple[float, ...], shape: tuple[int, ...]) -> list[shapely.Polygon]:
    """Exact outlines of the pixels of a mask that are connected by their edges, as polygons (x, y) in world pixels.

    Args:
        mask: ``(H, W)``.
        step: world pixels per pixel of the mask, (y, x).
        shape: pixels (y, x) of the image, to which outlines are cut.
    """
    from rasterio.features import shapes
    from rasterio.transform import Affine

    found = shapes(mask.astype(np.uint8), mask=mask, transform=Affine.scale(step[1], step[0]))
    image = shapely.box(0, 0, shape[1], shape[0])
    cut = [shapely.geometry.shape(outline).intersection(image) for outline, _ in found]
    return [part for area in cut for part in shapely.get_parts(area) if part.geom_type == "Polygon"]


def find_tissue(slide: Slide, side: str = "auto") -> TissueMask:
    """Separate tissue from background by Otsu's threshold of brightness, or of colour.

    The finest level of at most four million pixels is used, and computed where the slide has none. Brightness is the
    darkest channel where tissue is dark, as stains absorb only some colours, and otherwise the mean of the channels,
    each stretched from its lowest value to its highest. An image without contrast counts as tissue.

    ``stained`` tissue has colour, which grey background, dust, shadows and black pen have not, and is not the blue or
    green of a pen, see `_stained`. It suits haematoxylin with eosin or DAB, but no blue or green stains, such as
    trichrome and Alcian blue.

    Args:
        slide: the image.
        side: ``dark``, ``bright``, ``stained``, or ``auto``: dark for RGB of 8 bits, else bright.

    Raises:
        InputError: stained tissue is sought in another image than two-dimensional RGB of 8 bits.
    """
    from skimage.filters import threshold_otsu

    if side == "auto":
        side = "dark" if slide.num_channels == 3 and slide.dtype == np.uint8 else "bright"
    level = _overview_level(slide)
    slide = with_levels(slide, (level,))
    shape = slide.level_shape(level)
    channels = [_stretched(channel) for channel in slide.read(level, (0,) * slide.ndim, shape)]
    if side == "stained":
        if slide.num_channels != 3 or slide.dtype != np.uint8 or slide.ndim != 2:
            got = f"{slide.num_channels} channel(s) of {slide.dtype} and {slide.ndim} axes"
            raise InputError(slide.path, expected="RGB of 8 bits and 2 axes, for tissue stained", got=got)
        mask, threshold = _stained(np.stack(channels))
        return TissueMask(level=level, mask=mask, side=side, threshold=threshold)
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


_SMOOTHING = 1.0
_BLACK = 0.15
"""Brightness below which nothing has colour: stains let some light through."""
_DARK = 0.1
"""Added to the channels before their ratio is taken, so that dark pixels, whose ratio is noise, have little colour."""
_PEN_SATURATION, _FADED_PEN_SATURATION = 0.5, 0.05
_BLUEST = 250
"""Largest hue of a blue pen, in degrees; haematoxylin lies above wherever it is saturated."""
_STROKE_PX, _HALO_PX = 9, 24
_SPECK_PX = 16


def _stained(rgb: NDArray[np.float32]) -> tuple[NDArray[np.bool_], float]:
    """Pixels of stained tissue ``(H, W)``, and the strength of colour from which on they are.

    Strength of colour is the decadic logarithm of the brightest channel over the darkest, after division by the colour
    of the background: an optical density that a grey filter does not change, since it darkens all channels alike. The
    threshold is Otsu's of its square roots, in which folds and dense cells count for less: of the strength itself they
    raise it above pale tissue. Specks of less than 16 pixels are left out.

    Args:
        rgb: ``(3, H, W)`` from 0 to 1.
    """
    from scipy import ndimage  # takes a second to import
    from skimage.filters import threshold_otsu

    white = np.maximum(np.percentile(rgb.reshape(3, -1), 99, axis=1), 0.6)[:, None, None]
    smooth = np.stack([ndimage.gaussian_filter(channel, _SMOOTHING) for channel in (rgb / white).clip(0, 1)])
    high, low = smooth.max(0), smooth.min(0)
    strength = np.where(high < _BLACK, 0, np.log10((high + _DARK) / (low + _DARK)))
    pen = _pen_marks(smooth)
    kept = strength[~pen]
    if not kept.size or kept.min() == kept.max():
        return ~pen, 0.0
    threshold = float(threshold_otsu(np.sqrt(kept), nbins=_BINS) ** 2)
    parts, _ = ndimage.label((strength > threshold) & ~pen)
    is_large = np.bincount(parts.ravel()) >= _SPECK_PX
    is_large[0] = False
    return is_large[parts], threshold


def _pen_marks(rgb: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Pixels of blue and green pen ``(H, W)``: strokes of saturated colour, with the faded halo around them.

    Args:
        rgb: ``(3, H, W)`` from 0 to 1.
    """
    from scipy import ndimage  # takes a second to import

    red, green, _ = rgb
    high, low = rgb.max(0), rgb.min(0)
    # red is weak, and not stronger than green by more than the bluest hue has it: hue = 240 + 60 (r - g) / (max - min)
    is_cold = (red < 0.9 * high) & (red - green < (_BLUEST - 240) / 60 * (high - low))
    saturation = (high - low) / np.maximum(high, np.finfo(np.float32).tiny)
    strokes = ndimage.binary_opening(is_cold & (saturation > _PEN_SATURATION), np.ones((_STROKE_PX, _STROKE_PX)))
    if not strokes.any():
        return np.zeros(strokes.shape, bool)
    faded = strokes | (is_cold & (saturation > _FADED_PEN_SATURATION))
    halo = ndimage.binary_dilation(strokes, iterations=_HALO_PX, mask=faded)
    return np.asarray(ndimage.binary_dilation(halo, iterations=2))
