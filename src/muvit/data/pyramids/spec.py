"""Settings of the storage of a pyramid, their defaults and their checks."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np

from muvit.data.pyramids.ngff import Color, Kind
from muvit.data.slides.slide import default_channel_names
from muvit.errors import InputError
from muvit.levels import level_factors

WholeLevel = int | tuple[int, ...]
"""Downsampling factor of all axes, or of each, (t)(z)yx."""

_IMAGE_DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64")
_LABEL_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
_AXES = ("yx", "zyx", "tyx", "tzyx")
# per axis: chunks of about 65 thousand to 260 thousand pixels, shards of some 256 of them
_CHUNK = {2: 256, 3: 64, 4: 16}
_SHARD = {2: 4096, 3: 512, 4: 64}
_SHARD_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class PyramidSpec:
    """Everything that determines the storage of a pyramid; its metadata tell a reader the same."""

    shape: tuple[int, ...]
    """Pixels of the finest level, (t)(z)yx."""
    axes: str
    """One letter per axis of ``shape``: ``yx``, ``zyx``, ``tyx`` or ``tzyx``."""
    num_channels: int
    """Length of the channel axis; label images have 1, and no channel axis on disk."""
    dtype: str
    """Name of the numpy dtype."""
    levels: tuple[WholeLevel, ...]
    """Downsampling factors, ascending from 1, each a multiple of the one before; a tuple where the axes differ."""
    kind: Kind
    """``image`` (area mean) or ``label`` (majority vote)."""
    pixel_size_um: tuple[float, ...] | None
    """Micrometers per pixel of the finest level and axis (t: seconds), or None."""
    channel_names: tuple[str, ...]
    """One per channel."""
    label_names: dict[int, str] = field(default_factory=dict)
    """Name of each label value."""
    label_colors: dict[int, Color] = field(default_factory=dict)
    """Red, green, blue(, alpha) of each label value."""
    has_background: bool = True
    """Whether label 0 is background."""
    chunk: int
    """Edge of a chunk, the unit of reading, in pixels."""
    shard: int
    """Edge of a shard, the unit of writing and one file, in pixels: a multiple of ``chunk``."""

    @property
    def stored_axes(self) -> str:
        """One letter per axis on disk."""
        if self.kind == "label":
            return self.axes
        # NGFF: time, then channel, then space
        return "tc" + self.axes[1:] if self.axes[0] == "t" else "c" + self.axes

    def stored(self, along: Sequence[Any], channels: Any) -> tuple[Any, ...]:
        """Values along the axes of space, and one for the channels, in stored order."""
        values = dict(zip(self.axes, along, strict=True)) | {"c": channels}
        return tuple(values[axis] for axis in self.stored_axes)

    def factors(self, index: int) -> tuple[int, ...]:
        """Downsampling factor of a level along each axis, (t)(z)yx."""
        return tuple(int(factor) for factor in level_factors(self.levels[index], len(self.shape)))

    def level_shape(self, index: int) -> tuple[int, ...]:
        """Pixels of a level, (t)(z)yx."""
        return tuple(-(-n // factor) for n, factor in zip(self.shape, self.factors(index), strict=True))

    def chunk_shape(self, index: int) -> tuple[int, ...]:
        """Pixels of a chunk of a level, (t)(z)yx: no larger than the image."""
        return tuple(min(self.chunk, n) for n in self.level_shape(index))

    def shard_shape(self, index: int) -> tuple[int, ...]:
        """Pixels of a shard of a level, (t)(z)yx: the fewest whole chunks that hold the image, up to ``shard``."""
        extents = zip(self.chunk_shape(index), self.level_shape(index), strict=True)
        return tuple(chunk * -(-min(self.shard, n) // chunk) for chunk, n in extents)

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Size in memory of all channels of so many pixels."""
        return math.prod(shape) * self.num_channels * np.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "PyramidSpec":
        """The inverse of `to_json`.

        Raises:
            InputError: the settings do not fit each other.
        """
        fixed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        fixed["levels"] = tuple(tuple(level) if isinstance(level, list) else level for level in content["levels"])
        fixed["label_names"] = {int(value): name for value, name in content["label_names"].items()}
        fixed["label_colors"] = {int(value): tuple(color) for value, color in content["label_colors"].items()}
        return check_spec(**fixed)


