"""One plane, time point or some channels of a slide, as a slide."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from muvit.data.slides.blocks import Pending
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.levels import Level, level_factors, plain_level


def select(
    slide: Slide, *, z: int | None = None, t: int | None = None, channels: Sequence[str | int] | None = None
) -> Slide:
    """One plane, one time point, or some channels of a slide; the slide itself where nothing is chosen.

    Args:
        slide: the image.
        z: number of the plane, from 0 on; the slide then has no axis z.
        t: number of the time point, likewise.
        channels: names or numbers of the channels, in the order in which they are wanted.

    Raises:
        InputError: the slide has no such axis, plane, time point or channel.
    """
    planes = {axis: number for axis, number in (("z", z), ("t", t)) if number is not None}
    for axis, number in planes.items():
        extent = slide.shape[slide.axes.index(axis)] if axis in slide.axes else 1
        if not 0 <= number < extent:
            expected = f"a number from 0 to {extent - 1}" if extent > 1 else f"0, as there is a single {axis} plane"
            raise InputError(f"{axis} of {slide.path}", expected=expected, got=number)
    planes = {axis: number for axis, number in planes.items() if axis in slide.axes}
    numbers = None if channels is None else [_number(slide, channel) for channel in channels]
    if numbers == list(range(slide.num_channels)):
        numbers = None
    return slide if numbers is None and not planes else Selection(slide, planes, numbers)


def _number(slide: Slide, channel: str | int) -> int:
    names = slide.channel_names
    if channel in names:
        return names.index(str(channel))
    text = str(channel)
    if text.isdecimal() and int(text) < slide.num_channels:
        return int(text)
    raise InputError(
        f"channels of {slide.path}", expected=f"names among {', '.join(names)}, or their numbers from 0 on", got=text
    )


class Selection(Slide):
    """Part of a slide, as `select` makes it.

    Args:
        slide: the image.
        planes: number of the plane along each axis that is left out; at a level that coarsens the axis, that of the
            coarse plane which holds it.
        channels: numbers of the channels; None for all.

    Attributes:
        bounds: scanned part of the slide, where it states one (`WholeSlide`).
    """

    def __init__(self, slide: Slide, planes: dict[str, int], channels: Sequence[int] | None) -> None:
        self.slide = slide
        self._planes = planes
        self._channels = list(range(slide.num_channels)) if channels is None else list(channels)
        if not self._channels:
            raise InputError(f"channels of {slide.path}", expected="at least one", got="none")
        kept = [i for i, axis in enumerate(slide.axes) if axis not in planes]
        self._sources: dict[Level, Level] = {}
        for level in slide.levels:
            factors = level_factors(level, slide.ndim)
            self._sources.setdefault(
                plain_level(tuple(factors[i] for i in kept)), level
            )  # the finest along what is left out
        sizes = slide.pixel_size_um
        super().__init__(
            slide.path,
            level_shapes={
                level: tuple(slide.level_shape(source)[i] for i in kept) for level, source in self._sources.items()
            },
            num_channels=len(self._channels),
            dtype=slide.dtype,
            pixel_size_um=None if sizes is None else tuple(sizes[i] for i in kept),
            channel_names=tuple(slide.channel_names[i] for i in self._channels),
            axes="".join(slide.axes[i] for i in kept),
        )
        self.name = slide.name
        self.bounds = getattr(slide, "bounds", None)
        self.label_names, self.label_colors = slide.label_names, slide.label_colors
        self.has_background, self.ignored_labels = slide.has_background, slide.ignored_labels

    def version(self) -> str | None:
        """As `Slide.version`."""
        version = self.slide.version()
        return None if version is None else f"{version}, {self._planes}, {self._channels}"

    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return self._request_window(level, start, stop)()

    def _request_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> Pending:
        source = self._sources[plain_level(level)]
        factors = level_factors(source, self.slide.ndim)
        bounds = dict(zip(self.axes, zip(start, stop, strict=True), strict=True))
        for axis, factor, extent in zip(self.slide.axes, factors, self.slide.level_shape(source), strict=True):
            if axis in self._planes:
                plane = min(int(self._planes[axis] / factor), extent - 1)
                bounds[axis] = (plane, plane + 1)
        lower, upper = zip(*(bounds[axis] for axis in self.slide.axes), strict=True)
        pending = self.slide.request(source, lower, [b - a for a, b in zip(lower, upper, strict=True)])
        dropped = tuple(i for i, axis in enumerate(self.slide.axes, start=1) if axis in self._planes)
        return lambda: np.ascontiguousarray(pending()[self._channels].squeeze(dropped))
