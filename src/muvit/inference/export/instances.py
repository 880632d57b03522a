"""Labels as objects that one can count: smoothed outlines, filled holes, and touching objects split.

Smoothing and filling are local: a pixel depends on those within a given distance alone, so they are computed window by
window, and a pixel is the same in whichever window it is read. Splitting takes one object at a time.
"""

from dataclasses import dataclass
from math import ceil, dist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter
from skimage.measure import label as connected_components
from skimage.measure import regionprops
from skimage.morphology import h_maxima
from skimage.segmentation import watershed

from muvit.checks import NonNegative, check_fields
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.inference.export.labelled import LabelledImage
from muvit.levels import Level

_MAX_REACH_PX = 1024
_NECK, _MIN_NECK_PX = 0.05, 0.5
_BESIDE = ((0, 1), (0, -1), (1, 0), (-1, 0))


@dataclass(frozen=True, kw_only=True)
class CleaningConfig:
    """Cleaning of labels before objects are counted and measured."""

    smooth_um: NonNegative = 0.0
    """Radius of smoothing: each pixel gets the value that most of its surroundings have, by weights that fall with the
    distance (a Gaussian of half this radius); 0 does not smooth."""
    fill_holes_um: NonNegative = 0.0
    """Fill holes of at most this width and height that lie in background and are surrounded by one value; 0 fills
    none."""

    def __post_init__(self) -> None:
        check_fields(self)

    def clean(self, source: LabelledImage) -> Slide:
        """The labels of a labelled image, cleaned as they are read; themselves if nothing is to be done.

        Raises:
            InputError: the pixel size is unknown, or a distance is more than 1024 pixels.
        """
        if not self.smooth_um and not self.fill_holes_um:
            return source.labels
        radius, width = (
            0 if not size_um else max(1, ceil(source.in_pixels(name, size_um)))
            for name, size_um in (("smooth_um", self.smooth_um), ("fill_holes_um", self.fill_holes_um))
        )
        if radius + width > _MAX_REACH_PX:
            raise InputError(
                "smooth_um and fill_holes_um",
                expected=f"at most {_MAX_REACH_PX} label pixels together",
                got=radius + width,
                hint="They are meant for the size of cells; min_area_um2 leaves out small objects.",
            )
        return CleanedLabels(source.labels, smooth_px=radius, fill_px=width)


class CleanedLabels(Slide):
    """A 2D label slide whose finest level is smoothed, and its holes filled, as it is read.

    Args:
        labels: the labels as they are stored.
        smooth_px: radius of smoothing, in pixels.
        fill_px: largest width and height of the holes that are filled.
    """

    def __init__(self, labels: Slide, *, smooth_px: int, fill_px: int) -> None:
        super().__init__(
            labels.path,
            level_shapes={1.0: labels.shape},
            num_channels=1,
            dtype=labels.dtype,
            pixel_size_um=labels.pixel_size_um,
            channel_names=labels.channel_names,
            axes=labels.axes,
        )
        self.name = labels.name
        self.label_names, self.label_colors = labels.label_names, labels.label_colors
        self.has_background, self.ignored_labels = labels.has_background, labels.ignored_labels
        self._labels, self._radius, self._width = labels, smooth_px, fill_px

    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> NDArray[Any]:
        reach = self._radius + self._width
        lower = [max(a - reach, 0) for a in start]
        upper = [min(b + reach, n) for b, n in zip(stop, self.shape, strict=True)]
        pixels = self._labels.read(level, lower, [b - a for a, b in zip(lower, upper, strict=True)])[0]
        if self._radius:
            pixels = smooth_labels(pixels, self._radius)
        if self._width:
            pixels = fill_holes(pixels, self._width, lowest=int(self.has_background))
        inside = tuple(slice(a - c, b - c) for a, b, c in zip(start, stop, lower, strict=True))
        return pixels[inside][None].copy()


