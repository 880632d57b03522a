from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion, distance_transform_edt

from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.evaluation.scores import boundaries
from muvit.evaluation.scores.boundaries import BoundaryConfig, boundary_mask, compare_boundaries


class Labels(Slide):
    """A nearest-neighbour pyramid of labels in memory."""

    def __init__(self, labels, pixel_size_um, levels):
        self.pyramid = {float(n): labels[(slice(None, None, n),) * labels.ndim][None] for n in levels}
        super().__init__(
            Path("memory"),
            level_shapes={level: pixels.shape[1:] for level, pixels in self.pyramid.items()},
            num_channels=1,
            dtype=labels.dtype,
            pixel_size_um=pixel_size_um,
            channel_names=("label",),
        )

    def _read_window(self, level, start, stop):
        return self.pyramid[level][(slice(None), *map(slice, start, stop))].copy()


def compare(guess, truth, num_classes=3, ignore=(), pixel_size_um=None, levels=(1,), **config):
    slides = (Labels(labels, pixel_size_um, levels) for labels in (guess, truth))
    return compare_boundaries(*slides, num_classes, BoundaryConfig(**config), ignore)


def blobs(seed, shape):
    """Smooth regions of three classes that keep away from the border."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    for value in (1, 2):
        center = [rng.uniform(0.35 * n, 0.65 * n) for n in shape]
        labels[np.linalg.norm(grid - center, axis=-1) < rng.uniform(0.15, 0.3) * min(shape)] = value
    return labels


def by_distance_maps(guess, truth, c, tolerance, spacing):
    """F1 and HD95 from dense distance maps of the rims that an erosion takes away."""
    rims = [mask & ~binary_erosion(mask) for mask in (guess == c, truth == c)]
    maps = [distance_transform_edt(~rim, sampling=spacing) for rim in rims]
    to_truth, to_guess = maps[1][rims[0]], maps[0][rims[1]]
    precision, recall = ((d <= tolerance).mean() for d in (to_truth, to_guess))
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return f1, max(np.percentile(to_truth, 95), np.percentile(to_guess, 95))


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 2), st.sampled_from([(40, 50), (16, 20, 18)]), st.floats(0, 4), st.booleans())
def test_scores_equal_those_of_distance_maps(seed, shape, tolerance, in_um):
    guess, truth = blobs(seed, shape), blobs(seed + 1, shape)
    size = tuple(0.5 + 0.25 * i for i in range(len(shape)))
    counts, hausdorff = compare(
        guess, truth, tolerance=tolerance, unit="um" if in_um else "px", pixel_size_um=size if in_um else None
    )
    for c in (1, 2):
        if not ((guess == c).any() and (truth == c).any()):
            assert np.isnan(hausdorff[c])
            continue
        f1, distance = by_distance_maps(guess, truth, c, tolerance, size if in_um else 1)
        assert counts.f1[c] == pytest.approx(f1)
        assert hausdorff[c] == pytest.approx(distance)


def test_blocks_change_nothing(monkeypatch):
    guess, truth = np.random.default_rng(0).integers(0, 3, (2, 37, 45)).astype(np.uint8)
    whole = compare(guess, truth)
    monkeypatch.setattr(boundaries, "BLOCK_PIXELS", 1 << 6)
    parts = compare(guess, truth)
    assert np.array_equal(parts[0].f1, whole[0].f1)
    assert np.array_equal(parts[0].num_true, whole[0].num_true)
    assert np.array_equal(parts[1], whole[1])


def test_an_outline_moved_by_the_tolerance_is_found_and_one_further_is_not():
    truth, near, far = np.zeros((3, 60, 60), np.uint8)
    truth[20:40, 20:40], near[20:40, 22:42], far[20:40, 30:50] = 1, 1, 1
    counts, hausdorff = compare(near, truth, 2, tolerance=2)
    assert counts.f1[1] == 1
    assert hausdorff[1] == 2
    assert compare(far, truth, 2, tolerance=2)[0].f1[1] < 0.7
    assert compare(far, truth, 2, tolerance=2)[1][1] == 10


def test_neither_the_border_of_the_image_nor_the_rim_of_ignored_pixels_is_a_boundary():
    labels = np.ones((20, 20), np.uint8)
    labels[5:9, 5:9] = 7
    assert not boundary_mask(labels, labels != 7).any()
    counts, hausdorff = compare(np.ones((20, 20), np.uint8), labels, 2, ignore=(7,))
    assert counts.num_true.sum() == counts.num_predicted.sum() == 0
    assert np.isnan(counts.f1).all() and np.isnan(hausdorff).all()


def test_a_class_that_only_one_of_both_has_scores_zero():
    truth = np.zeros((20, 20), np.uint8)
    truth[5:9, 5:9] = 1
    for guess, true in ((np.zeros_like(truth), truth), (truth, np.zeros_like(truth))):
        counts, hausdorff = compare(guess, true, 3)
        assert counts.f1[1] == 0
        assert np.isnan(counts.f1[2]) and np.isnan(hausdorff[1])


def test_a_coarser_level_gives_distances_in_finest_pixels():
    truth, guess = np.zeros((2, 80, 80), np.uint8)
    truth[16:64, 16:64], guess[16:64, 24:72] = 1, 1
    fine, coarse = (compare(guess, truth, 2, levels=(1, 4), level=level) for level in (1, 4))
    assert fine[1][1] == coarse[1][1] == 8
    assert coarse[0].num_true[1] < fine[0].num_true[1]


def test_what_cannot_be_measured_is_refused(monkeypatch):
    labels = np.random.default_rng(0).integers(0, 3, (20, 20)).astype(np.uint8)
    with pytest.raises(InputError, match="memory: expected a pixel size"):
        compare(labels, labels, unit="um")
    with pytest.raises(InputError, match="level 4: expected one of its stored levels"):
        compare(labels, labels, level=4)
    with pytest.raises(InputError, match="boundary tolerance: expected a distance >= 0"):
        BoundaryConfig(tolerance=-1)
    with pytest.raises(InputError, match="boundary unit: expected px or um"):
        BoundaryConfig(unit="mm")
    monkeypatch.setattr(boundaries, "MAX_BOUNDARY_PIXELS", 100)
    with pytest.raises(InputError, match=r"expected at most 100 pixels of them, got more\. Compare a coarser level"):
        compare(labels, labels)
