from dataclasses import replace

import numpy as np
import pytest
import torch
from array_slide import ArraySlide
from scipy.ndimage import gaussian_filter
from scipy.stats import kstest

from muvit.data.crops.appearance import Appearance
from muvit.data.crops.augment import Augmentation
from muvit.data.crops.crops import NestedCrops
from muvit.data.crops.defects import degrade, normal_numbers
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import CropConfig
from muvit.errors import InputError

COLORS = {"hed": 0.2, "brightness": 0.2, "contrast": 0.3, "saturation": 0.4, "hue": 0.1}
DEFECTS = {"gamma": (0.5, 2), "blur_px": 2.0, "noise": 0.1, "channel_drop": 0.5}
CONFIG = CropConfig(levels=(1, 4), size=(24, 24), normalization=Range(high=255), num_classes=5)
LUMA = np.array([0.299, 0.587, 0.114])


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def crops(**augmentation):
    image = ArraySlide(pixels(3, 100, 100), levels=(1, 4), name="image")
    label = ArraySlide(pixels(100, 100) % 5, levels=(1,))
    return NestedCrops([(image, label)], CONFIG, augmentation=Augmentation(**augmentation))


def recolored(rgb, seed=0, **settings):
    return Appearance(**settings).draw_colors(np.random.default_rng(seed), len(rgb), 255)(rgb)


def degraded(img, inside=None, seed=0, **settings):
    views = img.clone()
    degrade(views, Appearance(**settings).draw_defects(np.random.default_rng(seed), *img.shape[:2]), inside)
    return views


def test_everything_is_off_by_default():
    assert not Augmentation().has_colors and not Augmentation().has_defects
    img = pixels(2, 3, 9, 9)
    np.testing.assert_array_equal(recolored(img), img)
    normalised = torch.rand(2, 3, 9, 9)
    assert torch.equal(degraded(normalised), normalised)


@pytest.mark.parametrize("settings", [COLORS, DEFECTS, COLORS | DEFECTS])
def test_places_labels_and_boxes_are_those_of_a_sample_without(settings):
    plain, changed = crops(), crops(**settings)
    for index in range(12):
        one, other = plain[index], changed[index]
        assert torch.equal(one["bbox"], other["bbox"]) and torch.equal(one["label"], other["label"])
        assert not torch.equal(one["img"], other["img"])
        assert all(torch.equal(value, changed[index][name]) for name, value in other.items())


@pytest.mark.parametrize("settings", [COLORS, DEFECTS | {"noise": 0, "gamma": (2, 3)}])
@pytest.mark.parametrize("appearance", ["alike", "independent"])
def test_views_change_alike_unless_each_is_drawn(settings, appearance):
    view = pixels(3, 16, 16)
    look = Appearance(**settings, appearance=appearance)
    img = np.stack([view] * 3)
    if look.has_colors:
        found = look.draw_colors(np.random.default_rng(1), 3, 255)(img)
    else:
        found = degraded(torch.from_numpy(img / np.float32(255)), **settings, appearance=appearance, seed=1).numpy()
    is_alike = (found[0] == found[1]).all() and (found[0] == found[2]).all()
    assert is_alike == (appearance == "alike")


def test_strengths_bound_what_changes():
    img = pixels(1, 3, 40, 40) // 2 + 60  # far from both ends, where values are cut off
    grey = np.repeat(img[:, :1], 3, axis=1)
    for seed in range(20):
        ratio = recolored(img, seed, brightness=0.2) / img
        assert ratio.min() > 0.79 and ratio.max() < 1.21 and np.ptp(ratio) < 0.02
        spread = (recolored(img, seed, contrast=0.3) - 127.5) / (img - 127.5)
        far = np.abs(img - 127.5) > 40
        assert spread[far].min() > 0.68 and spread[far].max() < 1.32 and np.ptp(spread[far]) < 0.05
        for settings in ({"saturation": 0.4}, {"hue": 0.5}):
            np.testing.assert_array_equal(recolored(grey, seed, **settings), grey)
        muted = img // 4 + 90
        for settings in ({"saturation": 0.4}, {"hue": 0.5}):
            luma = np.tensordot(LUMA, recolored(muted, seed, **settings)[0].astype(float) - muted[0], axes=1)
            assert np.abs(luma).max() < 1.01  # of rounding