def smooth_labels(pixels: NDArray[Any], radius: int) -> NDArray[Any]:
    """Give each pixel the value of the largest share in its surroundings, of equal ones the lowest.

    Args:
        pixels: ``(H, W)`` labels.
        radius: of the surroundings in pixels, weighted by a Gaussian of half of it.
    """
    values, index = np.unique(pixels, return_inverse=True)
    index = index.reshape(pixels.shape)
    if len(values) == 1:
        return pixels
    best, result = np.zeros(pixels.shape), pixels.copy()
    for number, box in enumerate(find_objects(index + 1)):  # a value has no share beyond the box around its pixels
        near = tuple(slice(max(side.start - radius, 0), side.stop + radius) for side in box)
        is_here = (index[near] == number).astype(np.float64)
        share = gaussian_filter(is_here, radius / 2, radius=radius, mode="constant")
        is_best = share > best[near]
        best[near][is_best] = share[is_best]
        result[near][is_best] = values[number]
    return result


def fill_holes(pixels: NDArray[Any], width: int, *, lowest: int) -> NDArray[Any]:
    """Fill the background inside one value, where it is at most ``width`` pixels wide and high.

    A hole is background connected by edges and corners that does not reach the border of ``pixels``, and all of whose
    neighbours have one value, which it gets.

    Args:
        pixels: ``(H, W)`` labels.
        width: of the widest hole.
        lowest: lowest value that is no background.
    """
    holes = connected_components(pixels < lowest, connectivity=2)
    count = int(holes.max()) + 1
    least, most = np.full(count, np.iinfo(np.int64).max), np.full(count, np.iinfo(np.int64).min)
    inner, height, length = holes[1:-1, 1:-1], *pixels.shape
    for dy, dx in _BESIDE:
        beside = pixels[1 + dy : height - 1 + dy, 1 + dx : length - 1 + dx]
        is_edge = (inner > 0) & (beside >= lowest)
        np.minimum.at(least, inner[is_edge], beside[is_edge])
        np.maximum.at(most, inner[is_edge], beside[is_edge])
    is_filled = least == most
    for edge in (holes[0], holes[-1], holes[:, 0], holes[:, -1]):
        is_filled[edge] = False
    for region in regionprops(holes):
        top, left, bottom, right = region.bbox
        is_filled[region.label] &= max(bottom - top, right - left) <= width
    is_filled[0] = False
    return np.where(is_filled[holes], least[holes], pixels).astype(pixels.dtype)


def split_mask(mask: NDArray[np.bool_], distance: float) -> NDArray[np.int32]:
    """Split touching round objects by a watershed of the distance to the outside.

    Middles are the maxima of that distance which a place narrower by a twentieth of ``distance`` parts from all higher
    ones; so an elongated object of even width has one.

    Args:
        mask: ``(H, W)`` pixels of one object, connected by their edges.
        distance: in pixels, which the middles of two parts are at least apart.

    Returns:
        ``(H, W)`` number of each pixel's part, from 1; 0 outside. Every part is connected by its edges.
    """
    mask = np.pad(mask, 1)
    depth = distance_transform_edt(mask)
    neck = max(_MIN_NECK_PX, _NECK * distance)
    if neck >= depth.max():
        return mask[1:-1, 1:-1].astype(np.int32)
    maxima = connected_components(h_maxima(depth, neck), connectivity=2)
    found = sorted(regionprops(maxima, depth), key=lambda one: (-one.intensity_max, one.label))
    markers = np.zeros(mask.shape, np.int32)
    middles: list[tuple[float, ...]] = []
    for one in found:
        if all(dist(one.centroid, middle) >= distance for middle in middles):
            middles.append(one.centroid)
            markers[maxima == one.label] = len(middles)
    parts: NDArray[np.int32] = watershed(-depth, markers, mask=mask, connectivity=1)
    return parts[1:-1, 1:-1]
