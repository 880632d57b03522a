import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_slide import world_slide

from muvit.data.crops.augment import Augmentation, flip_sample, transpose_sample
from muvit.data.crops.normalize import Range
from muvit.data.crops.placement import place_views
from muvit.data.crops.preprocessing import CropConfig
from muvit.data.crops.slide_crops import read_views
from muvit.errors import InputError
from muvit.geometry import box_center, box_size, patch_centers

SLIDES = {2: world_slide((301, 203), (1, 4, 8)), 3: world_slide((40, 91, 83), (1, 4, 8))}


def world_sample(seed, ndim=2, size=16):
    """A nested sample whose channel ``a`` holds the world coordinate of each pixel along axis ``a``."""
    slide, levels = SLIDES[ndim], (1, 4, 8)
    config = CropConfig(levels=levels, size=(size,) * ndim, normalization=Range(0, 1), padding="edge")
    shapes = [slide.level_shape(level) for level in levels]
    sample = read_views(
        slide, place_views("nested", shapes, levels, config.size, rng=np.random.default_rng(seed)).windows, config
    )
    # make the pixels outside true as well: the world goes on there
    sample["img"] = pixel_centers(sample)
    sample["labels"] = labels_of(sample["img"])
    sample["label"] = sample["labels"][0]
    return sample


def pixel_centers(sample):
    """World coordinates of all pixels by their boxes, ``(L, ndim, *space)``."""
    space = sample["img"].shape[2:]
    return patch_centers(sample["bbox"], space).reshape(-1, *space, len(space)).movedim(-1, 1)


def labels_of(img):
    """A label for each place that the pixels ``(L, ndim, *space)`` hold, ``(L, *space)``."""
    ndim = img.shape[1]
    return (img * torch.tensor([1.0, 1000.0, 7.0][:ndim]).view(-1, *(1,) * ndim)).sum(1).long()


@given(st.integers(0, 10**6), st.sampled_from([2, 3]), st.data())
def test_flipped_pixels_stand_at_their_mirrored_place_at_every_level(seed, ndim, data):
    axes = data.draw(st.lists(st.integers(-ndim, -1), unique=True))
    sample = world_sample(seed, ndim)
    flipped = flip_sample(sample, axes)
    expected = pixel_centers(flipped)
    middle = box_center(sample["bbox"][0])
    for axis in axes:
        expected[:, axis] = 2 * middle[axis] - expected[:, axis]
    assert torch.equal(flipped["img"], expected)
    assert torch.equal(flipped["label"], labels_of(flipped["img"])[0])
    assert torch.equal(flipped["labels"], labels_of(flipped["img"]))
    again = flip_sample(flipped, axes)
    assert all(torch.equal(again[key], sample[key]) for key in sample)


@given(st.integers(0, 10**6), st.sampled_from([2, 3]))
def test_transposed_pixels_stand_at_their_mirrored_place_at_every_level(seed, ndim):
    sample = world_sample(seed, ndim)
    turned = transpose_sample(sample)
    place = pixel_centers(turned)
    y, x = box_center(sample["bbox"][0])[-2:]
    expected = place.clone()
    expected[:, -2], expected[:, -1] = y + place[:, -1] - x, x + place[:, -2] - y
    assert torch.equal(turned["img"], expected)
    assert torch.equal(turned["label"], labels_of(turned["img"])[0])
    assert torch.equal(turned["labels"], labels_of(turned["img"]))


def test_boxes_stay_exact_far_from_the_origin():
    boxes = torch.tensor([[[1e7, 1e7 + 2], [1e7 + 9, 1e7 + 11]], [[1e7 - 3, 1e7], [1e7 + 33, 1e7 + 36]]])
    sample = {"img": torch.zeros(2, 1, 9, 9), "bbox": boxes}
    flipped = flip_sample(sample, [-2])["bbox"]
    assert flipped[:, :, 0].tolist() == [[1e7, 1e7 + 9], [1e7 - 24, 1e7 + 12]]
    turned = transpose_sample(sample)["bbox"]
    assert turned[1].tolist() == [[1e7 - 2, 1e7 - 1], [1e7 + 34, 1e7 + 35]]


