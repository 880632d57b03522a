"""Random changes of the look of pixels: stains and colours of RGB; gamma, blur, noise, lost channels of any image.

Colours change in native units, before normalisation: a stain is a matter of how much light it absorbs, of which
percentiles of a crop know nothing. The others change normalised pixels, where one strength suits every image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from muvit.checks import Bounds, NonNegative
from muvit.data.crops.defects import Defects
from muvit.data.crops.stain import StainMap, from_density, hed_map, to_density

Drawn = TypeVar("Drawn")

PixelMap = Callable[[NDArray[Any]], NDArray[Any]]
"""From native pixels ``(L, C, *space)`` to pixels of the same shape and type."""

Probability = Annotated[float, Bounds(min=0, max=1)]
Strength = Annotated[float, Bounds(min=0, max=1)]

_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
"""Brightness, and two axes of colour (NTSC), from red, green and blue; grey has no colour."""


class ColorMap(NamedTuple):
    """A map of densities (None: they stay), then an affine one of intensities (fractions of white)."""

    stain: StainMap | None
    color: StainMap | None


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """Settings of what changes the look of a sample and leaves labels and boxes alone; all are off by default.

    One generator per sample draws everything, so that it is the same in every run.
    """

    hed: Strength = 0.0
    """RGB: stain jitter. The amounts of haematoxylin, eosin and DAB are each multiplied by a number from 1 - hed to
    1 + hed, and one from -hed to hed is added (Tellez et al. 2018; 0.05 is light, 0.2 strong)."""
    brightness: Strength = 0.0
    """RGB: colours are multiplied by a number from 1 - brightness to 1 + brightness."""
    contrast: Strength = 0.0
    """RGB: the distance from half of white is multiplied by a number from 1 - contrast to 1 + contrast."""
    saturation: Strength = 0.0
    """RGB: the distance from grey is multiplied by a number from 1 - saturation to 1 + saturation."""
    hue: Annotated[float, Bounds(min=0, max=0.5)] = 0.0
    """RGB: colours are rotated about grey by up to this share of the circle, either way."""
    gamma: tuple[float, float] = (1, 1)
    """Range of the exponent of normalised values above 0 (of fluorescence, say); needs normalisation to 0 ... 1."""
    blur_px: NonNegative = 0.0
    """Largest standard deviation of a Gaussian blur, in pixels of each view."""
    noise: NonNegative = 0.0
    """Largest standard deviation of Gaussian noise, in normalised units; the noise of pixels is independent."""
    channel_drop: Probability = 0.0
    """Probability that a channel is set to 0 after normalisation; one channel of a sample always stays."""
    appearance: Literal["alike", "independent"] = "alike"
    """Strengths of these: alike in all views of a sample, which show one slide, or drawn for each view."""

    @property
    def has_colors(self) -> bool:
        """Whether colours are changed, which only RGB images have."""
        return max(self.hed, self.brightness, self.contrast, self.saturation, self.hue) > 0

    @property
    def has_defects(self) -> bool:
        """Whether normalised pixels are changed by gamma, blur, noise or lost channels."""
        return tuple(self.gamma) != (1, 1) or max(self.blur_px, self.noise, self.channel_drop) > 0

    def draw_colors(self, rng: np.random.Generator, num_views: int, white: int) -> PixelMap:
        """Draw the change of the colours of a sample.

        Args:
            rng: source of randomness.
            num_views: views of the sample.
            white: native value of white.

        Returns:
            A map of pixels ``(L, 3, *space)``; results are rounded if their type is an integer.
        """
        maps = self._for_each_view(num_views, lambda: self._draw_map(rng))

        def recolor(pixels: NDArray[Any]) -> NDArray[Any]:
            changed = [_recolored(view, white, found) for view, found in zip(pixels, maps, strict=True)]
            return np.stack(changed)

        return recolor

    def draw_defects(self, rng: np.random.Generator, num_views: int, channels: int) -> Defects:
        """Draw blur, gamma, noise and lost channels of a sample.

        Args:
            rng: source of randomness.
            num_views: views of the sample.
            channels: channels of its images.
        """
        drawn = self._for_each_view(num_views, lambda: self._draw_defects(rng, channels))
        sigma, gamma, noise, kept = (np.array(values) for values in zip(*drawn, strict=True))
        has_gamma = tuple(self.gamma) != (1, 1)
        return Defects(
            kernel=torch.from_numpy(_gaussians(sigma, self.blur_px)) if self.blur_px else None,
            gamma=torch.from_numpy(gamma).float() if has_gamma else None,
            noise=torch.from_numpy(noise).float() if self.noise else None,
            seed=torch.from_numpy(rng.integers(1 << 31, size=num_views, dtype=np.int32)) if self.noise else None,
            kept=torch.from_numpy(kept) if self.channel_drop else None,
        )

    def _for_each_view(self, num_views: int, draw: Callable[[], Drawn]) -> list[Drawn]:
        return [draw()] * num_views if self.appearance == "alike" else [draw() for _ in range(num_views)]

    def _draw_map(self, rng: np.random.Generator) -> ColorMap:
        gain, offset = rng.uniform(1 - self.hed, 1 + self.hed, 3), rng.uniform(-self.hed, self.hed, 3)
        strengths = (self.brightness, self.contrast, self.saturation)
        brightness, contrast, saturation = (rng.uniform(1 - s, 1 + s) for s in strengths)
        turn = 2 * np.pi * rng.uniform(-self.hue, self.hue)
        stain = hed_map(gain, offset) if self.hed else None
        if not max(*strengths, self.hue):
            return ColorMap(stain, None)
        cos, sin = saturation * np.cos(turn), saturation * np.sin(turn)
        matrix = np.linalg.inv(_YIQ) @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _YIQ
        return ColorMap(stain, StainMap(contrast * brightness * matrix, np.full(3, (1 - contrast) / 2)))

    def _draw_defects(self, rng: np.random.Generator, channels: int) -> tuple[float, float, float, NDArray[np.bool_]]:
        sigma, gamma, noise = rng.uniform(0, self.blur_px), rng.uniform(*self.gamma), rng.uniform(0, self.noise)
        kept = rng.random(channels) >= self.channel_drop
        kept[rng.integers(channels)] |= not kept.any()
        return sigma, gamma, noise, kept


def _recolored(view: NDArray[Any], white: int, found: ColorMap) -> NDArray[Any]:
    values = view.reshape(3, -1)
    if found.stain is not None:
        values = from_density(found.stain(to_density(values, white)), white)
    if found.color is not None:
        values = found.color(values.astype(np.float32) / np.float32(white)) * np.float32(white)
    values = values.clip(0, white)
    rounded = np.rint(values) if view.dtype.kind == "u" else values
    return rounded.astype(view.dtype).reshape(view.shape)


def _gaussians(sigma: NDArray[np.float64], largest: float) -> NDArray[np.float32]:
    """Weights of Gaussian blurs ``(L, K)``, each cut off at four of its deviations; K fits the largest."""
    offsets = np.arange(2 * int(4 * largest + 0.5) + 1) - int(4 * largest + 0.5)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights[:, offsets == 0] = 1  # also of no blur
    weights[np.abs(offsets) > np.floor(4 * sigma[:, None] + 0.5)] = 0
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
