import numpy as np
import pytest
from array_slide import ArraySlide

from muvit.data.crops.crops import NestedCrops
from muvit.data.crops.normalize import (
    Range,
    lacks_measured_values,
    measured_normalization,
    normalization_from_dict,
    normalization_to_dict,
)
from muvit.data.crops.preprocessing import CropConfig
from muvit.data.crops.slide_crops import read_views
from muvit.data.crops.stain import (
    HED,
    Macenko,
    Reinhard,
    check_colors,
    fit_stains,
    from_density,
    hed_map,
    measure_stains,
    tissue_densities,
    to_density,
)
from muvit.errors import InputError

FIRST, SECOND = (np.array(v) / np.linalg.norm(v) for v in ([0.6, 0.7, 0.4], [0.1, 0.9, 0.3]))
OTHER = tuple(np.array(v) / np.linalg.norm(v) for v in ([0.75, 0.6, 0.3], [0.2, 0.8, 0.55]))


def amounts(seed=0, side=160):
    """Amounts of two stains ``(2, side, side)``: bare glass, pure stains and mixtures."""
    rng = np.random.default_rng(seed)
    found = rng.uniform(0.3, 1.2, (2, side, side))
    kind = np.arange(side) % 4
    found[0][:, kind == 1] = found[1][:, kind == 2] = 0
    found[:, : side // 4] = 0
    return found


def section(stains=(FIRST, SECOND), strength=1.0, seed=0, white=255, **options):
    density = np.tensordot(np.stack(stains, axis=1), strength * amounts(seed), axes=1)
    pixels = np.rint(from_density(density, white))
    return ArraySlide(pixels.astype(np.uint8 if white == 255 else np.uint16), **options)


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 255)])
def test_density_is_the_logarithm_of_light_and_turns_back_into_it(dtype, white):
    values = np.arange(white + 1).astype(dtype)
    density = to_density(values, white)
    assert density.dtype == np.float32 and density[white] == 0
    np.testing.assert_allclose(density, -np.log((values + 1.0) / (white + 1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.rint(from_density(density, white)), values)


def test_stain_jitter_scales_and_shifts_the_amounts_of_each_stain():
    rng = np.random.default_rng(0)
    gain, offset = np.array([0.8, 1.3, 1.1]), np.array([0.05, 0.0, -0.02])
    found = rng.uniform(0, 1, (3, 50))
    changed = hed_map(gain, offset)(HED.T @ found)
    np.testing.assert_allclose(np.linalg.solve(HED.T, changed), gain[:, None] * found + offset[:, None], atol=1e-5)
    back = hed_map(1 / gain, -offset / gain)(changed)
    np.testing.assert_allclose(back, HED.T @ found, atol=1e-5)


def test_macenko_finds_the_stains_of_a_section():
    density = tissue_densities(section())
    assert density.mean(axis=0).min() > 0.15
    found = Macenko.of_tissue(density)
    np.testing.assert_allclose(found.first, FIRST, atol=0.02)
    np.testing.assert_allclose(found.second, SECOND, atol=0.02)
    np.testing.assert_allclose(found.strengths, 1.2, atol=0.05)


@pytest.mark.parametrize("white", [255, 65535])
def test_macenko_gives_sections_of_other_stains_the_look_of_the_target(white):
    names = ("red", "green", "blue")
    target, pale = section(white=white), section(OTHER, 0.6, white=white)
    target.channel_names = pale.channel_names = names
    normalization = measure_stains(Macenko, [target])
    expected = target.read(1, (0, 0), target.shape) / white
    before = np.abs(pale.read(1, (0, 0), pale.shape) / white - expected).mean()
    after = fit_stains(normalization, pale)(pale.read(1, (0, 0), pale.shape)[None])[0]
    assert after.dtype == np.float32 and 0 <= after.min() <= after.max() <= 1
    assert np.abs(after - expected).mean() < 0.15 * before
    same = fit_stains(normalization, target)(target.read(1, (0, 0), target.shape)[None])[0]
    np.testing.assert_allclose(same, expected, atol=0.01)


def test_reinhard_gives_tissue_the_mean_and_deviation_of_the_target():
    target, pale = (tissue_densities(section(*look)) for look in (((FIRST, SECOND), 1.0), (OTHER, 0.6)))
    normalization = Reinhard.of_tissue(target)
    moved = Reinhard.of_tissue(normalization.map_from(pale)(pale))
    np.testing.assert_allclose(moved.mean, normalization.mean, atol=1e-3)
    np.testing.assert_allclose(moved.std, normalization.std, rtol=1e-2)
    np.testing.assert_allclose(normalization.map_from(target)(target), target, atol=1e-4)


@pytest.mark.parametrize("kind", [Macenko, Reinhard])
def test_a_slide_without_tissue_stays_as_it_is(kind):
    glass = ArraySlide(np.random.default_rng(0).integers(235, 256, (3, 100, 100)).astype(np.uint8), name="glass")
    assert tissue_densities(glass) is None
    pixels = glass.read(1, (0, 0), (100, 100))[None]
    fitted = fit_stains(kind.of_tissue(tissue_densities(section())), glass)
    np.testing.assert_array_equal(fitted(pixels), Range(high=255)(pixels))
    with pytest.raises(InputError, match="expected slides with tissue, got none with any"):
        measure_stains(kind, [glass])


@pytest.mark.parametrize("kind", [Macenko, Reinhard])
def test_targets_are_measured_on_the_training_slides_and_kept_in_settings(kind):
    slides = [section(seed=0), section(OTHER, seed=1), section(seed=2)]
    settings = {"kind": kind.kind}
    assert lacks_measured_values(settings)
    measured = measured_normalization(settings, slides, 1)
    each = [kind.of_tissue(tissue_densities(slide)) for slide in slides]
    values = normalization_to_dict(measured)
    for name in values.keys() - {"kind", "first", "second"}:
        np.testing.assert_allclose(values[name], np.median([getattr(fit, name) for fit in each], axis=0))
    assert not lacks_measured_values(values)
    assert normalization_from_dict(values) == measured


def test_each_slide_of_a_data_set_is_fitted_to_its_own_tissue():
    slides = [section(name="a"), section(OTHER, 0.6, name="b")]
    target = measure_stains(Macenko, slides[:1])
    crops = NestedCrops([(s, None) for s in slides], CropConfig(levels=(1,), size=(160, 160), normalization=target))
    windows = [crops.place(i, start=(0, 0)).windows for i in range(2)]
    samples = [read_views(slides[i], windows[i], crops.config)["img"].numpy() for i in range(2)]
    raw = [slide.read(1, (0, 0), slide.shape) / 255 for slide in slides]
    assert np.abs(samples[0] - samples[1]).mean() < 0.15 * np.abs(raw[0] - raw[1]).mean()


@pytest.mark.parametrize("values", [{"first": [1, 0, 0]}, {"first": [1, 0], "second": [0, 1], "strengths": [1, 1]}, {}])
def test_stains_that_are_none_are_refused(values):
    with pytest.raises(InputError, match=r"macenko|stains"):
        normalization_from_dict({"kind": "macenko"} | values)
    with pytest.raises(InputError, match="mean and std"):
        Reinhard((0, 0, 0), (1, 0, 1))


def test_images_without_colours_are_refused():
    volume = ArraySlide(np.zeros((3, 8, 64, 64), np.uint8))
    fluorescence = ArraySlide(np.zeros((3, 64, 64), np.uint16))
    for slide in (volume, fluorescence, ArraySlide(np.zeros((64, 64), np.uint8))):
        config = CropConfig(levels=(1,), size=(8,) * slide.ndim, normalization=Reinhard((0, 0, 0), (1, 1, 1)))
        with pytest.raises(InputError, match="normalization macenko or reinhard: expected"):
            NestedCrops([(slide, None)], config)
    with pytest.raises(
        InputError, match=r"hed: expected RGB images of 8 bits.*got 3 channel\(s\) of uint16, channel 0"
    ):
        check_colors(fluorescence, "hed")