def test_geometric_augmentation_reaches_all_eight_orientations_of_a_square():
    sample = world_sample(3)
    relative = sample["img"][0] - box_center(sample["bbox"][0]).view(2, 1, 1)
    seen = set()
    for seed in range(100):
        out = Augmentation.geometric(quarter_turns=True)(sample, np.random.default_rng(seed))
        corner = out["img"][0, :, 0, 1] - box_center(sample["bbox"][0])
        seen.add(tuple(corner.tolist()))
        assert torch.equal(out["bbox"][0], sample["bbox"][0])
        assert torch.equal(out["label"], labels_of(out["img"])[0])
    y, x = relative[:, 0, 1].abs().tolist()
    assert seen == {(s * a, t * b) for a, b in ((y, x), (x, y)) for s in (1, -1) for t in (1, -1)}


def test_intensity_changes_alike_at_all_levels_within_its_ranges():
    sample = world_sample(0)
    augmentation = Augmentation(flip_axes=(), box_scale=(1, 1), box_shift_px=0)
    factors = []
    for seed in range(200):
        out = augmentation(sample, np.random.default_rng(seed))
        x, y = sample["img"].flatten().double(), out["img"].flatten().double()
        gain = ((y[-1] - y[0]) / (x[-1] - x[0])).item()
        offset = (y[0] - gain * x[0]).item()
        torch.testing.assert_close(y, gain * x + offset, rtol=0, atol=1e-4)
        assert torch.equal(out["bbox"], sample["bbox"])
        assert torch.equal(out["label"], sample["label"])
        factors.append((gain, offset))
    low, high = np.min(factors, axis=0), np.max(factors, axis=0)
    np.testing.assert_allclose(low, (0.8, -0.1), atol=0.02)
    np.testing.assert_allclose(high, (1.2, 0.1), atol=0.02)


def test_boxes_scale_together_and_shift_each_on_its_own():
    sample = world_sample(0)
    augmentation = Augmentation(flip_axes=(), gain=(1, 1), offset=(0, 0))
    scales, shifts = [], []
    for seed in range(500):
        out = augmentation(sample, np.random.default_rng(seed))
        assert torch.equal(out["img"], sample["img"])
        ratio = box_size(out["bbox"]) / box_size(sample["bbox"])
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-4, atol=0)
        scales.append(ratio.mean().item())
        about = box_center(sample["bbox"][0])
        unshifted = about + ratio * (box_center(sample["bbox"]) - about)
        shifts.append(box_center(out["bbox"]) - unshifted)
    assert min(scales) == pytest.approx(0.9, abs=0.01)
    assert max(scales) == pytest.approx(1.1, abs=0.01)
    drawn = torch.stack(shifts)
    assert drawn.std(0).sub(8).abs().max() < 1
    correlation = np.corrcoef(drawn.flatten(1).T.numpy()) - np.eye(6)
    assert np.abs(correlation).max() < 0.2


def test_augmentation_depends_on_its_generator_alone_and_leaves_the_sample_alone():
    sample = world_sample(0)
    before = {key: value.clone() for key, value in sample.items()}
    first, second = (Augmentation(quarter_turns=True)(sample, np.random.default_rng(5)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in sample)
    assert all(torch.equal(before[key], sample[key]) for key in sample)
    assert first["img"].dtype == first["bbox"].dtype == torch.float32


def test_samples_without_labels_and_with_other_keys_pass():
    sample = {"img": torch.zeros(1, 1, 8, 8), "bbox": torch.tensor([[[0.0, 0], [8, 8]]]), "slide": torch.tensor(3)}
    out = Augmentation()(sample, np.random.default_rng(0))
    assert set(out) == set(sample)
    assert out["slide"] == 3


def test_views_that_are_not_square_do_not_turn():
    with pytest.raises(InputError, match="square views, got 8 x 16"):
        transpose_sample({"img": torch.zeros(1, 1, 8, 16), "bbox": torch.zeros(1, 2, 2)})


@pytest.mark.parametrize(
    "settings",
    [
        {"gain": (1.2, 0.8)},
        {"gain": (0, 1)},
        {"offset": (0, math.inf)},
        {"box_scale": (-1, 1)},
        {"box_shift_px": -1},
        {"flip_axes": (0, 1)},
    ],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Augmentation(**settings)
