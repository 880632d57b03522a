import numpy as np
import pytest
from memory_slide import MemorySlide

from muvit.data.crops.normalize import Standardize, measure_channels
from muvit.errors import InputError


def slides_of(*images):
    return [MemorySlide({1: image}, f"slide {i}") for i, image in enumerate(images)]


def test_mean_and_deviation_of_all_pixels_by_area():
    rng = np.random.default_rng(0)
    dark = rng.normal([[[1e4]], [[5.0]]], [[[2.0]], [[1.0]]], (2, 200, 600)).astype(np.float32)
    bright = rng.normal([[[1e4 + 8]], [[9.0]]], [[[2.0]], [[1.0]]], (2, 200, 200)).astype(np.float32)
    mean, std = measure_channels(slides_of(dark, bright), 1)
    # three quarters of the area are dark
    assert mean == pytest.approx((1e4 + 2, 6), abs=0.5)
    assert std == pytest.approx((np.sqrt(4 + 12), np.sqrt(1 + 3)), rel=0.06)
    assert measure_channels(slides_of(dark, bright), 1) == (mean, std)


def test_pixels_that_are_not_finite_do_not_count():
    image = np.random.default_rng(1).normal(3, 2, (1, 60, 60)).astype(np.float32)
    spoiled = image.copy()
    spoiled[:, 10:20] = np.nan
    spoiled[:, 30, 5] = np.inf
    mean, std = measure_channels(slides_of(spoiled), 1)
    good = spoiled[np.isfinite(spoiled)].astype(float)
    assert mean[0] == pytest.approx(good.mean(), abs=0.02)
    assert std[0] == pytest.approx(good.std(), abs=0.02)
    out = Standardize(mean, std)(spoiled[None])
    assert abs(out[np.isfinite(spoiled)[None]].mean()) < 0.01


def test_slides_without_contrast_and_of_different_channels_are_refused():
    with pytest.raises(InputError, match="expected contrast in every one, got"):
        measure_channels(slides_of(np.full((1, 8, 8), 7, np.uint8)), 1)
    with pytest.raises(InputError, match="pixels of the slides: expected finite numbers"):
        measure_channels(slides_of(np.full((1, 8, 8), np.nan, np.float32)), 1)
    with pytest.raises(InputError, match=r"slide [01]: expected [13] channels, as in slide 0"):
        measure_channels(slides_of(np.eye(8)[None], np.zeros((3, 8, 8))), 1)
