"""Slides that are computed from others, window by window: coarser ones, joined channels, classes of stored labels."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from muvit.data.pyramids.ngff import Kind
from muvit.data.pyramids.reduction import reduce_blocks
from muvit.data.slides.slide import Slide
from muvit.data.sources.label_map import vote
from muvit.errors import InputError
from muvit.levels import Level

Pixels = np.ndarray[Any, Any]
Decode = Callable[[Pixels, Path], Pixels]
"""Classes ``(*space)`` uint8 of stored pixels ``(C, *space)`` of a file."""

_ROWS = 256


class DerivedSlide(Slide):
    """A slide of one level whose pixels are computed from another, some rows at a time.

    Args:
        base: where path, axes, shape and pixel size come from, unless given.
        compute: pixels ``(C, *size)`` of the window with this start and size; to be picklable like any slide, a
            function of a module or a partial of one.
        shape: pixels, (t)(z)yx.
        num_channels: length of the channel axis.
        dtype: of the pixels.
        channel_names: one per channel.
        pixel_size_um: micrometers per pixel along each axis.
    """

    def __init__(
        self,
        base: Slide,
        compute: Callable[[tuple[int, ...], tuple[int, ...]], Pixels],
        *,
        num_channels: int,
        dtype: Any,
        channel_names: tuple[str, ...],
        shape: tuple[int, ...] | None = None,
        pixel_size_um: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(
            base.path,
            level_shapes={1.0: base.shape if shape is None else shape},
            num_channels=num_channels,
            dtype=np.dtype(dtype),
            pixel_size_um=base.pixel_size_um if pixel_size_um is None else pixel_size_um,
            channel_names=channel_names,
            axes=base.axes,
        )
        self._compute = compute

    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> Pixels:
        size = tuple(b - a for a, b in zip(start, stop, strict=True))
        pixels = np.empty((self.num_channels, *size), self.dtype)
        for row in range(0, size[0], _ROWS):
            part = self._compute((start[0] + row, *start[1:]), (min(_ROWS, size[0] - row), *size[1:]))
            pixels[:, row : row + part.shape[1]] = part
        return pixels


def reduced(slide: Slide, factor: int, *, kind: Kind) -> Slide:
    """The slide with pixels ``factor`` times as large: area means of an image, majority votes of labels."""
    if factor == 1:
        return slide
    return DerivedSlide(
        slide,
        partial(_reduced_window, slide, factor, kind),
        num_channels=slide.num_channels,
        dtype=slide.dtype,
        channel_names=slide.channel_names,
        shape=tuple(-(-n // factor) for n in slide.shape),
        pixel_size_um=None if slide.pixel_size_um is None else tuple(size * factor for size in slide.pixel_size_um),
    )


def columns(slide: Slide, bounds: tuple[int, int] | None) -> Slide:
    """The slide from one column of its pixels up to another, exclusive; the slide itself without bounds."""
    if bounds is None:
        return slide
    return DerivedSlide(
        slide,
        partial(_shifted_window, slide, bounds[0]),
        num_channels=slide.num_channels,
        dtype=slide.dtype,
        channel_names=slide.channel_names,
        shape=(*slide.shape[:-1], bounds[1] - bounds[0]),
    )


def joined(
    slides: Sequence[Slide], channel_names: tuple[str, ...], *, pixel_size_um: tuple[float, ...] | None = None
) -> Slide:
    """Slides of the same shape as the channels of one, in a dtype that holds them all.

    Args:
        slides: the slides; all but the pixels comes from the first.
        channel_names: one per channel of all slides.
        pixel_size_um: micrometers per pixel along each axis, if the first slide does not state it.

    Raises:
        InputError: the shapes differ.
    """
    check_shapes(slides)
    dtype = np.result_type(*(slide.dtype for slide in slides))
    compute = partial(_joined_window, tuple(slides), dtype)
    num_channels = sum(slide.num_channels for slide in slides)
    return DerivedSlide(
        slides[0],
        compute,
        num_channels=num_channels,
        dtype=dtype,
        channel_names=channel_names,
        pixel_size_um=pixel_size_um,
    )


def classified(slides: Sequence[Slide], decode: Decode, num_classes: int) -> Slide:
    """Classes (uint8) of stored labels; those of several annotators are combined by majority vote.

    Raises:
        InputError: the shapes differ.
    """
    check_shapes(slides)
    compute = partial(_classified_window, tuple(slides), decode, num_classes)
    return DerivedSlide(slides[0], compute, num_channels=1, dtype=np.uint8, channel_names=("label",))


def check_shapes(slides: Sequence[Slide]) -> None:
    """Refuse slides whose shape is not that of the first.

    Raises:
        InputError: the shapes differ.
    """
    for slide in slides[1:]:
        if slide.shape != slides[0].shape:
            got = f"shape {slide.shape}"
            raise InputError(slide.path, expected=f"shape {slides[0].shape}, as {slides[0].path.name} has", got=got)


def _reduced_window(
    slide: Slide, factor: int, kind: Kind, start: tuple[int, ...], size: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    lower = tuple(a * factor for a in start)
    upper = tuple(min((a + n) * factor, extent) for a, n, extent in zip(start, size, slide.shape, strict=True))
    pixels = slide.read(1, lower, tuple(b - a for a, b in zip(lower, upper, strict=True)))
    return reduce_blocks(pixels, factor, kind)


def _shifted_window(slide: Slide, first: int, start: tuple[int, ...], size: tuple[int, ...]) -> Pixels:
    return slide.read(1, (*start[:-1], start[-1] + first), size)


def _joined_window(slides: tuple[Slide, ...], dtype: Any, start: tuple[int, ...], size: tuple[int, ...]) -> Pixels:
    return np.concatenate([slide.read(1, start, size).astype(dtype) for slide in slides])


def _classified_window(
    slides: tuple[Slide, ...], decode: Decode, num_classes: int, start: tuple[int, ...], size: tuple[int, ...]
) -> Pixels:
    votes = [decode(slide.read(1, start, size), slide.path) for slide in slides]
    return (votes[0] if len(votes) == 1 else vote(votes, num_classes))[None]
