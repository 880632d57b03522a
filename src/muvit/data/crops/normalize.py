"""Normalisation of pixel values of any unit to the range that a model expects.

A normalisation is a small frozen object called as ``normalization(img, valid)``:

* ``img``: array ``(L, C, *space)`` in native units;
* ``valid``: bool array ``(L, *space)``, False where a view lies outside the image (default: valid everywhere);
* result: float32 array of the same shape. Pixels that are NaN or infinite become 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any, ClassVar, Literal

import numpy as np

from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.levels import Level

# a spread of this fraction of the largest value is rounding, not contrast
_MIN_RELATIVE_SPREAD = 1e-6


@dataclass(frozen=True)
class Percentile:
    """Map two percentiles of the crop itself to 0 and 1, per channel: ``(x - p_low) / (p_high - p_low)``; no clipping.

    Pixels outside the image, NaN and infinity do not enter the percentiles. A channel without contrast becomes 0.
    """

    kind: ClassVar[str] = "percentile"

    low: float = 1.0
    """Percentile that becomes 0."""
    high: float = 99.8
    """Percentile that becomes 1."""
    scope: Literal["view", "sample"] = "view"
    """Pixels of which percentiles are computed: each view alone, or all views of the sample together."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 100:
            raise InputError("percentiles", expected="0 <= low < high <= 100", got=f"low {self.low}, high {self.high}")
        if self.scope not in ("view", "sample"):
            raise InputError("scope", expected="'view' or 'sample'", got=repr(self.scope))

    def __call__(self, img: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """``(L, C, *space) -> (L, C, *space)``, float32; see the module."""
        img = np.asarray(img, dtype=np.float32)
        out = np.zeros_like(img)
        for channel in range(img.shape[1]):
            groups = [slice(None)] if self.scope == "sample" else [slice(i, i + 1) for i in range(len(img))]
            for views in groups:
                pixels = img[views, channel]
                out[views, channel] = self._stretch(pixels, None if valid is None else valid[views])
        return out

    def _stretch(self, pixels: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
        finite = np.isfinite(pixels)
        seen = pixels[finite if valid is None else finite & valid]
        if seen.size == 0:
            return np.zeros_like(pixels)
        low, high = (float(p) for p in np.percentile(seen, (self.low, self.high), overwrite_input=True))
        if high - low <= _MIN_RELATIVE_SPREAD * max(abs(low), abs(high)):
            return np.zeros_like(pixels)
        return (np.where(finite, pixels, low) - low) / (high - low)


@dataclass(frozen=True)
class Range:
    """Map a known range to 0 ... 1: ``(x - low) / (high - low)``, without clipping. 8-bit RGB: ``Range(high=255)``."""

    kind: ClassVar[str] = "range"

    low: float = 0.0
    """Native value that becomes 0."""
    high: float = 1.0
    """Native value that becomes 1."""

    def __post_init__(self) -> None:
        if not -np.inf < self.low < self.high < np.inf:
            raise InputError("range", expected="finite low < high", got=f"low {self.low}, high {self.high}")

    def __call__(self, img: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """``(L, C, *space) -> (L, C, *space)``, float32; see the module."""
        return _finite((np.asarray(img, dtype=np.float32) - self.low) / (self.high - self.low))


@dataclass(frozen=True)
class Standardize:
    """Subtract a mean and divide by a standard deviation, one of each per channel, in native units.

    Channels may have the mean of the view itself subtracted instead, of its pixels inside the image: elevation matters
    relative to its surroundings.
    """

    kind: ClassVar[str] = "standardize"

    mean: tuple[float, ...]
    """Mean of each channel."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""
    local_mean: tuple[int, ...] = ()
    """Channels, from 0, of which the mean of the view itself is subtracted instead."""

    def __post_init__(self) -> None:
        if not all(0 <= channel < len(self.mean) for channel in self.local_mean):
            raise InputError(
                "local_mean", expected=f"channels from 0 to {len(self.mean) - 1}", got=list(self.local_mean)
            )
        if (
            len(self.mean) != len(self.std)
            or not all(0 < s < np.inf for s in self.std)
            or not np.isfinite(self.mean).all()
        ):
            got = f"mean {self.mean}, std {self.std}"
            raise InputError("mean and std", expected="one finite mean and one positive std per channel", got=got)

    def __call__(self, img: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """``(L, C, *space) -> (L, C, *space)``, float32; see the module."""
        img = np.asarray(img, dtype=np.float32)
        if img.shape[1] != len(self.mean):
            raise InputError("mean and std", expected=f"{img.shape[1]} channels, as the image has", got=len(self.mean))
        per_channel = (-1, *(1,) * (img.ndim - 2))
        mean, std = (np.asarray(v, dtype=np.float32).reshape(per_channel) for v in (self.mean, self.std))
        if self.local_mean:
            mean = np.broadcast_to(mean, (len(img), *mean.shape)).copy()
            for view, channel in product(range(len(img)), self.local_mean):
                seen = np.isfinite(img[view, channel])
                seen = seen if valid is None else seen & valid[view]
                mean[view, channel] = img[view, channel][seen].mean(dtype=np.float64) if seen.any() else 0
        return _finite((img - mean) / std)


Normalization = Percentile | Range | Standardize


def _finite(img: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(img), img, np.float32(0)).astype(np.float32, copy=False)


def normalization_to_dict(normalization: Normalization) -> dict[str, Any]:
    """Plain data (for YAML) that `normalization_from_dict` turns back into the same normalisation."""
    values = asdict(normalization)
    return {"kind": normalization.kind} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def normalization_from_dict(values: Mapping[str, Any]) -> Normalization:
    """Normalisation from what `normalization_to_dict` wrote: ``kind`` and the fields of that class.

    Raises:
        InputError: the kind or a field is unknown, a field is missing, or a value does not fit.
    """
    kinds: dict[str, Callable[..., Normalization]] = {c.kind: c for c in (Percentile, Range, Standardize)}
    given = dict(values)
    kind = given.pop("kind", None)
    if kind not in kinds:
        raise InputError("normalization", expected=f"a kind out of {sorted(kinds)}", got=repr(kind))
    allowed = {f.name for f in fields(kinds[kind])}  # type: ignore[arg-type]
    if not set(given) <= allowed:
        raise InputError(f"normalization '{kind}'", expected=f"fields {sorted(allowed)}", got=sorted(given))
    try:
        return kinds[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    except TypeError as error:
        raise InputError(f"normalization '{kind}'", expected=f"numbers for {sorted(allowed)}", got=given) from error


_WINDOWS = 256
_WINDOW_PIXELS = 1 << 16


def measure_channels(slides: Sequence[Slide], level: Level) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel, in native units, for `muvit.data.crops.normalize.Standardize`.

    They are computed from 256 windows of at most 65,536 pixels at random places, which are the same in every call; all
    pixels are equally likely to be read. NaN and infinite pixels are ignored.

    Args:
        slides: of equally many channels.
        level: level at which their pixels are read.

    Raises:
        InputError: the slides have different numbers of channels, or there is a channel without contrast.
    """
    rng = np.random.default_rng(0)
    shapes = [slide.level_shape(level) for slide in slides]
    edge = round(_WINDOW_PIXELS ** (1 / len(shapes[0])))
    # windows may leave the image, or its middle would be read more often than its border
    places = np.array([math.prod(n + edge - 1 for n in shape) for shape in shapes], dtype=np.float64)
    counts, means, variances = [], [], []
    for number in rng.choice(len(slides), _WINDOWS, p=places / places.sum()):
        slide, shape = slides[number], shapes[number]
        if slide.num_channels != slides[0].num_channels:
            expected = f"{slides[0].num_channels} channels, as in {slides[0].path}"
            raise InputError(slide.path, expected=expected, got=slide.num_channels)
        first = [int(rng.integers(1 - edge, n)) for n in shape]
        start = [max(a, 0) for a in first]
        size = [min(a + edge, n) - b for a, b, n in zip(first, start, shape, strict=True)]
        pixels = slide.read(level, start, size).reshape(slide.num_channels, -1)
        pixels = pixels[:, np.isfinite(pixels).all(axis=0)].astype(np.float64)
        if pixels.size:
            counts.append(pixels.shape[1])
            means.append(pixels.mean(axis=1))
            variances.append(pixels.var(axis=1))
    if not counts:
        raise InputError("pixels of the slides", expected="finite numbers", got="NaN or infinity")
    mean = np.average(means, axis=0, weights=counts)
    # total variance: that within the windows, and that of the windows' means
    std = np.sqrt(np.average(variances + (means - mean) ** 2, axis=0, weights=counts))
    if not (std > 0).all():
        raise InputError("standard deviation of the channels", expected="contrast in every one", got=std.tolist())
    return tuple(mean.tolist()), tuple(std.tolist())
