"""Objects of label slides with their outlines, traced block by block; those that cross blocks are joined.

An object is a set of pixels of one value that are connected by their edges (4-connectivity), so its outline never
crosses itself. Pixel *i* covers ``[i, i + 1)``: outlines run along whole numbers, and their areas are pixel counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio.features import rasterize, shapes
from rasterio.transform import Affine
from shapely import Polygon
from skimage.measure import label as connected_components

from muvit.data.slides.slide import Slide
from muvit.inference.export.instances import split_mask
from muvit.labels import BACKGROUND
from muvit.progress import Progress

BLOCK_PX = 2048
"""Side of the blocks that are read at once."""
_MAX_SPLIT_PX = 4096


@dataclass(frozen=True, kw_only=True)
class LabelObject:
    """Connected pixels of one value."""

    value: int
    """Their value."""
    num_pixels: int
    """Their number."""
    polygon: Polygon
    """Their exact outline with its holes, in pixels (x, y) of the labels, upper-left origin."""
    sums: tuple[float, ...] = ()
    """Sum over them of each channel that was measured."""

    @property
    def first_pixel(self) -> tuple[int, int]:
        """The leftmost of the uppermost pixels (y, x), which identifies the object."""
        x, y = shapely.get_coordinates(self.polygon.exterior).T
        return int(y.min()), int(x[y == y.min()].min())


def trace_objects(
    labels: Slide,
    *,
    measured: Slide | None = None,
    min_pixels: int = 1,
    block_px: int = BLOCK_PX,
    progress: Progress | None = None,
) -> Iterator[LabelObject]:
    """Find the objects of a label slide, background left out: values below 0, and 0 if the labels have a background.

    Memory holds one block, and the outlines of objects that may continue in blocks still to be read. The objects do not
    depend on ``block_px``, but their order does.

    Args:
        labels: a 2D label image.
        measured: an image of the same pixels, whose channels are summed over each object.
        min_pixels: leave out objects of fewer pixels.
        block_px: side of the blocks.
        progress: called after each block.

    Yields:
        The objects, each as soon as it is complete.
    """
    height, width = labels.shape
    corners = list(product(range(0, height, block_px), range(0, width, block_px)))
    unfinished, lowest = _Unfinished(width), BACKGROUND + labels.has_background
    for done, (top, left) in enumerate(corners, start=1):
        bottom, right = min(top + block_px, height), min(left + block_px, width)
        window = (top, left), (bottom - top, right - left)
        pixels, channels = labels.read(1, *window)[0], None if measured is None else measured.read(1, *window)
        seams = (top > 0, left > 0, bottom < height, right < width)
        block = _Block(pixels, (top, left), seams, min_pixels, lowest, channels)
        yield from (_whole([piece]) for piece in block.whole)
        unfinished.add(block)
        if right == width:
            for pieces in unfinished.complete(is_last=bottom == height):
                if sum(piece.num_pixels for piece in pieces) >= min_pixels:
                    yield _whole(pieces)
        if progress is not None:
            progress(done, len(corners))


_EXACT_TOLERANCE = 0.35


def simplify(polygon: Polygon, tolerance: float | None) -> Polygon:
    """The polygon of an object with fewer corners; holes are kept.

    With a tolerance, the outline moves by at most about so much: its corners are a subset of the old ones (Douglas and
    Peucker 1973), and outlines and holes that would vanish are kept.

    Without one, every pixel's centre stays on its side, so that the polygon stands for the same pixels. Corners beside
    steps of one pixel are cut then: the outline runs through the middles of the edges there, at least 1 / sqrt(8) =
    0.354 px away from all centres and twice that from itself. It is simplified by less, so it meets no centre, nor
    itself.

    Args:
        polygon: outline of pixels, as `trace_objects` gives it.
        tolerance: in pixels; None to keep all pixels.
    """
    rings = np.asarray(shapely.get_rings(polygon))
    if tolerance is None:
        # lines, since the first point of a ring is left out without regard to how far its neighbours have moved
        rings, tolerance = np.array([shapely.linestrings(_cut_steps(ring)) for ring in rings]), _EXACT_TOLERANCE
    simple = shapely.simplify(rings, tolerance, preserve_topology=False)
    is_lost = shapely.get_num_coordinates(simple) < 4
    simple[is_lost] = rings[is_lost]
    result = Polygon(simple[0], simple[1:])
    # nearby outlines may cross: then by the slower method that prevents it
    return result if result.is_valid else polygon.simplify(tolerance, preserve_topology=True)


def _cut_steps(ring: shapely.LinearRing) -> NDArray[np.float64]:
    """Points ``(N, 2)`` of a closed outline: middles of the first and the last pixel edge of each side, and corners
    between two sides of more than a pixel."""
    corners = shapely.get_coordinates(ring)
    side = np.diff(corners, axis=0)
    length = np.abs(side).max(axis=1)
    half = side / length[:, None] / 2
    points = np.stack([corners[:-1], corners[:-1] + half, corners[1:] - half], axis=1).reshape(-1, 3, 2)
    is_kept = np.ones(points.shape[:2], bool)
    is_kept[:, 0] = (length > 1) & (np.roll(length, 1) > 1)
    cut = points[is_kept]
    return np.concatenate([cut, cut[:1]])


def _whole(pieces: Sequence[LabelObject]) -> LabelObject:
    """One object from its pieces, in a form that does not depend on the cuts."""
    joined = pieces[0].polygon if len(pieces) == 1 else shapely.union_all([piece.polygon for piece in pieces])
    outline, *holes = (_corners(ring) for ring in shapely.get_rings(joined))
    polygon = shapely.orient_polygons(shapely.normalize(Polygon(outline, holes)))
    return LabelObject(
        value=pieces[0].value,
        num_pixels=sum(piece.num_pixels for piece in pieces),
        polygon=polygon,
        sums=tuple(map(sum, zip(*(piece.sums for piece in pieces), strict=True))),
    )


def _corners(ring: shapely.LinearRing) -> NDArray[np.float64]:
    """The points ``(N, 2)`` where a ring turns."""
    points = shapely.get_coordinates(ring)[:-1]
    (x, y), (next_x, next_y) = (points - np.roll(points, 1, axis=0)).T, (np.roll(points, -1, axis=0) - points).T
    corners: NDArray[np.float64] = points[x * next_y != y * next_x]
    return corners


def _sums(components: NDArray[Any], channels: NDArray[Any] | None) -> NDArray[Any]:
    """Sums ``(C, number of components)`` of channels ``(C, H, W)`` over components; exact for 8 and 16 bits."""
    flat = components.ravel()
    sums = [np.bincount(flat, channel.ravel().astype(np.float64)) for channel in (() if channels is None else channels)]
    return np.array(sums, np.float64).reshape(len(sums), int(flat.max()) + 1)


def split_object(found: LabelObject, distance_px: float, measured: Slide | None = None) -> list[LabelObject]:
    """The parts of an object whose middles are at least ``distance_px`` apart; itself if it is wider than 4096 pixels.

    Args:
        found: the object.
        distance_px: in label pixels.
        measured: as of `trace_objects`.
    """
    left, top, right, bottom = map(int, found.polygon.bounds)
    size, shift = (bottom - top, right - left), Affine.translation(left, top)
    if max(size) > _MAX_SPLIT_PX:
        return [found]
    parts = split_mask(rasterize([found.polygon], size, transform=shift).astype(bool), distance_px)
    counts = np.bincount(parts.ravel())
    if len(counts) == 2:
        return [found]
    sums = _sums(parts, None if measured is None else measured.read(1, (top, left), size))
    return [
        _whole(
            [
                LabelObject(
                    value=found.value,
                    num_pixels=int(counts[int(number)]),
                    polygon=_polygon(outline),
                    sums=tuple(sums[:, int(number)].tolist()),
                )
            ]
        )
        for outline, number in shapes(parts, parts > 0, connectivity=4, transform=shift)
    ]


def _polygon(outline: Any) -> Polygon:
    """The polygon of an outline of `rasterio.features.shapes`."""
    exterior, *holes = map(np.array, outline["coordinates"])
    return Polygon(exterior, holes)


class _Block:
    """The pieces of objects in one block.

    Args:
        pixels: ``(H, W)`` labels.
        corner: of the block in the image, (y, x).
        seams: whether other blocks lie above, to the left, below and to the right.
        min_pixels: leave out whole objects of fewer pixels.
        lowest: lowest value that is no background.
        channels: ``(C, H, W)`` to be summed over each object, if any.

    Attributes:
        corner: as given.
        components: ``(H, W)``, the number of each pixel's piece, from 1; 0 is background.
        whole: objects that lie completely in this block.
        cut: pieces that reach a seam, by their number.
    """

    def __init__(
        self,
        pixels: NDArray[Any],
        corner: tuple[int, int],
        seams: tuple[bool, ...],
        min_pixels: int,
        lowest: int,
        channels: NDArray[Any] | None = None,
    ) -> None:
        self.corner = corner
        self.components = connected_components(
            np.where(pixels < lowest, -1, pixels.astype(np.int64)), background=-1, connectivity=1
        )
        sizes = np.bincount(self.components.ravel())
        values = np.zeros(len(sizes), pixels.dtype)
        values[self.components] = pixels
        is_cut = np.zeros(len(sizes), bool)
        for edge, is_seam in zip(self.edges(self.components), seams, strict=True):
            is_cut[edge] |= is_seam
        is_wanted = is_cut | (sizes >= min_pixels)
        is_wanted[0] = False
        sums = _sums(self.components, channels)
        self.whole: list[LabelObject] = []
        self.cut: dict[int, LabelObject] = {}
        shift = Affine.translation(corner[1], corner[0])
        traced = shapes(self.components.astype(np.int32), is_wanted[self.components], connectivity=4, transform=shift)
        for outline, number in traced:
            number = int(number)
            piece = LabelObject(
                value=int(values[number]),
                num_pixels=int(sizes[number]),
                polygon=_polygon(outline),
                sums=tuple(sums[:, number].tolist()),
            )
            if is_cut[number]:
                self.cut[number] = piece
            else:
                self.whole.append(piece)

    @staticmethod
    def edges(pixels: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Upper, left, lower and right edge."""
        return pixels[0], pixels[:, 0], pixels[-1], pixels[:, -1]


