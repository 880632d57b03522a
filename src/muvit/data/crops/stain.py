"""Stains of histological sections: optical density, the maps that change stains, and normalisation to a common look.

Stains absorb light exponentially (Beer and Lambert), so their optical densities add up where intensities do not. The
density of a colour value is ``-log((value + 1) / (white + 1))``: 0 for white, finite for 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from muvit.data.slides.slide import Slide, sample_pixels
from muvit.errors import InputError

Array = NDArray[Any]
Color = tuple[float, float, float]

_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED = _HED / np.linalg.norm(_HED, axis=1, keepdims=True)
"""Densities (red, green, blue) of unit length of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001)."""


def check_colors(slide: Slide, subject: str) -> None:
    """Refuse a slide whose pixels are not colours.

    Colours are three channels of bytes, or of another unsigned type if they are named red, green and blue.

    Args:
        slide: the image.
        subject: the setting that needs colours.

    Raises:
        InputError: it is another image.
    """
    is_named = tuple(name.lower() for name in slide.channel_names) == ("red", "green", "blue")
    if not (slide.num_channels == 3 and (slide.dtype == np.uint8 or (is_named and slide.dtype.kind == "u"))):
        got = f"{slide.num_channels} channel(s) of {slide.dtype}, {', '.join(slide.channel_names)}, in {slide.path}"
        raise InputError(subject, expected="RGB images of 8 bits, or of more whose channels are so named", got=got)


def check_stained(slide: Slide) -> None:
    """Refuse a slide that stains cannot be normalised in.

    Raises:
        InputError: it is not a flat image of colours.
    """
    check_colors(slide, "normalization macenko or reinhard")
    if slide.ndim != 2:
        raise InputError(
            "normalization macenko or reinhard", expected="flat images", got=f"{slide.path}, {slide.shape}"
        )


def white_of(slide: Slide) -> int:
    """Value of white in a slide of colours."""
    return int(np.iinfo(slide.dtype).max)


def to_density(values: Array, white: int) -> Array:
    """Optical densities, float32, of colour values of any numeric type; those above white are taken for white."""
    if values.dtype == np.uint8 and white == 255:
        return _byte_densities()[values]
    light = np.minimum(values, white).astype(np.float32)
    return -np.log((np.maximum(light, 0) + 1) / np.float32(white + 1))


def from_density(density: Array, white: int) -> Array:
    """Colour values, float32, from 0 to ``white``; the inverse of `to_density`."""
    return np.clip((white + 1) * np.exp(-density) - 1, 0, white)


def _byte_densities() -> Array:
    return -np.log((np.arange(256, dtype=np.float32) + 1) / np.float32(256))


@dataclass(frozen=True)
class StainMap:
    """An affine map of densities ``(3, n)``: ``matrix @ density + offset[:, None]``."""

    matrix: Array
    """``(3, 3)``."""
    offset: Array
    """``(3)``."""

    def __call__(self, density: Array) -> Array:
        """Mapped densities ``(3, n)``, float32."""
        mapped = self.matrix.astype(np.float32) @ density
        mapped += self.offset.astype(np.float32)[:, None]
        return mapped


def hed_map(gain: ArrayLike, offset: ArrayLike) -> StainMap:
    """Map of densities whose haematoxylin, eosin and DAB become ``gain * amount + offset`` (Tellez et al. 2018)."""
    # columns are the stains: density = HED.T @ amounts
    matrix = HED.T @ np.diag(gain) @ np.linalg.inv(HED.T)
    return StainMap(matrix, HED.T @ np.asarray(offset, float))


_TISSUE_DENSITY = 0.15
"""Mean density of the three colours from which a pixel counts as tissue (Macenko et al. 2009)."""
_FEWEST, _MOST = 1000, 200_000


def tissue_densities(slide: Slide) -> Array | None:
    """Densities ``(3, n)`` of tissue of a slide, from the same pixels in every call; None if there is hardly any.

    The pixels are those of `muvit.data.slides.slide.sample_pixels`.

    Raises:
        InputError: the slide is not a flat image of colours.
    """
    check_stained(slide)
    density = to_density(sample_pixels(slide), white_of(slide))
    density = density[:, density.mean(axis=0) > _TISSUE_DENSITY]
    if density.shape[1] < _FEWEST:
        return None
    return density[:, :: -(-density.shape[1] // _MOST)]


@dataclass(frozen=True)
class Macenko:
    """Give every slide the two stains of a target in equal strength (Macenko et al. 2009).

    The stains of a slide are the extreme directions (1st and 99th percentile of the angle) of the densities of its
    tissue in the plane of their two largest variances; their strength is the 99th percentile of the amount. What lies
    outside that plane is lost. Results are fractions of white. A slide with hardly any tissue stays as it is.
    """

    kind: ClassVar[str] = "macenko"

    first: Color
    """Density (red, green, blue) of the stain that absorbs more red, of unit length."""
    second: Color
    """That of the other stain."""
    strengths: tuple[float, float]
    """Amount of each that 99 % of the tissue stay below."""

    def __post_init__(self) -> None:
        numbers = (*self.first, *self.second, *self.strengths)
        if len(numbers) != 8 or not np.isfinite(numbers).all() or min(self.strengths) <= 0:
            expected = "two densities of three colours each, and two strengths above 0"
            raise InputError("stains", expected=expected, got=f"{self.first}, {self.second}, {self.strengths}")

    def fit(self, slide: Slide) -> Callable[..., Array]:
        """As `fit_stains`."""
        return fit_stains(self, slide)

    @classmethod
    def of_tissue(cls, density: Array) -> "Macenko":
        """The stains of densities ``(3, n)``."""
        # the plane of the two largest variances; its first axis points to more stain
        plane = np.linalg.eigh(np.cov(density))[1][:, :0:-1]
        plane = plane * np.where(plane.sum(axis=0) < 0, -1, 1)
        along, across = plane.T @ density
        angles = np.percentile(np.arctan2(across, along), (1, 99))
        stains = plane @ np.stack([np.cos(angles), np.sin(angles)])
        stains = stains[:, np.argsort(-stains[0])]
        strengths = np.percentile(np.linalg.pinv(stains) @ density, 99, axis=1)
        first, second = stains.T.tolist()
        return cls(tuple(first), tuple(second), tuple(np.maximum(strengths, 1e-3).tolist()))

    @property
    def _stains(self) -> Array:
        return np.array([self.first, self.second]).T

    def map_from(self, density: Array) -> StainMap:
        """Map of densities ``(3, n)`` of a slide whose tissue has these densities."""
        found = Macenko.of_tissue(density)
        scale = np.diag(np.divide(self.strengths, found.strengths))
        return StainMap(self._stains @ scale @ np.linalg.pinv(found._stains), np.zeros(3))


_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_OPPONENT = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])


@dataclass(frozen=True)
class Reinhard:
    """Give the tissue of every slide the mean and deviation of a target (Reinhard et al. 2001).

    Both are those of l, alpha and beta, made of logarithms of what the cones of the eye receive. Glass moves with the
    tissue, and may get a tint. Results are fractions of white. A slide with hardly any tissue stays as it is.
    """

    kind: ClassVar[str] = "reinhard"

    mean: Color
    """Mean of l, alpha and beta."""
    std: Color
    """Standard deviation of each."""

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or not np.isfinite(self.mean).all() or not min(self.std) > 0:
            got = f"mean {self.mean}, std {self.std}"
            raise InputError("mean and std", expected="three finite means and three deviations above 0", got=got)

    def fit(self, slide: Slide) -> Callable[..., Array]:
        """As `fit_stains`."""
        return fit_stains(self, slide)

    @classmethod
    def of_tissue(cls, density: Array) -> "Reinhard":
        """Mean and deviation of densities ``(3, n)``."""
        colors = _to_opponent(density)
        mean, std = colors.mean(axis=1, dtype=np.float64), colors.std(axis=1, dtype=np.float64)
        return cls(tuple(mean.tolist()), tuple(np.maximum(std, 1e-6).tolist()))

    def map_from(self, density: Array) -> Callable[[Array], Array]:
        """Map of densities ``(3, n)`` of a slide whose tissue has these densities."""
        found = Reinhard.of_tissue(density)
        gain = np.divide(self.std, found.std)
        offset = np.asarray(self.mean) - gain * found.mean
        move = StainMap(np.diag(gain), offset)
        return lambda density: _from_opponent(move(_to_opponent(density)))


def _to_opponent(density: Array) -> Array:
    cones = np.float32(_LMS) @ np.exp(-density)
    return np.float32(_OPPONENT) @ np.log10(cones)


def _from_opponent(colors: Array) -> Array:
    cones = 10 ** (np.float32(np.linalg.inv(_OPPONENT)) @ colors)
    return -np.log(np.maximum(np.float32(np.linalg.inv(_LMS)) @ cones, np.float32(1e-6)))


StainNormalization = Macenko | Reinhard


def fit_stains(normalization: StainNormalization, slide: Slide) -> Callable[..., Array]:
    """The normalisation of the pixels of one slide: ``(img, valid) -> img``.

    It takes pixels ``(L, 3, *space)`` in native units and gives float32 fractions of white, as the normalisations of
    `muvit.data.crops.normalize` do.

    Raises:
        InputError: the slide is not a flat image of colours.
        ReadError: it cannot be read.
    """
    density, white = tissue_densities(slide), white_of(slide)
    stain_map = None if density is None else normalization.map_from(density)
    return lambda img, valid=None: _normalize(np.asarray(img), stain_map, white)


def _normalize(img: Array, stain_map: Callable[[Array], Array] | None, white: int) -> Array:
    out = np.empty(img.shape, np.float32)
    for view, target in zip(img, out, strict=True):
        if stain_map is None:
            target[...] = view
        else:
            density = stain_map(to_density(view.reshape(3, -1), white))
            target[...] = from_density(density, white).reshape(view.shape)
    out /= np.float32(white)
    return out


def measure_stains(kind: type[StainNormalization], slides: Sequence[Slide]) -> StainNormalization:
    """The target that slides have in common: the median of the values of each.

    Args:
        kind: `Macenko` or `Reinhard`.
        slides: images of colours.

    Raises:
        InputError: a slide is not a flat image of colours, or none holds tissue.
        ReadError: a slide cannot be read.
    """
    densities = (tissue_densities(slide) for slide in slides)
    found = [kind.of_tissue(density) for density in densities if density is not None]
    if not found:
        raise InputError("stain normalisation", expected="slides with tissue", got="none with any")
    names = [field.name for field in fields(kind)]
    values = {name: np.median([getattr(fit, name) for fit in found], axis=0) for name in names}
    if kind is Macenko:
        for name in ("first", "second"):
            values[name] /= np.linalg.norm(values[name])
    return kind(**{name: tuple(value.tolist()) for name, value in values.items()})
