"""Labels drawn as polygons, rasterised window by window."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from muvit.data.sources.label_map import IGNORED

if TYPE_CHECKING:
    from shapely import STRtree
    from shapely.geometry.base import BaseGeometry


@dataclass(frozen=True)
class Annotations:
    """Polygons of classes, and of the annotated areas.

    Args:
        polygons: polygon and class of each feature; where they overlap, the later one counts.
        outlines: polygon of each area; pixels outside it are ignored.
    """

    polygons: tuple[tuple["BaseGeometry", int], ...]
    outlines: Mapping[str, "BaseGeometry"]

    @cached_property
    def tree(self) -> "STRtree":
        """Spatial index of the polygons."""
        from shapely import STRtree

        return STRtree([polygon for polygon, _ in self.polygons])

    def paint(self, place: str, transform: Any, start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Classes ``(1, *size)`` uint8 of a window of a raster whose pixels (x, y) ``transform`` puts on the ground."""
        from rasterio.features import rasterize
        from rasterio.transform import Affine
        from shapely import MultiPoint

        (top, left), (height, width) = start, size
        a, b, c, d, e, f = tuple(transform)[:6]
        moved = Affine(a, b, a * left + b * top + c, d, e, d * left + e * top + f)
        corners = [(x, y) for x in (0, width) for y in (0, height)]
        window = MultiPoint([(a * x + b * y + moved.c, d * x + e * y + moved.f) for x, y in corners]).envelope
        near = sorted(self.tree.query(window).tolist())
        shapes = [self.polygons[i] for i in near]
        options = {"out_shape": size, "transform": moved, "dtype": "uint8"}
        labels = rasterize(shapes, fill=0, **options) if shapes else np.zeros(size, np.uint8)
        is_inside = rasterize([(self.outlines[place], 1)], fill=0, **options) > 0
        return np.where(is_inside, labels, np.uint8(IGNORED))[None]
