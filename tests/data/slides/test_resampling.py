import logging
import pickle

import numpy as np
import pytest
from memory_slide import MemorySlide, world_slide

from muvit.data.annotations.open import open_annotations
from muvit.data.pyramids.reduction import area_mean, majority
from muvit.data.slides.derived import (
    complete_slide,
    complete_slides,
    match_grid,
    on_grid,
    resample,
)
from muvit.data.slides.open import open_slide
from muvit.data.slides.pixel_size import check_pixel_sizes
from muvit.errors import InputError


def sized(slide, *size_um):
    slide.state_pixel_size(size_um)
    return slide


def noise(shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def whole(slide, level=1):
    return slide.read(level, (0,) * slide.ndim, slide.level_shape(level))


@pytest.mark.parametrize(("kind", "reduced"), [("image", area_mean), ("label", majority)])
def test_whole_numbers_of_pixels_give_the_levels_of_a_pyramid(kind, reduced):
    pixels = noise((1, 301, 207)) // (1 if kind == "image" else 64)
    slide = resample(sized(MemorySlide({1: pixels}), 0.1, 0.1), 0.3, kind)  # 0.3 / 0.1 is not 3 in floating point
    np.testing.assert_array_equal(whole(slide), reduced(pixels, 3))
    assert slide.pixel_size_um == pytest.approx((0.3, 0.3))
    coarse = complete_slides([slide], (1, 4), kind)[0]
    expected = reduced(reduced(pixels, 3), 4) if kind == "image" else reduced(pixels, 12)
    np.testing.assert_array_equal(whole(coarse, 4), expected)


@pytest.mark.parametrize("size", [(0.2525, 0.499), (0.33, 0.25), (1.0, 0.7)])
def test_a_pixel_shows_the_mean_of_its_area(size):
    slide = sized(world_slide((400, 350), (1, 2, 4)), *size)
    derived = complete_slide(slide, (1, 8), pixel_size_um=0.5)
    for axis, own in enumerate(size):
        found = np.moveaxis(whole(derived)[axis], axis, 0)
        edges = (np.arange(len(found) + 1) * 0.5 / own).clip(max=slide.shape[axis])
        steps = np.cumsum(np.arange(slide.shape[axis]) + 0.5)  # its channel is the coordinate of each pixel
        integral = np.interp(edges, np.arange(len(steps) + 1), [0, *steps])
        expected = np.diff(integral) / np.diff(edges)
        np.testing.assert_allclose(found, np.broadcast_to(expected[:, None], found.shape), rtol=1e-4)
        coarse = np.moveaxis(whole(derived, 8)[axis], axis, 0)[:-1]
        centres = (np.arange(len(coarse)) + 0.5) * 8 * 0.5 / own
        np.testing.assert_allclose(coarse, np.broadcast_to(centres[:, None], coarse.shape), atol=1)
    for n, own, m in zip(slide.shape, size, derived.shape, strict=True):
        assert 0 <= m * 0.5 - n * own < 0.5 + 1e-9  # covers the slide, with less than a pixel more


def test_windows_blocks_and_processes_give_equal_pixels():
    pixels = noise((2, 700, 610), np.uint16)
    slide = resample(sized(MemorySlide({1: pixels}), 0.31, 0.47), 0.5)
    everything = whole(slide)
    copy = pickle.loads(pickle.dumps(slide))
    for start, size in (((0, 0), (40, 30)), ((250, 240), (30, 30)), ((300, 500), (8, 64))):
        inside = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        np.testing.assert_array_equal(copy.read(1, start, size), everything[:, *inside])
    assert abs(float(everything.mean()) - pixels.mean()) < 0.5
    flat = resample(sized(MemorySlide({1: np.full((1, 90, 90), 255, np.uint8)}), 0.31, 0.31), 0.5)
    assert (whole(flat) == 255).all()


def test_labels_are_those_at_the_centres():
    labels = noise((1, 200, 300)) // 64
    small = on_grid(MemorySlide({1: labels}), (0.7, 0.4), "label")
    rows, columns = (((np.arange(n) + 0.5) * s).astype(int) for n, s in zip(small.shape, (0.7, 0.4), strict=True))
    np.testing.assert_array_equal(whole(small)[0], labels[0][rows.clip(max=199)[:, None], columns.clip(max=299)])
    # of larger pixels, samples at the centres of equal parts vote
    large = on_grid(MemorySlide({1: labels}), (1.5, 1.5), "label")
    places = ((np.arange(2 * 60) + 0.5) * 0.75).astype(int)
    np.testing.assert_array_equal(large.read(1, (0, 0), (60, 60)), majority(labels[:, places[:, None], places], 2))


def test_the_nearest_finer_stored_level_is_read():
    slide = sized(
        MemorySlide({level: np.zeros((1, 800 // level, 800 // level), np.uint8) for level in (1, 4, 16)}), 0.24, 0.24
    )
    derived = complete_slide(slide, (1, 2, 8), pixel_size_um=0.5)  # 2.08, 4.17 and 16.7 stored pixels
    for level, stored in ((1, 1), (2, 4), (8, 16)):
        slide.windows.clear()
        whole(derived, level)
        assert {found for found, _ in slide.windows} == {stored}
    slide.windows.clear()
    exact = complete_slide(sized(slide, 0.25, 0.25), (1, 8), pixel_size_um=0.5)
    exact.read(8, (0, 0), (50, 50))
    assert slide.windows == [(16, (50, 50))]  # as stored


def test_a_pixel_that_is_no_number_reaches_only_those_that_it_lies_in():
    pixels = np.ones((1, 100, 100), np.float32)
    pixels[0, 50, 50] = np.nan
    found = np.argwhere(np.isnan(whole(on_grid(MemorySlide({1: pixels}), (1.25, 1.25)))[0]))
    assert found.tolist() == [[40, 40]]  # which spans 50 to 51.25


def test_equal_sizes_change_nothing_and_time_is_not_resampled():
    slide = sized(MemorySlide({1: noise((1, 90, 90))}), 0.5, 0.50005)  # .01 pixels off at the end
    assert resample(slide, 0.5) is slide
    movie = MemorySlide({1: noise((1, 4, 20, 20))})
    movie.axes = "tyx"
    assert resample(sized(movie, 3.0, 0.25, 0.25), 0.5).shape == (4, 10, 10)
    with pytest.raises(InputError, match=r"expected 1 s per frame .*time is not resampled, got 3 s"):
        resample(movie, (1.0, 0.5, 0.5))


def test_a_slide_of_unknown_size_and_slides_of_mixed_sizes_are_refused():
    unknown = MemorySlide({1: noise((1, 9, 9))}, "a.png")
    with pytest.raises(InputError, match=r"pixel size of a.png: expected micrometers per pixel, to read it at 0.5 um"):
        complete_slide(unknown, (1,), pixel_size_um=0.5)
    fine, coarse = (
        sized(MemorySlide({1: noise((1, 9, 9))}, name), size, size) for name, size in (("b", 0.25), ("c", 0.5))
    )
    check_pixel_sizes([unknown, fine, sized(MemorySlide({1: noise((1, 9, 9))}), 0.26, 0.25)])
    with pytest.raises(InputError, match=r"pixel size of c: expected 0.25 um, as b has .* Set data.pixel_size_um"):
        check_pixel_sizes([unknown, fine, coarse])


def test_what_is_resampled_is_told_once(caplog):
    slides = [
        sized(MemorySlide({1: noise((1, 90, 90))}, name), s, s) for name, s in (("a", 0.25), ("b", 0.5), ("c", 1.0))
    ]
    with caplog.at_level(logging.WARNING):
        complete_slides(slides, (1,), pixel_size_um=0.5)
    assert caplog.messages == [
        "a and 1 more: read at 0.5 um per pixel, stored at 0.25 to 1 um",
        "c: enlarged, as its own pixels are larger than that",
    ]


def test_labels_are_matched_to_another_grid_of_the_same_area():
    labels = sized(MemorySlide({1: noise((1, 50, 60)) // 64}), 0.5, 0.5)
    matched = match_grid(labels, sized(MemorySlide({1: noise((1, 100, 119))}), 0.25, 0.25))
    assert matched.shape == (100, 119)
    np.testing.assert_array_equal(whole(matched)[0], np.kron(whole(labels)[0], np.ones((2, 2), int))[:, :119])
    for other in (MemorySlide({1: noise((1, 100, 120))}), sized(MemorySlide({1: noise((1, 90, 120))}), 0.25, 0.25)):
        assert match_grid(labels, other) is labels  # whose size is unknown, or which shows less


def test_annotations_keep_their_place(tmp_path):
    file = tmp_path / "memory.geojson"
    ring = "[[30,21],[90,21],[90,84],[30,84],[30,21]]"  # x, y in stored pixels
    file.write_text(f'{{"type":"Feature","geometry":{{"type":"Polygon","coordinates":[{ring}]}},"properties":{{}}}}')
    image = sized(MemorySlide({1: noise((1, 120, 100))}), 0.3, 0.25)
    drawn = open_annotations(file, image)
    resampled = complete_slide(image, (1, 2), pixel_size_um=0.5)
    labels = open_annotations(file, resampled, levels=(1, 2))
    assert labels.shape == (72, 50)
    np.testing.assert_array_equal(whole(labels)[0], whole(on_grid(drawn, resampled.pixel_scale))[0])
    rows, columns = np.nonzero(whole(labels)[0])
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (13, 50, 15, 45)


def test_a_size_that_is_stated_replaces_that_of_the_file(tmp_path):
    from PIL import Image

    Image.fromarray(noise((20, 30))).save(tmp_path / "a.png")
    assert open_slide(tmp_path / "a.png", pixel_size_um=0.5).pixel_size_um == (0.5, 0.5)
    with pytest.raises(InputError, match="pixel_size_um: expected one positive number, or 2, got -1"):
        open_slide(tmp_path / "a.png", pixel_size_um=-1)
