"""Label slides as polygons, block by block; objects that cross blocks are joined.

An object is a set of pixels of one value that are connected by their edges (4-connectivity), so its outline never
crosses itself. Pixel *i* covers ``[i, i + 1)``: outlines run along whole numbers, and their areas are pixel counts.
"""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import shapely
from numpy.typing import NDArray
from rasterio.features import shapes
from rasterio.transform import Affine
from shapely import Polygon
from skimage.measure import label as connected_components

from muvit.checks import NonNegative, check_fields
from muvit.data.slides.slide import Slide
from muvit.durable import whole_file
from muvit.errors import ExistsError, InputError
from muvit.inference.export.labelled import LabelledImage
from muvit.labels import BACKGROUND
from muvit.progress import Progress

BLOCK_PX = 2048
"""Side of the blocks that are read at once."""


@dataclass(frozen=True, kw_only=True)
class LabelObject:
    """Connected pixels of one value."""

    value: int
    """Their value."""
    num_pixels: int
    """Their number."""
    polygon: Polygon
    """Their exact outline with its holes, in pixels (x, y) of the labels, upper-left origin."""

    @property
    def first_pixel(self) -> tuple[int, int]:
        """The leftmost of the uppermost pixels (y, x), which identifies the object."""
        x, y = shapely.get_coordinates(self.polygon.exterior).T
        return int(y.min()), int(x[y == y.min()].min())


