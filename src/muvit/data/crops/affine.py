"""Views scaled and rotated about a common centre, resampled from the pixels of a slide (Relay Tokens).

The pixels of a view lie on a rotated grid of its level. The smallest window of whole pixels around that grid is read;
images are interpolated linearly, labels take the nearest pixel.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muvit.data.crops.placement import Window
from muvit.data.slides.slide import Padding, Slide
from muvit.levels import Level, level_factors

_DECIMALS = 9
"""Decimals to which sines, cosines and window edges are rounded, so that quarter turns fall on pixels exactly."""


@dataclass(frozen=True)
class Similarity:
    """Scale and rotation of the views of a sample about their common centre."""

    scale: float = 1.0
    """Side of what a view shows, relative to its pixels: 2 shows twice as much, 0.5 half as much of the scene."""
    degrees: float = 0.0
    """Rotation of the content in the plane of y and x, counter-clockwise as `numpy.rot90`."""

    @property
    def is_identity(self) -> bool:
        """Whether views stay unchanged."""
        return self.scale == 1 and self.degrees == 0

    def extent(self, size: Sequence[int]) -> tuple[int, ...]:
        """Whole pixels of a level that an unrotated view of ``size`` pixels covers, ``(ndim)``."""
        return tuple(math.ceil(round(n * self.scale, _DECIMALS)) for n in size)

    def matrix(self, level: Level, ndim: int) -> NDArray[np.float64]:
        """From an offset in pixels of a view to that in pixels of its level, ``(ndim, ndim)``, axes (t)(z)yx."""
        factors = np.array(level_factors(level, ndim))
        turn = np.eye(ndim)
        angle = math.radians(self.degrees)
        cos, sin = round(math.cos(angle), _DECIMALS), round(math.sin(angle), _DECIMALS)
        turn[-2:, -2:] = [[cos, sin], [-sin, cos]]
        # rotated in world pixels, which are isotropic even where those of the level are not
        return turn * factors * self.scale / factors[:, None]


@dataclass(frozen=True)
class SimilarView:
    """One view of a scaled and rotated sample.

    Args:
        level: where it is read.
        center: its centre in world pixels, ``(ndim)``.
        size: its pixels, ``(ndim)``.
        similarity: scale and rotation.
    """

    level: Level
    center: tuple[float, ...]
    size: tuple[int, ...]
    similarity: Similarity

    @property
    def box(self) -> Tensor:
        """World box ``(2, ndim)``, float64: the extent after scaling, in the frame that is rotated with the content."""
        factors = np.array(level_factors(self.level, len(self.size)))
        half = factors * self.size * self.similarity.scale / 2
        return torch.from_numpy(np.stack([self.center - half, self.center + half]))

    @cached_property
    def window(self) -> Window:
        """The window of its level that holds all pixels that it is resampled from."""
        reach = np.abs(self._matrix) @ ((np.array(self.size) - 1) / 2)
        low = np.floor(np.round(self._middle - reach, _DECIMALS)).astype(int)
        high = np.ceil(np.round(self._middle + reach, _DECIMALS)).astype(int)
        return Window(self.level, tuple(low.tolist()), tuple((high - low + 1).tolist()))

    def sample(self, pixels: NDArray[Any], *, linear: bool) -> NDArray[Any]:
        """The view's pixels ``(*size)`` from those of its window ``(*window.size)``, interpolated or the nearest."""
        from scipy.ndimage import affine_transform  # takes a second to import

        view = np.empty(self.size, pixels.dtype)
        offset = self._middle - self.window.start - self._matrix @ ((np.array(self.size) - 1) / 2)
        affine_transform(
            pixels,
            self._matrix,
            np.round(offset, _DECIMALS),
            output_shape=self.size,
            output=view,
            order=int(linear),
            mode="nearest",
        )
        return view

    def shows(self, pixel: Sequence[int]) -> bool:
        """Whether the centre of a pixel ``(ndim)`` of its level lies in the view."""
        offset = np.linalg.solve(self._matrix, np.asarray(pixel) - self._middle)
        return bool((np.abs(offset) <= np.array(self.size) / 2).all())

    @cached_property
    def _matrix(self) -> NDArray[np.float64]:
        return self.similarity.matrix(self.level, len(self.size))

    @cached_property
    def _middle(self) -> NDArray[np.float64]:
        # of the view, in indices of pixels of the level, which count from the centre of the first one
        return np.array(self.center) / level_factors(self.level, len(self.size)) - 0.5


def request_similar(
    slide: Slide, views: Sequence[SimilarView], padding: Padding
) -> Callable[[], tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Ask for the scaled and rotated views of one sample (`Slide.request`).

    Args:
        slide: the image.
        views: ``L`` views of one size; they may leave the image.
        padding: pixels outside the image; with ``zero`` the nearest pixel, which the caller blanks after normalisation.

    Returns:
        A function that gives native pixel values ``(L, C, *size)``, and whether they lie inside the image
        ``(L, *size)``.
    """
    # zeros would bleed into the last pixels of the image
    policy: Padding = "edge" if padding == "zero" else padding
    pending = [slide.request(view.level, view.window.start, view.window.size, padding=policy) for view in views]

    def read() -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        size = views[0].size
        pixels = np.empty((len(views), slide.num_channels, *size), np.float32)
        valid = np.empty((len(views), *size), bool)
        for view, stored, channels, inside in zip(views, pending, pixels, valid, strict=True):
            for channel, source in zip(channels, stored().astype(np.float32), strict=True):
                channel[...] = view.sample(source, linear=True)
            mask = np.zeros(view.window.size, np.uint8)
            mask[view.window.slices_inside(slide.level_shape(view.level))] = 1
            inside[...] = view.sample(mask, linear=False) > 0
        return pixels, valid

    return read
