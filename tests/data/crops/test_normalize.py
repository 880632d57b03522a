import numpy as np
import pytest
from array_slide import ArraySlide
from hypothesis import given
from hypothesis import strategies as st

from muvit.data.crops.normalize import (
    Percentile,
    Range,
    Standardize,
    _percentiles,
    fitted,
    normalization_from_dict,
    normalization_to_dict,
)
from muvit.data.slides.slide import sample_pixels
from muvit.errors import InputError


def pixels(seed=0, shape=(3, 2, 20, 30)):
    return np.random.default_rng(seed).gamma(2.0, 100.0, shape).astype(np.float32)


def test_percentile_puts_the_percentiles_of_each_view_and_channel_at_0_and_1():
    img = pixels() * np.array([1, 10, 100]).reshape(3, 1, 1, 1) + np.array([0, 50]).reshape(1, 2, 1, 1)
    out = Percentile(5, 90)(img)
    assert out.dtype == np.float32
    np.testing.assert_allclose(np.percentile(out, 5, axis=(2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(np.percentile(out, 90, axis=(2, 3)), 1, atol=1e-5)


@given(st.data(), st.sampled_from([np.uint8, np.uint16]), st.sampled_from([1, 200, 60_000]))
def test_counted_percentiles_are_those_of_numpy_to_the_last_bit(data, dtype, top):
    values = np.array(data.draw(st.lists(st.integers(0, min(top, np.iinfo(dtype).max)), min_size=1)), dtype)
    percents = tuple(sorted(data.draw(st.tuples(st.floats(0, 100), st.floats(0, 100)))))
    assert list(_percentiles(values, percents)) == np.percentile(values.astype(np.float32), percents).tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float64])
@pytest.mark.parametrize(
    "normalization",
    [Percentile(), Percentile(5, 70, "sample"), Range(3.3, 251.7), Standardize((1.1, 2.2), (3.3, 4.4), (1,))],
)
def test_pixels_of_any_type_are_normalised_as_their_float32(normalization, dtype):
    img = np.random.default_rng(0).integers(0, 250, (3, 2, 20, 30)).astype(dtype)
    img.flags.writeable = False
    valid = np.ones((3, 20, 30), bool)
    valid[1, :, 20:] = valid[2] = False
    for mask in (None, valid):
        expected = normalization(img.astype(np.float32), mask)
        assert expected.tobytes() == normalization(img, mask).tobytes()


def test_percentile_of_the_sample_keeps_the_ratio_between_views():
    img = pixels()
    out = Percentile(0, 100, "sample")(img)
    for channel in range(2):
        low, high = img[:, channel].min(), img[:, channel].max()
        np.testing.assert_allclose(out[:, channel], (img[:, channel] - low) / (high - low), atol=1e-6)


@given(st.floats(0.01, 1000), st.floats(-1000, 1000), st.sampled_from(["view", "sample"]))
def test_percentile_does_not_depend_on_gain_and_offset(gain, offset, scope):
    img = pixels().astype(np.float64)
    normalization = Percentile(scope=scope)
    np.testing.assert_allclose(normalization(img * gain + offset), normalization(img), atol=0.02)


@pytest.mark.parametrize("value", [0.0, 7.0, -1e-8, 65535.0])
def test_constant_crops_become_zero(value):
    assert not Percentile()(np.full((2, 1, 8, 8), value)).any()


def test_rounding_noise_is_not_stretched_to_contrast():
    img = np.full((1, 1, 64, 64), 1000, dtype=np.float32)
    img[..., ::2] = np.nextafter(np.float32(1000), np.float32(2000))
    assert not Percentile()(img).any()


@pytest.mark.parametrize("scope", ["view", "sample"])
def test_percentiles_ignore_what_lies_outside_the_image(scope):
    img = pixels()
    padded = np.concatenate([img, np.zeros_like(img)], axis=-1)
    valid = np.zeros((3, 20, 60), dtype=bool)
    valid[..., :30] = True
    normalization = Percentile(scope=scope)
    np.testing.assert_array_equal(normalization(padded, valid)[..., :30], normalization(img))


def test_a_view_wholly_outside_becomes_zero():
    assert not Percentile()(pixels(), np.zeros((3, 20, 30), dtype=bool)).any()


@pytest.mark.parametrize("normalization", [Percentile(), Range(0, 255), Standardize((100, 200), (50, 50))])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_pixels_become_zero(normalization, bad):
    img = pixels()
    img[0, 1, 3, 4] = bad
    out = normalization(img)
    assert np.isfinite(out).all()
    others = np.ones(img.shape, dtype=bool)
    others[0, 1, 3, 4] = False
    good = pixels()
    np.testing.assert_allclose(out[others], normalization(good)[others], atol=0.05)
    assert out[0, 1, 3, 4] == pytest.approx(0)


def test_range_and_standardize_by_hand():
    img = np.array([10, 20], dtype=np.uint8).reshape(1, 2, 1, 1)
    np.testing.assert_allclose(Range(10, 30)(img).ravel(), [0, 0.5])
    np.testing.assert_allclose(Standardize((5, 30), (10, 5))(img).ravel(), [0.5, -2])


def test_input_is_left_alone():
    img = pixels()
    for normalization in (Percentile(), Range(0, 9), Standardize((0, 0), (1, 1))):
        normalization(img)
    np.testing.assert_array_equal(img, pixels())


@pytest.mark.parametrize("normalization", [Percentile(2, 98, "sample"), Range(0, 4095), Standardize((1, 2), (3, 4))])
def test_dict_round_trip(normalization):
    plain = normalization_to_dict(normalization)
    assert not any(isinstance(v, tuple) for v in plain.values())  # plain YAML knows no tuples
    assert normalization_from_dict(plain) == normalization


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 1}, "kind out of"),
        ({"kind": "minmax"}, "'percentile', 'range', 'reinhard', 'standardize'.*got 'minmax'"),
        ({"kind": "range", "lower": 1}, "fields .'high', 'low'., got .'lower'."),
        ({"kind": "range", "low": "dark"}, "numbers"),
        ({"kind": "standardize", "mean": [1]}, "numbers"),
    ],
)
def test_wrong_dicts_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        normalization_from_dict(values)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Percentile(99, 1),
        lambda: Percentile(-1, 50),
        lambda: Percentile(scope="image"),
        lambda: Range(1, 1),
        lambda: Range(0, np.nan),
        lambda: Standardize((0, 0), (1,)),
        lambda: Standardize((0,), (0,)),
        lambda: Standardize((np.nan,), (1,)),
    ],
)
def test_wrong_settings_are_refused(make):
    with pytest.raises(InputError, match="expected"):
        make()


