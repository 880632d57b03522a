import csv

import numpy as np
import pytest
from array_slide import ArraySlide
from PIL import Image

from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.errors import ExistsError, InputError
from muvit.inference.export import summaries
from muvit.inference.export.labelled import LabelledImage
from muvit.inference.export.summaries import (
    AREA_COLUMNS,
    area_rows,
    count_pixels,
    draw_overview,
    write_areas,
    write_overview,
)
from muvit.pictures import class_colors, to_rgb

LABELS = np.zeros((30, 50), np.uint8)
LABELS[5:15, 10:30] = 1
LABELS[20:25, 40:50] = 3


def source(labels=LABELS, image=None, **changes):
    return LabelledImage(labels=ArraySlide(labels, **changes), image=image)


def test_pixels_are_counted_block_by_block(monkeypatch):
    monkeypatch.setattr(summaries, "BLOCK_PX", 16)
    values = np.random.default_rng(0).choice([0, 1, 7, 2**31], (40, 33)).astype(np.uint32)
    slide, steps = ArraySlide(values), []
    counts = count_pixels(slide, lambda done, total: steps.append((done, total)))
    expected = dict(zip(*(found.tolist() for found in np.unique(values, return_counts=True)), strict=True))
    assert counts == expected and list(counts) == sorted(counts)
    assert max(max(size) for _, size in slide.windows) == 16
    assert steps[-1] == (9, 9)


def test_a_line_tells_the_area_of_a_class():
    labelled = source(pixel_size_um=(0.5, 2.0))
    background, one, three = area_rows(labelled, count_pixels(labelled.labels))
    assert set(background) == set(AREA_COLUMNS)
    assert one == {
        "slide": "labels",
        "value": 1,
        "class": "class 1",
        "pixels": 200,
        "fraction": 200 / 1500,
        "area_um2": 200.0,
    }
    assert (background["class"], three["pixels"]) == ("background", 50)
    assert sum(row["fraction"] for row in (background, one, three)) == 1
    assert [row["area_um2"] for row in area_rows(source(), {1: 3})] == [None]


def test_named_classes_have_a_line_even_if_there_is_none_of_them(tmp_path):
    writer = PyramidWriter.create(
        tmp_path / "a.ome.zarr",
        shape=LABELS.shape,
        num_channels=1,
        dtype=np.uint8,
        kind="label",
        pixel_size_um=0.5,
        label_names={0: "glass", 1: "tumour", 2: "vessel", 3: "duct"},
        label_colors={1: (200, 0, 0), 2: (0, 200, 0)},
    )
    writer.write((0, 0), LABELS[None])
    writer.finish()
    labelled = LabelledImage(labels=OmeZarrSlide(tmp_path / "a.ome.zarr"))
    rows = area_rows(labelled, count_pixels(labelled.labels))
    assert [(row["class"], row["pixels"], row["area_um2"]) for row in rows] == [
        ("glass", 1250, 312.5),
        ("tumour", 200, 50.0),
        ("vessel", 0, 0.0),
        ("duct", 50, 12.5),
    ]
    assert (labelled.class_color(1), labelled.class_color(3)) == ((200, 0, 0), class_colors(4)[3])


def test_a_table_holds_the_lines_of_all_slides(tmp_path):
    rows = area_rows(source(name="a"), {0: 3, 1: 1}) + area_rows(source(name="b", pixel_size_um=(2.0, 2.0)), {1: 5})
    write_areas(rows, tmp_path / "new" / "areas.csv")
    with (tmp_path / "new" / "areas.csv").open(newline="") as lines:
        table = list(csv.DictReader(lines))
    assert tuple(table[0]) == AREA_COLUMNS
    assert [(row["slide"], row["value"], row["pixels"], row["area_um2"]) for row in table] == [
        ("a", "0", "3", ""),
        ("a", "1", "1", ""),
        ("b", "1", "5", "20.0"),
    ]
    with pytest.raises(ExistsError):
        write_areas(rows, tmp_path / "new" / "areas.csv")


def test_labels_are_painted_over_their_image():
    photo = ArraySlide(np.random.default_rng(0).integers(0, 256, (3, 60, 100)).astype(np.uint8))
    picture = np.asarray(draw_overview(source(image=photo), size=100, alpha=1.0))
    colors, plain = class_colors(8), to_rgb(photo.pyramid[1])
    shown = np.kron(LABELS, np.ones((2, 2), np.uint8))
    for value in (1, 3):
        assert (picture[:60][shown == value] == colors[value]).all()
    assert (picture[:60][shown == 0] == plain[shown == 0]).all()
    assert picture.shape[1] == 100 and len(picture) > 60  # the legend
    assert (picture[60:] == colors[3]).all(-1).any() and not (picture[60:] == colors[2]).all(-1).any()


def test_class_0_is_painted_where_nothing_is_background():
    photo = ArraySlide(np.random.default_rng(0).integers(0, 256, (3, *LABELS.shape)).astype(np.uint8))
    labelled = source(image=photo)
    labelled.labels.has_background = False
    picture = np.asarray(draw_overview(labelled, alpha=1.0))
    assert (picture[:30][LABELS == 0] == class_colors(8)[0]).all()
    assert len(picture) > len(np.asarray(draw_overview(source(image=photo), alpha=1.0)))  # a longer legend
    assert [row["class"] for row in area_rows(labelled, {0: 1, 1: 1})] == ["class 0", "class 1"]


def test_labels_alone_are_shown_without_an_image():
    picture = np.asarray(draw_overview(source(np.zeros((4, 6), np.uint8))))
    assert picture.shape == (4, 6, 3) and (picture == 0).all()
    assert np.asarray(draw_overview(source(LABELS)))[10, 20].tolist() == list(class_colors(8)[1])


def test_an_overview_reads_the_coarsest_level_that_will_do():
    slide = ArraySlide(np.ones((256, 512), np.uint8), levels=(1, 4, 16))
    assert draw_overview(LabelledImage(labels=slide), size=100).width == 64  # every second of 128 pixels
    assert slide.windows == [(4, (64, 128))]


def test_an_image_without_a_pyramid_is_shrunk_block_by_block(monkeypatch):
    monkeypatch.setattr(summaries, "BLOCK_PX", 20)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 70, 101)).astype(np.uint16)
    photo = ArraySlide(pixels)
    small = summaries._shrink(photo, 15, "image")
    assert small.shape == (1, 10, 15)
    assert small[0, 3, 4] == np.floor(pixels[0, 21:28, 28:35].mean() + 0.5)
    assert small[0, 9, 14] == np.floor(pixels[0, 63:70, 98:101].mean() + 0.5)
    assert max(max(size) for _, size in photo.windows) <= 20


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    write_overview(source(), tmp_path / "new" / "a.png", size=25)
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.width == 25
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.png"]
    with pytest.raises(ExistsError):
        write_overview(source(), tmp_path / "new" / "a.png")
    with pytest.raises(InputError, match="size: expected a positive number"):
        draw_overview(source(), size=0)


def test_colours_come_again_when_there_are_too_many_values():
    labelled = source()
    assert labelled.class_color(256) == labelled.class_color(1) != labelled.class_color(0)
    assert labelled.class_color(255) == class_colors(256)[255]
    assert labelled.class_name(2**40) == f"class {2**40}"
