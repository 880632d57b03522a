"""Pixels that are read of slides: which part, of which physical size, and which slides are alike."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muvit.data.slides.slide import Slide
from muvit.errors import InputError

PIXEL_SIZE_TOLERANCE = 0.1
"""Largest relative difference between pixel sizes of slides that are used together as they are."""


@dataclass(frozen=True, kw_only=True)
class PixelChoice:
    """Pixels that are read of slides: the physical size that levels count from, and the part of each file."""

    pixel_size_um: float | tuple[float, ...] | None = None
    """Micrometers per pixel of level 1, at which every slide is read: one number, or one for each axis; unset, each
    slide is read at its own."""
    slide_pixel_size_um: float | tuple[float, ...] | None = None
    """Micrometers per pixel of slides that state none."""
    series: int | None = None
    """As of `muvit.data.slides.open.open_slide`, like the others."""
    z: int | None = None
    """Number of the plane."""
    t: int | None = None
    """Number of the time point."""
    channels: tuple[str | int, ...] | None = None
    """Names or numbers of the channels."""


OWN_PIXELS = PixelChoice()
"""All pixels, at their own size."""


def size_name(size: Sequence[float]) -> str:
    """Text of a pixel size: ``0.5``, or ``1 x 0.5 x 0.5`` where the axes differ."""
    names = [f"{value:g}" for value in size]
    return names[0] if len(set(names)) == 1 else " x ".join(names)


def check_pixel_sizes(slides: Sequence[Slide]) -> None:
    """Refuse slides whose stated pixel sizes differ by more than 10 % from that of the first that states one.

    Raises:
        InputError: one does; names it.
    """
    stated = [slide for slide in slides if slide.pixel_size_um is not None]
    for slide in stated:
        if not have_similar_pixels(slide, stated[0].pixel_size_um):
            raise InputError(
                f"pixel size of {slide.path}",
                expected=f"{size_name(stated[0].pixel_size_um or ())} um, as {stated[0].path} has "
                f"(within {PIXEL_SIZE_TOLERANCE:.0%})",
                got=f"{size_name(slide.pixel_size_um or ())} um",
                hint="Set data.pixel_size_um to read all slides at one size.",
            )


def have_similar_pixels(slide: Slide, size_um: Sequence[float] | None) -> bool:
    """Whether the pixels of a slide are of this size within 10 %; true where either is unknown."""
    own = slide.pixel_size_um
    if own is None or size_um is None:
        return True
    return len(own) == len(size_um) and np.allclose(own, size_um, rtol=PIXEL_SIZE_TOLERANCE, atol=0)
