"""Mean and standard deviation of the channels of many slides, from a sample of their pixels."""

import math
from collections.abc import Sequence

import numpy as np

from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.levels import Level

_WINDOWS = 256
_WINDOW_PIXELS = 1 << 16


def measure_channels(slides: Sequence[Slide], level: Level) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel, in native units, for `muvit.data.crops.normalize.Standardize`.

    They are computed from 256 windows of at most 65,536 pixels at random places, which are the same in every call; all
    pixels are equally likely to be read. NaN and infinite pixels are ignored.

    Args:
        slides: of equally many channels.
        level: level at which their pixels are read.

    Raises:
        InputError: the slides have different numbers of channels, or there is a channel without contrast.
    """
    rng = np.random.default_rng(0)
    shapes = [slide.level_shape(level) for slide in slides]
    edge = round(_WINDOW_PIXELS ** (1 / len(shapes[0])))
    # windows may leave the image, or its middle would be read more often than its border
    places = np.array([math.prod(n + edge - 1 for n in shape) for shape in shapes], dtype=np.float64)
    counts, means, variances = [], [], []
    for number in rng.choice(len(slides), _WINDOWS, p=places / places.sum()):
        slide, shape = slides[number], shapes[number]
        if slide.num_channels != slides[0].num_channels:
            expected = f"{slides[0].num_channels} channels, as in {slides[0].path}"
            raise InputError(slide.path, expected=expected, got=slide.num_channels)
        first = [int(rng.integers(1 - edge, n)) for n in shape]
        start = [max(a, 0) for a in first]
        size = [min(a + edge, n) - b for a, b, n in zip(first, start, shape, strict=True)]
        pixels = slide.read(level, start, size).reshape(slide.num_channels, -1)
        pixels = pixels[:, np.isfinite(pixels).all(axis=0)].astype(np.float64)
        if pixels.size:
            counts.append(pixels.shape[1])
            means.append(pixels.mean(axis=1))
            variances.append(pixels.var(axis=1))
    if not counts:
        raise InputError("pixels of the slides", expected="finite numbers", got="NaN or infinity")
    mean = np.average(means, axis=0, weights=counts)
    # total variance: that within the windows, and that of the windows' means
    std = np.sqrt(np.average(variances + (means - mean) ** 2, axis=0, weights=counts))
    if not (std > 0).all():
        raise InputError("standard deviation of the channels", expected="contrast in every one", got=std.tolist())
    return tuple(mean.tolist()), tuple(std.tolist())
