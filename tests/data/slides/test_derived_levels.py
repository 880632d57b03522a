import pickle

import numpy as np
import pytest
from memory_slide import MemorySlide

from muvit.data.pyramids.reduction import area_mean, majority
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.derived import DerivedLevels, complete_slide, with_levels
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.errors import InputError


def noise(shape, dtype=np.uint8):
    values = np.random.default_rng(0).integers(0, 256, shape)
    return values.astype(dtype)


@pytest.mark.parametrize(
    ("kind", "channels", "dtype"),
    [("image", 3, np.uint8), ("image", 3, np.uint16), ("image", 3, np.float32), ("label", 1, np.uint16)],
)
def test_derived_levels_are_what_a_pyramid_stores(tmp_path, kind, channels, dtype):
    pixels = noise((channels, 301, 207), dtype) // (1 if kind == "image" else 64)
    writer = PyramidWriter.create(
        tmp_path / "a.ome.zarr",
        shape=pixels.shape[1:],
        num_channels=channels,
        dtype=dtype,
        kind=kind,
        levels=(1, 4, 16),
        chunk=32,
        shard=64,
    )
    writer.write((0, 0), pixels)
    writer.finish()
    stored = OmeZarrSlide(tmp_path / "a.ome.zarr")
    derived = with_levels(MemorySlide({1: pixels}), (1, 4, 16), kind)
    assert derived.levels == stored.levels
    for level in stored.levels:
        shape = stored.level_shape(level)
        assert derived.level_shape(level) == shape
        for start, size in (((0, 0), shape), ((-3, 5), (20, 9)), ((shape[0] - 2, 0), (6, 7))):
            for padding in ("zero", "reflect"):
                expected = stored.read(level, start, size, padding=padding)
                np.testing.assert_array_equal(derived.read(level, start, size, padding=padding), expected)


def test_stored_levels_are_read_as_they_are_and_the_nearest_of_them_is_reduced():
    finest, coarse = noise((1, 64, 64)), noise((1, 16, 16))  # which have nothing to do with each other
    derived = DerivedLevels(MemorySlide({1: finest, 4: coarse}), (8,))
    assert derived.levels == (1, 4, 8)
    np.testing.assert_array_equal(derived.read(4, (0, 0), (16, 16)), coarse)
    np.testing.assert_array_equal(derived.read(8, (0, 0), (8, 8)), area_mean(coarse, 2))


def test_labels_are_reduced_from_the_finest_level():
    finest, coarse = noise((1, 64, 64)) // 64, noise((1, 16, 16))
    derived = DerivedLevels(MemorySlide({1: finest, 4: coarse}), (8,), "label")
    np.testing.assert_array_equal(derived.read(4, (0, 0), (16, 16)), coarse)
    np.testing.assert_array_equal(derived.read(8, (0, 0), (8, 8)), majority(finest, 8))


def test_axes_may_be_reduced_differently():
    stack = noise((1, 6, 33, 40))
    derived = DerivedLevels(MemorySlide({1: stack}), ((1, 4, 4),))
    assert derived.level_shape((1, 4, 4)) == (6, 9, 10)
    np.testing.assert_array_equal(derived.read((1, 4, 4), (2, 0, 0), (3, 9, 10)), area_mean(stack, (1, 4, 4))[:, 2:5])


def test_memory_is_bounded_and_blocks_are_read_once(monkeypatch):
    monkeypatch.setattr("muvit.data.slides.derived._REDUCED_PIXELS", 1 << 12)
    pixels = noise((1, 600, 700))
    base = MemorySlide({1: pixels})
    derived = DerivedLevels(base, (2,))
    np.testing.assert_array_equal(derived.read(2, (0, 0), (300, 350)), area_mean(pixels, 2))
    assert max(np.prod(window) for _, window in base.windows) <= 1 << 12
    seen = len(base.windows)
    derived.read(2, (17, 3), (200, 200))
    assert len(base.windows) == seen


def test_a_slide_with_all_levels_stays_itself():
    slide = MemorySlide({1: noise((1, 8, 8)), 2: noise((1, 4, 4))})
    assert with_levels(slide, (1, 2)) is slide
    assert isinstance(with_levels(slide, (1, 4)), DerivedLevels)


def test_levels_are_added_without_wrapping_twice_and_the_file_keeps_its_identity():
    slide = MemorySlide({1: noise((1, 16, 16)), 2: noise((1, 8, 8))})
    derived = with_levels(with_levels(slide, (4,)), (8,))
    assert derived.slide is slide
    assert derived.levels == (1, 2, 4, 8)
    assert derived.stored_levels == slide.levels == (1, 2)
    assert derived.identify() == slide.identify()
    assert complete_slide(derived, (1, 8)) is derived


def test_it_travels_to_other_processes():
    derived = pickle.loads(pickle.dumps(DerivedLevels(MemorySlide({1: noise((1, 40, 40))}), (4,))))
    np.testing.assert_array_equal(derived.read(4, (0, 0), (10, 10)), area_mean(noise((1, 40, 40)), 4))


def test_a_level_that_is_no_multiple_of_a_stored_one_is_refused():
    slide = MemorySlide({1: noise((1, 8, 8)), 4: noise((1, 2, 2))})
    assert DerivedLevels(slide, (6,)).level_shape(6) == (2, 2)  # from the finest
    with pytest.raises(InputError, match="expected one of its stored levels 1, 4"):
        DerivedLevels(slide, (1, 2.5))