def test_colours_keep_their_type_and_range():
    for dtype, white in ((np.uint8, 255), (np.uint16, 65535), (np.float32, 255)):
        img = (np.random.default_rng(0).random((2, 3, 8, 8)) * white).astype(dtype)
        found = Appearance(**COLORS).draw_colors(np.random.default_rng(0), 2, white)(img)
        assert found.dtype == dtype and found.min() >= 0 and found.max() <= white


def test_gamma_is_a_power_of_what_is_above_0():
    img = torch.linspace(-1, 2, 64).reshape(1, 1, 8, 8)
    found = degraded(img, gamma=(2, 2))
    torch.testing.assert_close(found, torch.where(img > 0, img**2, img))


def test_a_blur_is_that_of_scipy():
    img = torch.rand(2, 3, 20, 31, generator=torch.Generator().manual_seed(0))
    look = Appearance(blur_px=3, appearance="independent")
    rng = np.random.default_rng(4)
    sigmas = [look._draw_defects(rng, 3)[0] for _ in range(2)]
    found = degraded(img, seed=4, blur_px=3, appearance="independent")
    for view, blurred, sigma in zip(img, found, sigmas, strict=True):
        expected = gaussian_filter(view.double().numpy(), (0, sigma, sigma), mode="nearest")
        np.testing.assert_allclose(blurred, expected, atol=1e-6)


def test_noise_has_its_deviation_and_blur_keeps_the_mean():
    img = torch.zeros(2, 2, 200, 200)
    deviations = [degraded(img, seed=i, noise=0.3).std() for i in range(20)]
    assert max(deviations) < 0.31 and 0.1 < np.mean(deviations) < 0.2  # uniform from 0 to 0.3
    img[..., 100, 100] = 1
    found = degraded(img, blur_px=3)
    torch.testing.assert_close(found.sum((-2, -1)), torch.ones(2, 2))
    assert found.max() < 0.5


def test_numbers_of_noise_are_normal_and_independent():
    count = 1 << 16
    found = normal_numbers(torch.tensor([0, 1, 7, 2**31 - 1], dtype=torch.int32), count)
    again = normal_numbers(torch.tensor([7], dtype=torch.int32), count - 1)
    assert torch.equal(found[2:3, : count // 2], again[:, : count // 2]) and again.shape == (1, count - 1)
    assert kstest(found.flatten().numpy(), "norm").pvalue > 0.01
    x = found.double()
    shifted = [x[:, :-shift] * x[:, shift:] for shift in (1, 2, 256, count // 2)]
    others = [x[i] * x[j] for i in range(4) for j in range(i)]
    for products in (*shifted, *others):
        assert products.mean().abs() < 5 / products.numel() ** 0.5
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert ((x**power).mean(1) - moment).abs().max() < 0.2


def test_what_lies_outside_the_image_stays_0_and_does_not_bleed_in():
    inside = torch.ones(2, 32, 32, dtype=torch.bool)
    inside[1, :, 12:] = False
    img = torch.ones(2, 3, 32, 32) * inside[:, None]
    torch.testing.assert_close(degraded(img, inside, blur_px=4), img)
    found = degraded(img, inside, 1, **DEFECTS)
    assert not found[1, :, :, 12:].any()


def test_at_least_one_channel_stays():
    img = torch.ones(2, 4, 3, 3)
    for seed in range(30):
        found = degraded(img, seed=seed, channel_drop=0.9)
        kept = found[0, :, 0, 0].bool()
        assert kept.any() and torch.equal(found, img * kept[None, :, None, None])
    assert not kept.all()


def test_colours_of_images_without_them_are_refused():
    image = ArraySlide(pixels(2, 64, 64), levels=(1, 4), name="a.tif")
    config = replace(CONFIG, num_classes=None)
    NestedCrops([(image, None)], config, augmentation=Augmentation(**DEFECTS))
    with pytest.raises(InputError, match=r"hed, brightness.*: expected RGB images.*got 2 channel\(s\) of uint8.*a.tif"):
        NestedCrops([(image, None)], config, augmentation=Augmentation(hed=0.1))


@pytest.mark.parametrize(
    "wrong",
    [{"hed": -1}, {"hue": 0.6}, {"noise": float("nan")}, {"channel_drop": 2}, {"gamma": (0, 1)}, {"appearance": "any"}],
)
def test_strengths_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Augmentation(**wrong)