def trace_objects(
    labels: Slide, *, min_pixels: int = 1, block_px: int = BLOCK_PX, progress: Progress | None = None
) -> Iterator[LabelObject]:
    """Find the objects of a label slide, background left out: values below 0, and 0 if the labels have a background.

    Memory holds one block, and the outlines of objects that may continue in blocks still to be read. The objects do not
    depend on ``block_px``, but their order does.

    Args:
        labels: a 2D label image.
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
        pixels = labels.read(1, (top, left), (bottom - top, right - left))[0]
        block = _Block(pixels, (top, left), (top > 0, left > 0, bottom < height, right < width), min_pixels, lowest)
        yield from (_whole([piece]) for piece in block.whole)
        unfinished.add(block)
        if right == width:
            for pieces in unfinished.complete(is_last=bottom == height):
                if sum(piece.num_pixels for piece in pieces) >= min_pixels:
                    yield _whole(pieces)
        if progress is not None:
            progress(done, len(corners))


def simplify(polygon: Polygon, tolerance: float) -> Polygon:
    """The polygon with fewer corners, its outline moved by at most about ``tolerance``; holes are kept.

    The corners are a subset of the old ones (Douglas and Peucker 1973). Outlines and holes that would vanish are kept.
    """
    rings = np.asarray(shapely.get_rings(polygon))
    simple = shapely.simplify(rings, tolerance, preserve_topology=False)
    is_lost = shapely.get_num_coordinates(simple) < 4
    simple[is_lost] = rings[is_lost]
    result = Polygon(simple[0], simple[1:])
    # nearby outlines may cross: then by the slower method that prevents it
    return result if result.is_valid else polygon.simplify(tolerance, preserve_topology=True)


def _whole(pieces: Sequence[LabelObject]) -> LabelObject:
    """One object from its pieces, in a form that does not depend on the cuts."""
    joined = pieces[0].polygon if len(pieces) == 1 else shapely.union_all([piece.polygon for piece in pieces])
    outline, *holes = (_corners(ring) for ring in shapely.get_rings(joined))
    polygon = shapely.orient_polygons(shapely.normalize(Polygon(outline, holes)))
    return LabelObject(value=pieces[0].value, num_pixels=sum(p.num_pixels for p in pieces), polygon=polygon)


def _corners(ring: shapely.LinearRing) -> NDArray[np.float64]:
    """The points ``(N, 2)`` where a ring turns."""
    points = shapely.get_coordinates(ring)[:-1]
    (x, y), (next_x, next_y) = (points - np.roll(points, 1, axis=0)).T, (np.roll(points, -1, axis=0) - points).T
    corners: NDArray[np.float64] = points[x * next_y != y * next_x]
    return corners


class _Block:
    """The pieces of objects in one block.

    Args:
        pixels: ``(H, W)`` labels.
        corner: of the block in the image, (y, x).
        seams: whether other blocks lie above, to the left, below and to the right.
        min_pixels: leave out whole objects of fewer pixels.
        lowest: lowest value that is no background.

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
        self.whole: list[LabelObject] = []
        self.cut: dict[int, LabelObject] = {}
        shift = Affine.translation(corner[1], corner[0])
        traced = shapes(self.components.astype(np.int32), is_wanted[self.components], connectivity=4, transform=shift)
        for outline, number in traced:
            number = int(number)
            exterior, *holes = map(np.array, outline["coordinates"])
            piece = LabelObject(
                value=int(values[number]), num_pixels=int(sizes[number]), polygon=Polygon(exterior, holes)
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


ObjectType = Literal["annotation", "detection"]

_OBJECTS = uuid.UUID("0a88359a-935c-425b-a285-490af278a8f0")
"""Name space of the objects' ids."""


@dataclass(frozen=True, kw_only=True)
class GeoJsonConfig:
    """Selection and form of the objects."""

    object_type: ObjectType = "annotation"
    """Type in QuPath: annotations, which can be edited, or detections, of which it can show millions."""
    simplify_px: NonNegative = 1.0
    """Tolerance of the simplification of outlines, in label pixels; 0 keeps every corner."""
    min_area_um2: NonNegative | None = None
    """Leave out objects smaller than this."""

    def __post_init__(self) -> None:
        check_fields(self)

    def min_pixels(self, source: LabelledImage) -> int:
        """Pixels of the smallest object that is written.

        Raises:
            InputError: a minimum area is given, but no pixel size is known.
        """
        if self.min_area_um2 is None:
            return 1
        if source.pixel_area_um2 is None:
            raise InputError(
                "min_area_um2",
                expected="labels with a pixel size",
                got=f"none in {source.labels.path}",
                hint="Give it by pixel_size_um (--pixel_size_um).",
            )
        return max(1, ceil(self.min_area_um2 / source.pixel_area_um2))


def write_geojson(
    source: LabelledImage,
    file: Path | str,
    config: GeoJsonConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the objects of a label slide as a GeoJSON FeatureCollection, one Feature each.

    The labels are read block by block and features written as they are found, so memory stays bounded. Areas are those
    of the pixels, before simplification. The ids are the same in every run.

    Args:
        source: the labels, with their image if its pixels or its origin differ.
        file: to write; it appears once it is complete.
        config: selection and form of the objects.
        overwrite: replace the file.
        progress: called with the number of blocks done and of all blocks.

    Returns:
        Number of objects.

    Raises:
        ExistsError: the file exists and ``overwrite`` is false.
        InputError: a minimum area is given, and the pixel size is unknown.
    """
    config, file = config or GeoJsonConfig(), Path(file)
    if file.exists() and not overwrite:
        raise ExistsError(file)
    count = 0
    objects = trace_objects(source.labels, min_pixels=config.min_pixels(source), progress=progress)
    with whole_file(file) as stream:
        stream.write(b'{"type":"FeatureCollection","features":[')
        for count, found in enumerate(objects, start=1):
            stream.write(b"\n" if count == 1 else b",\n")
            stream.write(orjson.dumps(_feature(found, source, config), option=orjson.OPT_SERIALIZE_NUMPY))
        stream.write(b"\n]}\n")
    return count


def _feature(found: LabelObject, source: LabelledImage, config: GeoJsonConfig) -> dict[str, Any]:
    polygon = simplify(found.polygon, config.simplify_px) if config.simplify_px else found.polygon
    first = ",".join(map(str, found.first_pixel))
    measurements = {"Area px^2": found.num_pixels * source.scale[0] * source.scale[1]}
    if source.pixel_area_um2 is not None:
        measurements["Area µm^2"] = found.num_pixels * source.pixel_area_um2
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_OBJECTS, f"{source.labels.name}/{found.value}/{first}")),
        "geometry": {
            "type": "Polygon",
            "coordinates": [_coordinates(ring, source) for ring in (polygon.exterior, *polygon.interiors)],
        },
        "properties": {
            "objectType": config.object_type,
            # an object without a colour makes QuPath fail
            "classification": {
                "name": source.class_name(found.value),
                "color": list(source.class_color(found.value)),
            },
            "isLocked": False,
            "measurements": measurements,
        },
    }


def _coordinates(ring: shapely.LinearRing, source: LabelledImage) -> np.ndarray[Any, Any]:
    """Points ``(N, 2)`` of a closed ring, (x, y) in image pixels; whole numbers where they are."""
    points = shapely.get_coordinates(ring) * source.scale[::-1] - source.origin[::-1]
    whole = points.astype(np.int64)
    return np.ascontiguousarray(whole if (whole == points).all() else points)
