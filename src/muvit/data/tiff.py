"""TIFF files as slides: OME-TIFF, pyramids in SubIFDs or in further series, ImageJ stacks, plain TIFF.

Only the tiles or strips that a window touches are read (by positional reads, so no file stays open) and decoded.
"""

import itertools
import logging
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from muvit.data.slides import Palette, Slide, default_channel_names, first_line, pyramid_factor
from muvit.data.tiff_metadata import ome_channel_names, tiff_pixel_size_um
from muvit.errors import ReadError

_LOG = logging.getLogger(__name__)
_JPEG = {6, 7, 34892, 33007}
_STACKED = "QI"
_ALPHA = (1, 2)
_PALETTE = 3
_PHOTOMETRICS = {0, 1, 2, _PALETTE, 6, 32844}
_YCBCR = 6


class TiffSlide(Slide):
    """A TIFF file; of several images in one file, the largest with its pyramid.

    Pages that the file does not describe further are taken for a stack along z. Axes t and z of length 1 are left out
    of `shape`. Levels that are not coarsened alike along every axis of space are not offered; a warning in the log says
    so. Alpha samples are dropped. A colour table gives RGB, or with ``palette="index"`` the stored indices. Values are
    those stored, also where the file says that 0 is white. Physical pixel sizes come from OME-XML, ImageJ metadata, or a
    resolution tag that is finer than a printer's.

    Args:
        path: the file.
        palette: what a colour table gives.

    Raises:
        ReadError: the file is truncated, or no TIFF image that can be read.
    """

    def __init__(self, path: str | Path, *, palette: Palette = "rgb") -> None:
        path = Path(path)
        try:
            with tifffile.TiffFile(path) as tif:
                self._describe(path, tif, palette)
        except ReadError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, struct.error) as error:
            raise ReadError(path, expected="a TIFF image", got=first_line(error)) from error

    def _describe(self, path: Path, tif: tifffile.TiffFile, palette: Palette) -> None:
        series = _main_series(tif)
        page = series.keyframe
        axes = _axes(series, path)
        extent = dict(zip(axes, series.shape, strict=True))
        _check_page(page, path)
        self._space = tuple(a for a in "TZ" if extent.get(a, 1) > 1) + ("Y", "X")
        self._stored_levels = {}
        for index, shape in _level_shapes(tif, series):
            sizes = dict(zip(axes, shape, strict=True))
            factor = pyramid_factor(series.shape_of_space, sizes) if False else None
