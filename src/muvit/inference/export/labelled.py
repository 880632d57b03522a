"""Labels with their image: positions, sizes, names and colours of the labelled objects."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from muvit.data.folders import class_legend
from muvit.data.slides.derived import whole_in
from muvit.data.slides.formats import pyramid_factor
from muvit.data.slides.slide import Slide
from muvit.data.slides.whole_slide import WholeSlide
from muvit.errors import InputError
from muvit.labels import BACKGROUND
from muvit.pictures import MAX_COLORS, Color, class_colors

_ALL_VALUES = 1 << 62


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """A 2D label image, and the image that it labels.

    Labels may have other pixels than their image, as after prediction with a model without level 1, or at a pixel size.

    Raises:
        InputError: the labels are not 2D labels, or do not fit the image.
    """

    labels: Slide
    """One channel of whole numbers; 0 is background, unless the labels say otherwise (``has_background``)."""
    image: Slide | None = None
    """The image; unset, one of the size of the labels."""
    pixel_size_um: float | None = None
    """Micrometers per label pixel; unset, those of the labels, or else of the image."""
    probabilities: Slide | None = None
    """Probability of each class at the label pixels, a channel each, as `muvit predict --probabilities` writes them."""

    def __post_init__(self) -> None:
        labels, image = self.labels, self.image
        if labels.axes != "yx" or labels.num_channels != 1 or labels.dtype.kind not in "iu":
            got = f"axes {labels.axes}, {labels.num_channels} channels of {labels.dtype}"
            raise InputError(labels.path, expected="2D labels: whole numbers in one channel", got=got)
        if image is not None and (image.axes != "yx" or self._find_scale() is None):
            raise InputError(
                labels.path,
                expected=f"labels of {image.path}, which has {image.axes} {image.shape}, or of a level of it",
                got=labels.shape,
            )
        if self.probabilities is not None and self.probabilities.shape != labels.shape:
            expected = f"probabilities of the {labels.shape} pixels of {labels.path}"
            raise InputError(self.probabilities.path, expected=expected, got=self.probabilities.shape)
        if self.pixel_size_um is not None and not 0 < self.pixel_size_um < np.inf:
            raise InputError("pixel_size_um", expected="a positive number", got=self.pixel_size_um)

    @property
    def scale(self) -> tuple[float, float]:
        """Image pixels per label pixel along (y, x): by the pixel sizes, if both state one, else by the shapes."""
        scale = (1.0, 1.0) if self.image is None else self._find_scale()
        assert scale is not None
        return scale

    def _find_scale(self) -> tuple[float, float] | None:
        """The scale, or None if the labels do not cover the image."""
        assert self.image is not None
        labels, image = self.labels, self.image
        factor = pyramid_factor(image.shape, labels.shape)
        if labels.pixel_size_um is None or image.pixel_size_um is None:
            return None if factor is None else (factor, factor)
        y, x = (
            whole_in(a / b, n) for a, b, n in zip(labels.pixel_size_um, image.pixel_size_um, image.shape, strict=True)
        )
        covers = all(
            abs(n * s - m) <= 1.5 * max(s, 1) for n, s, m in zip(labels.shape, (y, x), image.shape, strict=True)
        )
        # sizes that contradict the shapes, as of an image whose size was corrected, do not count
        return (y, x) if covers else None if factor is None else (factor, factor)

    @property
    def origin(self) -> tuple[int, int]:
        """Upper-left corner (y, x) of the image in viewers, in image pixels.

        The origin of OpenSlide is the corner of the whole scan area; QuPath shows only the scanned part.
        """
        bounds = self.image.bounds if isinstance(self.image, WholeSlide) else None
        return (0, 0) if bounds is None else bounds[0]

    @property
    def pixel_um(self) -> tuple[float, ...] | None:
        """Micrometers per label pixel, (y, x); None if unknown."""
        if self.pixel_size_um is not None:
            return (self.pixel_size_um,) * 2
        if self.labels.pixel_size_um is not None:
            return self.labels.pixel_size_um
        sizes = None if self.image is None else self.image.pixel_size_um
        return None if sizes is None else tuple(size * s for size, s in zip(sizes, self.scale, strict=True))

    @property
    def pixel_area_um2(self) -> float | None:
        """Square micrometers per label pixel; None if unknown."""
        return None if self.pixel_um is None else self.pixel_um[0] * self.pixel_um[1]

    def need_pixel_area_um2(self, setting: str) -> float:
        """Square micrometers per label pixel, for a setting in micrometers.

        Raises:
            InputError: the pixel size is unknown; names the setting.
        """
        if self.pixel_area_um2 is None:
            raise InputError(
                setting,
                expected="labels with a pixel size",
                got=f"none in {self.labels.path}",
                hint="Give it by pixel_size_um (--pixel_size_um).",
            )
        return self.pixel_area_um2

    def in_pixels(self, setting: str, length_um: float) -> float:
        """A length in label pixels; pixels that are not square count by the side of a square of their area.

        Raises:
            InputError: the pixel size is unknown; names the setting.
        """
        return float(length_um / self.need_pixel_area_um2(setting) ** 0.5)

    @property
    def lowest_value(self) -> int:
        """Lowest value that is an object of its own: lower ones are background."""
        return BACKGROUND + self.labels.has_background

    @cached_property
    def class_names(self) -> dict[int, str]:
        """Names of the values that have one."""
        return class_legend(self.labels, _ALL_VALUES)[0]

    @cached_property
    def _class_colors(self) -> dict[int, Color]:
        return class_legend(self.labels, _ALL_VALUES)[1]

    def class_name(self, value: int) -> str:
        """Name of a value."""
        is_background = value == BACKGROUND and self.labels.has_background
        return self.class_names.get(value) or ("background" if is_background else f"class {value}")

    def class_color(self, value: int) -> Color:
        """Colour of a value: the labels' own, or one of `class_colors`, which repeat after 255 values."""
        if value in self._class_colors:
            return self._class_colors[value]
        index = value if value < MAX_COLORS else 1 + (value - 1) % (MAX_COLORS - 1)
        return class_colors(8 if index < 8 else MAX_COLORS)[index]  # further ones take long, and are made once
