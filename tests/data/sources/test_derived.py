import pickle

import numpy as np
import pytest
import tifffile
from PIL import Image

from muvit.data.pyramids.convert import convert_image
from muvit.data.pyramids.reduction import area_mean, majority
from muvit.data.slides.open import open_slide
from muvit.data.sources import derived
from muvit.data.sources.derived import classified, joined, reduced
from muvit.data.sources.label_map import LabelMap
from muvit.errors import InputError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (3, 301, 203), dtype=np.uint8)
LABELS = RNG.integers(0, 3, (1, 301, 203), dtype=np.uint8)


@pytest.fixture
def files(tmp_path):
    tifffile.imwrite(
        tmp_path / "rgb.tif", RGB.transpose(1, 2, 0), tile=(64, 64), resolution=(40000, 40000), resolutionunit=3
    )
    tifffile.imwrite(tmp_path / "labels.tif", LABELS[0])
    return tmp_path


def whole(slide):
    return slide.read(1, (0, 0), slide.shape)


@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_a_reduced_slide_is_the_reduced_image_at_a_pixel_size_that_fits(files, monkeypatch, factor, rows):
    monkeypatch.setattr(derived, "_ROWS", rows)
    image = reduced(open_slide(files / "rgb.tif"), factor, kind="image")
    labels = reduced(open_slide(files / "labels.tif"), factor, kind="label")
    np.testing.assert_array_equal(whole(image), area_mean(RGB, factor))
    np.testing.assert_array_equal(whole(labels), majority(LABELS, factor))
    assert image.pixel_size_um == pytest.approx((0.25 * factor,) * 2)
    assert labels.pixel_size_um is None
    np.testing.assert_array_equal(image.read(1, (31, 10), (20, 30)), area_mean(RGB, factor)[:, 31:51, 10:40])


def test_a_reduced_slide_converts_like_the_reduced_file(files):
    twice = convert_image(reduced(open_slide(files / "rgb.tif"), 2, kind="image"), files / "a.ome.zarr", levels=(1, 2))
    slide = open_slide(twice)
    np.testing.assert_array_equal(whole(slide), area_mean(RGB, 2))
    np.testing.assert_array_equal(slide.read(2, (0, 0), slide.level_shape(2)), area_mean(area_mean(RGB, 2), 2))
    assert slide.channel_names == ("red", "green", "blue")


def test_joined_slides_are_the_channels_of_one_in_a_dtype_that_holds_all(files):
    height = RNG.random((301, 203), dtype=np.float32)
    tifffile.imwrite(files / "height.tif", height)
    slide = joined([open_slide(files / "rgb.tif"), open_slide(files / "height.tif")], ("r", "g", "b", "h"))
    np.testing.assert_array_equal(whole(slide), np.concatenate([RGB.astype(np.float32), height[None]]))
    assert (slide.num_channels, slide.channel_names, slide.dtype) == (4, ("r", "g", "b", "h"), np.float32)


def test_several_annotators_are_put_to_the_vote(files):
    doubled = LabelMap({"none": (0,), "some": (1, 2)})
    for index, row in enumerate(([0, 1, 2], [0, 2, 0], [1, 0, 0])):
        Image.fromarray(np.array([row], np.uint8)).save(files / f"{index}.png")
    slides = [open_slide(files / f"{index}.png") for index in range(3)]
    np.testing.assert_array_equal(whole(classified(slides, doubled.decode, 2))[0], [[0, 1, 0]])


def test_slides_of_different_shapes_do_not_go_together(files):
    tifffile.imwrite(files / "small.tif", LABELS[0, 1:])
    with pytest.raises(InputError, match=r"small\.tif: expected shape \(301, 203\), as labels\.tif has"):
        joined([open_slide(files / "labels.tif"), open_slide(files / "small.tif")], ("a", "b"))


def test_derived_slides_are_picklable(files):
    decode = LabelMap({"a": (0,), "b": (1,), "c": (2,)}).decode
    slide = reduced(classified([open_slide(files / "labels.tif")], decode, 3), 2, kind="label")
    np.testing.assert_array_equal(whole(pickle.loads(pickle.dumps(slide))), majority(LABELS, 2))