def check_spec(
    *,
    shape: Sequence[int],
    num_channels: int,
    dtype: Any,
    axes: str | None = None,
    levels: Sequence[WholeLevel] | None = None,
    kind: Kind = "image",
    pixel_size_um: float | Sequence[float] | None = None,
    channel_names: Sequence[str] | None = None,
    label_names: dict[int, str] | None = None,
    label_colors: dict[int, Color] | None = None,
    has_background: bool = True,
    chunk: int | None = None,
    shard: int | None = None,
) -> PyramidSpec:
    """Check the arguments of `PyramidWriter.create` and fill in its defaults.

    Raises:
        InputError: an argument does not fit.
    """
    shape = tuple(int(n) for n in shape)
    if kind not in get_args(Kind):
        raise InputError("kind", expected="image or label", got=repr(kind))
    if len(shape) not in (2, 3, 4) or min(shape) < 1:
        raise InputError("shape", expected="2 to 4 positive numbers, (t)(z)yx", got=shape)
    axes = "tzyx"[-len(shape) :] if axes is None else axes
    if axes not in _AXES or len(axes) != len(shape):
        raise InputError(
            "axes", expected=f"one of {', '.join(_AXES)}, a letter for each of {len(shape)} axes", got=axes
        )
    if num_channels < 1 or (kind == "label" and num_channels != 1):
        raise InputError("num_channels", expected="1" if kind == "label" else "at least 1", got=num_channels)
    known = _LABEL_DTYPES if kind == "label" else _IMAGE_DTYPES
    if np.dtype(dtype).name not in known:
        raise InputError(f"dtype of the {kind}", expected=f"one of {', '.join(known)}", got=np.dtype(dtype).name)
    names = tuple(
        channel_names or (("label",) if kind == "label" else default_channel_names(num_channels, np.dtype(dtype)))
    )
    if len(names) != num_channels:
        raise InputError("channel_names", expected=f"{num_channels} names", got=f"{len(names)}: {', '.join(names)}")
    chunk, shard = _checked_tiling(chunk, shard, len(shape), num_channels * np.dtype(dtype).itemsize)
    return PyramidSpec(
        shape=shape,
        axes=axes,
        num_channels=num_channels,
        dtype=np.dtype(dtype).name,
        levels=_checked_levels(levels, shape, chunk),
        kind=kind,
        pixel_size_um=_checked_pixel_size(pixel_size_um, len(shape)),
        channel_names=names,
        label_names={int(value): str(name) for value, name in (label_names or {}).items()},
        label_colors=_checked_colors(label_colors or {}),
        has_background=has_background,
        chunk=chunk,
        shard=shard,
    )


def _checked_tiling(chunk: int | None, shard: int | None, ndim: int, pixel_bytes: int) -> tuple[int, int]:
    chunk = _CHUNK[ndim] if chunk is None else int(chunk)
    if shard is None:
        shard = max(_SHARD[ndim] // chunk, 1) * chunk
        while shard // 2 >= chunk and shard // 2 % chunk == 0 and shard**ndim * pixel_bytes > _SHARD_BYTES:
            shard //= 2
    if chunk < 1 or shard < chunk or shard % chunk:
        raise InputError(
            "chunk and shard", expected="positive numbers, the shard a multiple of the chunk", got=(chunk, shard)
        )
    return chunk, int(shard)


def _checked_levels(levels: Sequence[WholeLevel] | None, shape: tuple[int, ...], chunk: int) -> tuple[WholeLevel, ...]:
    if levels is None:
        return tuple(2**k for k in range(max(math.ceil(math.log2(max(shape) / chunk)), 0) + 1))
    factors = [level_factors(level, len(shape)) for level in levels]
    fixed = [tuple(int(f) for f in along) for along in factors]
    follows = all(a != b and not any(n % m for m, n in zip(a, b, strict=True)) for a, b in itertools.pairwise(fixed))
    if not fixed or set(fixed[0]) != {1} or not follows or fixed != factors:
        raise InputError(
            "levels", expected="whole numbers from 1 up, each a multiple of the one before", got=list(levels)
        )
    return tuple(along[0] if len(set(along)) == 1 else along for along in fixed)


def _checked_pixel_size(size: float | Sequence[float] | None, ndim: int) -> tuple[float, ...] | None:
    if size is None:
        return None
    sizes = (float(size),) * ndim if isinstance(size, int | float) else tuple(float(v) for v in size)
    if len(sizes) != ndim or not all(0 < v < math.inf for v in sizes):
        raise InputError("pixel_size_um", expected=f"one positive number, or {ndim}", got=size)
    return sizes


def _checked_colors(colors: dict[int, Color]) -> dict[int, Color]:
    for value, color in colors.items():
        if len(color) not in (3, 4) or not all(0 <= int(c) <= 255 for c in color):
            raise InputError(f"colour of label {value}", expected="3 or 4 numbers from 0 to 255", got=color)
    return {int(value): tuple(int(c) for c in (*color, 255)[:4]) for value, color in colors.items()}