class _Unfinished:
    """Pieces of objects that may continue in later blocks; blocks are added row by row, from left to right.

    A union-find forest: every piece has its own number, from 1, and the numbers of one object lead to its root.

    Args:
        width: of the image.
    """

    def __init__(self, width: int) -> None:
        self._count = 0
        self._parents: dict[int, int] = {}
        self._pieces: dict[int, list[LabelObject]] = {}
        self._above = np.zeros(width, np.int64)
        self._beside = np.zeros(0, np.int64)

    def add(self, block: _Block) -> None:
        """Add the pieces of a block, and join them to those above and to the left of it."""
        numbers = np.zeros(int(block.components.max()) + 1, np.int64)
        for component, piece in block.cut.items():
            self._count += 1
            numbers[component] = self._parents[self._count] = self._count
            self._pieces[self._count] = [piece]
        top, left, bottom, right = (numbers[edge] for edge in block.edges(block.components))
        start = block.corner[1]
        span = slice(start, start + len(top))
        self._join(self._above[span], top)
        if start > 0:
            self._join(self._beside, left)
        self._above[span], self._beside = bottom, right

    def complete(self, *, is_last: bool) -> Iterator[list[LabelObject]]:
        """After a row of blocks, return the pieces of each object that does not continue below it."""
        continued = set() if is_last else {self._root(number) for number in np.unique(self._above).tolist() if number}
        for root in [root for root in self._pieces if root not in continued]:
            yield self._pieces.pop(root)
        roots = {number: self._root(number) for number in self._parents}
        self._parents = {number: root for number, root in roots.items() if root in continued}

    def _join(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
        """Join adjacent pieces of one value across a seam."""
        touching = np.unique(np.stack([one, other])[:, (one > 0) & (other > 0)], axis=1)
        for a, b in touching.T.tolist():
            first, second = sorted((self._root(a), self._root(b)))
            if first != second and self._pieces[first][0].value == self._pieces[second][0].value:
                self._parents[second] = first
                self._pieces[first] += self._pieces.pop(second)

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = number = self._parents[self._parents[number]]
        return number
