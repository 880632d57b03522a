from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from muvit.data.folders import class_legend, list_slides, open_folder, open_labelled_folder, open_pairs
from muvit.data.pyramids.reduction import majority
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.derived import with_levels
from muvit.data.slides.open import open_slide
from muvit.errors import InputError, ReadError
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import SegmenterConfig
from muvit.training.recipes import DataConfig, Recipe
from muvit.training.slides import complete


def paint(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for value, name in enumerate(("b", "a", "c")):
        paint(tmp_path / "images" / f"{name}.png", value)
        paint(tmp_path / "labels" / f"{name}.tif", 10 + value)
    return tmp_path


def value_of(slide):
    return int(slide.read(1, (0, 0), (1, 1))[0, 0, 0])


def test_slides_come_by_name_in_alphabetical_order(folder):
    (folder / "images" / ".hidden").touch()
    slides = open_folder(folder / "images")
    assert list(slides) == ["a", "b", "c"]
    assert [value_of(slide) for slide in slides.values()] == [1, 0, 2]


def test_slides_get_the_levels_that_they_lack_and_one_warning_says_so(folder, caplog):
    slides = open_folder(folder / "images", (1, 2))
    assert [slide.levels for slide in slides.values()] == [(1, 2)] * 3
    assert [slide.stored_levels for slide in slides.values()] == [(1,)] * 3
    (said,) = caplog.messages
    assert said.startswith(
        f"{folder}/images/a.png and 2 more: levels that are not stored are computed as they are read"
    )
    assert [image.levels for image, _ in open_labelled_folder(folder, (1, 4))] == [(1, 4)] * 3


def test_labels_get_levels_by_majority(folder):
    labels = np.random.default_rng(0).integers(0, 3, (8, 8)).astype(np.uint8)
    Image.fromarray(labels).save(folder / "labels" / "a.tif")
    label = open_labelled_folder(folder, (1, 4), (1, 4))[0][1]
    np.testing.assert_array_equal(label.read(4, (0, 0), (2, 2)), majority(labels[None], 4))


def test_images_are_paired_with_the_labels_of_their_name(folder):
    pairs = open_labelled_folder(folder)
    assert [(image.name, label.name) for image, label in pairs] == [(n, n) for n in "abc"]
    assert all(value_of(label) == 10 + value_of(image) for image, label in pairs)


@pytest.mark.parametrize("missing", ["labels", "images"])
def test_an_image_without_labels_and_labels_without_an_image_are_refused(folder, missing):
    next((folder / missing).glob("b.*")).unlink()
    kind = {"labels": "labels", "images": "image"}[missing]
    with pytest.raises(InputError, match=f"expected an image and labels of each name, got no {kind} for 'b'"):
        open_labelled_folder(folder)


def test_two_images_of_one_name_are_refused(folder):
    paint(folder / "images" / "a.jpg")
    with pytest.raises(InputError, match=r"a\.png: expected one image of each name, got also .*a\.jpg"):
        open_folder(folder / "images")


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_what_is_no_folder_of_images_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ReadError, match=f"{name}: expected a folder of images, got nothing there"):
        open_folder(tmp_path / name)


def test_a_file_that_is_no_image_is_named(folder):
    (folder / "images" / "notes.txt").write_text("hello")
    with pytest.raises(ReadError, match=r"notes\.txt"):
        open_folder(folder / "images")


def test_class_names_and_colours_are_those_stored_with_the_labels(folder, tmp_path):
    writer = PyramidWriter.create(
        tmp_path / "l.ome.zarr",
        shape=(8, 8),
        num_channels=1,
        dtype=np.uint8,
        kind="label",
        label_names={0: "background", 1: "vessel", 7: "void"},
        label_colors={1: (255, 0, 0, 255), 7: (1, 2, 3, 4)},
    )
    writer.write((0, 0), np.zeros((1, 8, 8), np.uint8))
    writer.finish()
    stored = open_slide(tmp_path / "l.ome.zarr")
    for label in (stored, with_levels(stored, (1, 2), "label")):
        names, colors = class_legend(label, 2)
        assert names == {0: "background", 1: "vessel"}
        assert colors == {1: (255, 0, 0)}
    assert class_legend(open_slide(folder / "labels" / "a.tif"), 2) == ({}, {})


def test_a_recipe_reads_the_plane_and_the_channels_that_it_names(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 4, 16, 16), np.uint8)
    for kind, stack in (("image", pixels), ("label", pixels[:1] // 100)):
        writer = PyramidWriter.create(
            tmp_path / f"{kind}s" / "a.ome.zarr",
            shape=(4, 16, 16),
            num_channels=len(stack),
            dtype=np.uint8,
            levels=(1,),
            kind=kind,
            **({"channel_names": ("x", "y", "z")} if kind == "image" else {}),
        )
        writer.write((0, 0, 0), stack)
        writer.finish()
    data = DataConfig(train=str(tmp_path), z=2, channels=("z", 0), crop_size=8)
    ((image, label),) = open_pairs(list_slides(tmp_path), pixels=data.pixels)
    assert (image.axes, image.channel_names) == ("yx", ("z", "x"))
    np.testing.assert_array_equal(image.read(1, (0, 0), (16, 16)), pixels[[2, 0], 2])
    np.testing.assert_array_equal(label.read(1, (0, 0), (16, 16)), pixels[:1, 2] // 100)
    encoder = EncoderConfig(levels=(1,), patch_size=4, dim=16, num_layers=1, heads=2)
    assert complete(Recipe(data=data, model=SegmenterConfig(encoder=encoder))).model.in_channels == 2
    with pytest.raises(InputError, match=r"z of .*a\.ome\.zarr: expected a number from 0 to 3, got 4"):
        open_pairs(list_slides(tmp_path), pixels=replace(data.pixels, z=4))
