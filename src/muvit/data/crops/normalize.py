"""Normalisation of pixel values of any unit to the range that a model expects.

A normalisation is a small frozen object called as ``normalization(img, valid)``:

* ``img``: array ``(L, C, *space)`` in native units and type; it is not changed;
* ``valid``: bool array ``(L, *space)``, False where a view lies outside the image (default: valid everywhere);
* result: float32 array of the same shape. Pixels that are NaN or infinite become 0.

Data sets only measure (`Scaling`) as they read pixels, and leave the arithmetic to `muvit.data.crops.stored.finish`.
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import product
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from muvit.data.crops.stain import Macenko, Reinhard, StainNormalization, measure_stains
from muvit.data.slides.slide import Slide, sample_pixels
from muvit.errors import InputError
from muvit.levels import Level


class Scaling(NamedTuple):
    """Pixels and what normalises them: ``(pixels - low) / spread``."""

    pixels: np.ndarray
    """``(L, C, *space)``, uint8, uint16 or float32."""
    low: np.ndarray
    """Native value that becomes 0, of each view and channel: float32 ``(L, C)``."""
    spread: np.ndarray
    """Native units that become 1, likewise; infinity where there is no contrast."""

    def apply(self) -> np.ndarray:
        """The normalised pixels, float32; see the module."""
        import torch  # the help of a command needs none

        from muvit.data.crops.stored import Look, finish

        pixels, low, spread = (torch.from_numpy(np.require(numbers, requirements="W")) for numbers in self)
        return finish({"img": pixels, "look": Look(low, spread)})["img"].numpy()


Measure = Callable[..., Scaling]
"""``(img, valid) -> scaling``, see the module."""

# a spread of this fraction of the largest value is rounding, not contrast
_MIN_RELATIVE_SPREAD = 1e-6


@dataclass(frozen=True)
class Percentile:
    """Map two percentiles to 0 and 1, per channel: ``(x - p_low) / (p_high - p_low)``; no clipping.

    They are those of the crop itself, or of its slide. Pixels outside the image, NaN and infinity do not enter the
    percentiles. A channel without contrast becomes 0.
    """

    kind: ClassVar[str] = "percentile"

    low: float = 1.0
    """Percentile that becomes 0."""
    high: float = 99.8
    """Percentile that becomes 1."""
    scope: Literal["view", "sample", "slide"] = "view"
    """Pixels of which percentiles are computed: of each view alone, so that a dark view looks like a bright one; of all
    views of the sample together, which keeps their contrast; or of the whole slide, which keeps that of all its crops
    (pixels as of `muvit.data.slides.slide.sample_pixels`, read once)."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 100:
            raise InputError("percentiles", expected="0 <= low < high <= 100", got=f"low {self.low}, high {self.high}")
        if self.scope not in ("view", "sample", "slide"):
            raise InputError("scope", expected="'view', 'sample' or 'slide'", got=repr(self.scope))

    def __call__(self, img: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """``(L, C, *space) -> (L, C, *space)``, float32; see the module.

        Raises:
            InputError: the scope is the slide, see `fitted`.
        """
        return self.measure(img, valid).apply()

    def measure(self, img: np.ndarray, valid: np.ndarray | None = None) -> Scaling:
        """The percentiles of the views, or of the sample.

        Raises:
            InputError: the scope is the slide, see `fitted`.
        """
        if self.scope == "slide":
            raise InputError("scope", expected="'view' or 'sample', where no slide is known", got="'slide'")
        img = _as_numbers(img)
        low, spread = (np.empty(img.shape[:2], np.float32) for _ in range(2))
        groups = [slice(None)] if self.scope == "sample" else [slice(i, i + 1) for i in range(len(img))]
        for channel, views in product(range(img.shape[1]), groups):
            seen = _seen(img[views, channel], None if valid is None else valid[views])
            low[views, channel], spread[views, channel] = self._limits(seen)
        return Scaling(img, low, spread)

    def fit(self, slide: Slide) -> Measure:
        """The normalisation by the percentiles of a slide."""
        samples = _as_numbers(sample_pixels(slide))
        low, spread = np.array([self._limits(_seen(pixels)) for pixels in samples], np.float32).T

        def measure(img: np.ndarray, valid: np.ndarray | None = None) -> Scaling:
            img = _as_numbers(img)
            return Scaling(img, *(np.tile(numbers, (len(img), 1)) for numbers in (low, spread)))

        return measure

    def _limits(self, seen: np.ndarray) -> tuple[float, float]:
        """Values that become 0, and the distance from there to those that become 1."""
        low, high = _percentiles(seen, (self.low, self.high)) if seen.size else (0.0, 0.0)
        has_contrast = high - low > _MIN_RELATIVE_SPREAD * max(abs(low), abs(high))
        return (low, high - low) if has_contrast else (0.0, math.inf)


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
        return self.measure(img, valid).apply()

    def measure(self, img: np.ndarray, valid: np.ndarray | None = None) -> Scaling:
        """The range, whatever the pixels."""
        img = _as_numbers(img)
        return Scaling(img, *(np.full(img.shape[:2], n, np.float32) for n in (self.low, self.high - self.low)))


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
        return self.measure(img, valid).apply()

    def measure(self, img: np.ndarray, valid: np.ndarray | None = None) -> Scaling:
        """The means and deviations, some means of the views themselves.

        Raises:
            InputError: the image has another number of channels.
        """
        img = _as_numbers(img)
        if img.shape[1] != len(self.mean):
            raise InputError("mean and std", expected=f"{img.shape[1]} channels, as the image has", got=len(self.mean))
        mean, std = (np.tile(np.array(values, np.float32), (len(img), 1)) for values in (self.mean, self.std))
        for view, channel in product(range(len(img)), self.local_mean):
            seen = _seen(img[view, channel], None if valid is None else valid[view])
            mean[view, channel] = seen.mean(dtype=np.float64) if seen.size else 0
        return Scaling(img, mean, std)


Normalization = Percentile | Range | Standardize | Macenko | Reinhard


_fitted: "weakref.WeakKeyDictionary[Slide, dict[Normalization, Measure]]" = weakref.WeakKeyDictionary()


def fitted(normalization: Normalization, slide: Slide) -> Measure:
    """The normalisation of the pixels of one slide, ``(img, valid) -> scaling``.

    Each process looks at a slide once, and only if the normalisation depends on the slide as a whole. Those of stains
    are applied here, since they are no scaling of channels.

    Raises:
        InputError: it is for stained sections, and the slide is none.
        ReadError: the slide cannot be read.
    """
    if isinstance(normalization, Range | Standardize):
        return normalization.measure
    if isinstance(normalization, Percentile) and normalization.scope != "slide":
        return normalization.measure
    fits = _fitted.setdefault(slide, {})
    if normalization not in fits:
        if isinstance(normalization, Percentile):
            fits[normalization] = normalization.fit(slide)
        else:
            fits[normalization] = _measure_nothing(normalization.fit(slide))
    return fits[normalization]


def _measure_nothing(normalize: Callable[..., np.ndarray]) -> Measure:
    return lambda img, valid=None: Range().measure(normalize(img, valid))


_COUNTED = (np.uint8, np.uint16)
"""Types whose values are few enough to count; float32 holds all of them exactly."""


def _as_numbers(img: np.ndarray) -> np.ndarray:
    """Pixels as they are if values of their type can be counted, else float32."""
    img = np.asarray(img)
    return img if img.dtype in _COUNTED else img.astype(np.float32, copy=False)


def _seen(pixels: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Those pixels that are finite and valid."""
    finite = np.isfinite(pixels) if pixels.dtype.kind == "f" else None
    masks = [mask for mask in (finite, valid) if mask is not None and not mask.all()]
    return pixels[np.logical_and.reduce(masks)] if masks else pixels


def _percentiles(pixels: np.ndarray, percents: tuple[float, float]) -> tuple[float, float]:
    """Two percentiles, to the last bit as `numpy.percentile` interpolates them."""
    if pixels.dtype not in _COUNTED:
        low, high = np.percentile(pixels.flatten(), percents, overwrite_input=True).tolist()
        return low, high
    flat = pixels.reshape(-1)
    import torch  # the help of a command needs none

    # counting takes a tenth of the time of sorting; torch is faster, but takes bytes that it could write only
    is_for_torch = flat.dtype == np.uint8 and flat.flags.writeable
    below = (torch.bincount(torch.from_numpy(flat)).numpy() if is_for_torch else np.bincount(flat)).cumsum()
    places = [(pixels.size - 1) * (percent / 100) for percent in percents]
    ranks = [min(int(place) + after, pixels.size - 1) for place in places for after in (0, 1)]
    a, b, c, d = below.searchsorted(ranks, side="right").tolist()
    return _between(a, b, places[0] % 1), _between(c, d, places[1] % 1)


def _between(value: int, following: int, share: float) -> float:
    step = following - value
    return value + step * share if share < 0.5 else following - step * (1 - share)


def normalization_to_dict(normalization: Normalization) -> dict[str, Any]:
    """Plain data (for YAML) that `normalization_from_dict` turns back into the same normalisation."""
    values = asdict(normalization)
    return {"kind": normalization.kind} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def normalization_from_dict(values: Mapping[str, Any]) -> Normalization:
    """Normalisation from what `normalization_to_dict` wrote: ``kind`` and the fields of that class.

    Raises:
        InputError: the kind or a field is unknown, a field is missing, or a value does not fit.
    """
    kinds = _kinds()
    given = dict(values)
    kind = given.pop("kind", None)
    if kind not in kinds:
        raise InputError("normalization", expected=f"a kind out of {sorted(kinds)}", got=repr(kind))
    allowed = {f.name for f in fields(kinds[kind])}
    if not set(given) <= allowed:
        raise InputError(f"normalization '{kind}'", expected=f"fields {sorted(allowed)}", got=sorted(given))
    try:
        return kinds[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    except TypeError as error:
        raise InputError(f"normalization '{kind}'", expected=f"numbers for {sorted(allowed)}", got=given) from error


def lacks_measured_values(values: Mapping[str, Any]) -> bool:
    """Whether settings of a normalisation leave out all that its kind takes from the training slides."""
    kind = _kinds().get(values.get("kind", ""))
    required = {f.name for f in fields(kind) if f.default is MISSING} if kind is not None else set()
    return bool(required) and not required & values.keys()


def measured_normalization(values: Mapping[str, Any], slides: Sequence[Slide], level: Level) -> Normalization:
    """The normalisation of settings that leave out what is measured: mean and deviation, or the stains of a target.

    Args:
        values: its kind, and fields that are not measured.
        slides: the training slides.
        level: level at which channels are measured; stains are measured where tissue is seen as a whole.

    Raises:
        InputError: the slides do not fit the normalisation.
        ReadError: a slide cannot be read.
    """
    kind = _kinds()[values["kind"]]
    if issubclass(kind, StainNormalization):
        return measure_stains(kind, slides)
    mean, std = measure_channels(slides, level)
    return normalization_from_dict({**values, "mean": mean, "std": std})


def _kinds() -> dict[str, Any]:
    return {kind.kind: kind for kind in (Percentile, Range, Standardize, Macenko, Reinhard)}


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