def test_channels_must_fit():
    with pytest.raises(InputError, match="2 channels"):
        Standardize((0,), (1,))(pixels())


def test_a_local_mean_is_that_of_the_view_inside_the_image():
    img = pixels() + np.array([0, 1000, 5000]).reshape(3, 1, 1, 1)
    valid = np.ones((3, 20, 30), dtype=bool)
    valid[1, :, :10] = False
    img[1, :, :, :10] = 0
    img[2, 1, 0, 0] = np.nan
    out = Standardize((100.0, -7.0), (50.0, 25.0), local_mean=(1,))(img, valid)
    np.testing.assert_array_equal(out[:, 0], Standardize((100.0, -7.0), (50.0, 25.0))(img, valid)[:, 0])
    for view in range(3):
        seen = valid[view] & np.isfinite(img[view, 1])
        assert out[view, 1][seen].mean() == pytest.approx(0, abs=1e-4)
        assert out[view, 1][seen].std() == pytest.approx(img[view, 1][seen].std() / 25, rel=1e-4)
    assert out[2, 1, 0, 0] == 0


def test_a_local_mean_of_a_channel_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"local_mean: expected channels from 0 to 1, got \[2\]"):
        Standardize((0, 0), (1, 1), local_mean=(2,))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_percentiles_of_the_slide_are_the_same_for_all_its_crops(dtype):
    image = np.random.default_rng(0).gamma(2.0, 20.0, (2, 300, 310)).clip(0, 255).astype(dtype)
    slide = ArraySlide(image, levels=(1, 2), name="slide")
    normalization = Percentile(2, 95, "slide")
    with pytest.raises(InputError, match="scope: expected 'view' or 'sample'"):
        normalization(image[None])
    seen = sample_pixels(slide)
    assert seen.shape == (2, 4 * 256 * 256)  # all blocks of the only level that has at most 4 million pixels
    low, high = np.percentile(seen.astype(np.float32), (2, 95), axis=1)[..., None, None]
    found = fitted(normalization, slide)(image[None]).apply()[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (image - low) / (high - low), rtol=1e-5, atol=1e-5)
    slide.windows.clear()
    crop = fitted(normalization, slide)(image[None, :, 40:80, 9:50]).apply()[0]
    np.testing.assert_array_equal(crop, found[:, 40:80, 9:50])
    assert not slide.windows  # the slide is looked at once


def test_a_channel_without_contrast_in_the_slide_becomes_0():
    image = np.stack([np.full((64, 64), 7), np.arange(64 * 64).reshape(64, 64) % 250]).astype(np.uint8)
    found = fitted(Percentile(scope="slide"), ArraySlide(image))(image[None]).apply()[0]
    assert not found[0].any() and found[1].any()


def test_normalisations_that_need_no_slide_are_themselves():
    slide = ArraySlide(np.zeros((8, 8), np.uint8))
    for normalization in (Percentile(), Percentile(scope="sample"), Range(), Standardize((0,), (1,))):
        assert fitted(normalization, slide) == normalization.measure
