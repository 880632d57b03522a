import json
import math
import shutil

import numpy as np
import pytest
from memory_slide import MemorySlide, label_slide

from muvit.data.annotations.objects import AnnotationConfig
from muvit.data.annotations.open import open_annotations
from muvit.data.crops import balance
from muvit.data.crops.balance import ForegroundIndex, locate_classes
from muvit.data.pyramids.reduction import majority
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.derived import with_levels
from muvit.data.slides.open import open_slide
from muvit.errors import InputError


def disks(seed, shape=(300, 400), num_classes=4, radius=12):
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, dtype=np.uint8)
    for value in range(1, num_classes):
        for _ in range(value):
            cy, cx = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
            labels[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = value
    return labels


def test_every_class_is_located_with_its_area_and_true_pixels():
    labels = disks(0)
    found = locate_classes(7, label_slide(labels), 1)
    assert [entry.value for entry in found] == np.unique(labels).tolist()
    for entry in found:
        assert entry.slide == 7
        assert entry.area == (labels == entry.value).sum()
        assert (labels[tuple(entry.points.T)] == entry.value).all()
        assert len(np.unique(entry.points, axis=0)) == len(entry.points) <= 1024


@pytest.mark.parametrize("levels", [(1,), (1, 4), (1, 4, 16)])
def test_large_labels_are_looked_at_coarsely(levels, monkeypatch):
    for limit in ("_MAX_READ_PX", "_MAX_SCANNED_PX"):
        monkeypatch.setattr(balance, limit, 2000)
    monkeypatch.setattr(balance, "_MAX_BLOCK_PX", 1500)
    labels = disks(1)
    slide = label_slide(labels, levels)
    found = locate_classes(0, slide, 1)
    assert max(math.prod(size) for _, size in slide.windows) <= 2000
    assert {level for level, _ in slide.windows} == {levels[-1]}
    seen = sum(round(entry.area / math.prod(entry.spacing)) for entry in found)
    assert seen <= 2200
    assert [entry.value for entry in found] == [0, 1, 2, 3]
    for entry in found:
        corners = (entry.points * entry.spacing).astype(int)
        assert (labels[tuple(corners.T)] == entry.value).all()
        assert entry.area == pytest.approx((labels == entry.value).sum(), rel=0.5)


def test_levels_that_are_not_stored_are_not_computed_to_find_classes():
    slide = label_slide(disks(0), (1, 4))
    locate_classes(0, with_levels(slide, (1, 4, 16), "label"), 1)
    assert {level for level, _ in slide.windows} == {1}
    found = locate_classes(0, with_levels(label_slide(disks(0)), (16,), "label"), 16)  # unless crops need nothing finer
    assert {entry.spacing for entry in found} == {(16.0, 16.0)}


def test_small_things_that_a_coarse_level_has_lost_are_still_located(monkeypatch):
    labels = np.zeros((256, 256), np.uint8)
    labels[::8, ::8], labels[1::8, ::8] = 1, 1  # 1/32 of the pixels, and of none of the blocks of level 8 the most
    slide = MemorySlide({1: labels[None], 8: majority(labels[None], 8)})
    monkeypatch.setattr(balance, "_MAX_SCANNED_PX", 1 << 14)
    found = {entry.value: entry.area for entry in locate_classes(0, slide, 1)}
    assert {level for level, _ in slide.windows} == {1}
    assert sum(found.values()) == labels.size
    assert found[1] == pytest.approx((labels == 1).sum(), rel=1)
    monkeypatch.setattr(balance, "_MAX_READ_PX", 1 << 14)
    assert [entry.value for entry in locate_classes(0, slide, 1)] == [0]


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("scanned", [10**6, 500])
def test_drawn_pixels_are_foreground_at_the_wanted_level(level, scanned, monkeypatch):
    for limit in ("_MAX_READ_PX", "_MAX_SCANNED_PX"):
        monkeypatch.setattr(balance, limit, scanned)
    slides = [label_slide(disks(seed), (1, 2, 16)) for seed in (1, 2)]
    found = [entry for i, slide in enumerate(slides) for entry in locate_classes(i, slide, level)]
    index = ForegroundIndex(slides, found, level=level, balance="foreground")
    rng = np.random.default_rng(0)
    drawn = [index.draw(rng) for _ in range(300)]
    assert all(slides[i].pyramid[level][0][pixel] > 0 for i, pixel in drawn)
    assert {i for i, _ in drawn} == {0, 1}


def test_foreground_is_drawn_by_area_and_classes_alike():
    labels = np.zeros((100, 100), dtype=np.uint8)
    labels[:30], labels[90:, :10], labels[50] = 1, 2, 9
    slides = [label_slide(labels)]
    found = locate_classes(0, slides[0], 1)

    def share_of_class_1(mode):
        index = ForegroundIndex(slides, found, level=1, balance=mode, not_foreground=(0, 9))
        rng = np.random.default_rng(0)
        values = [labels[index.draw(rng)[1]] for _ in range(2000)]
        assert set(values) == {1, 2}
        return values.count(1) / 2000

    assert share_of_class_1("foreground") == pytest.approx(3000 / 3100, abs=0.02)
    assert share_of_class_1("classes") == pytest.approx(0.5, abs=0.04)


def test_pyramid_that_disagrees_with_its_finest_level_gives_the_middle(monkeypatch):
    monkeypatch.setattr(balance, "_MAX_READ_PX", 10**6)
    coarse = np.ones((1, 4, 4), dtype=np.uint8)
    slide = MemorySlide({1: np.zeros((1, 2000, 2000), dtype=np.uint8), 500: coarse})
    index = ForegroundIndex([slide], locate_classes(0, slide, 1), level=1, balance="foreground")
    _, pixel = index.draw(np.random.default_rng(0))
    assert [p % 500 for p in pixel] == [250, 250]


def test_background_only_is_refused():
    slide = label_slide(np.full((8, 8), 3, dtype=np.uint8))
    with pytest.raises(InputError, match="balance 'classes': expected labels with some foreground"):
        ForegroundIndex([slide], locate_classes(0, slide, 1), level=1, balance="classes", not_foreground=(0, 3))


def write_labels(path, labels, levels=(1, 4)):
    writer = PyramidWriter.create(
        path, shape=labels.shape, num_channels=1, dtype=labels.dtype, kind="label", levels=levels
    )
    writer.write((0, 0), labels[None])
    writer.finish()
    return path


def assert_same_classes(found, expected):
    for entry, other in zip(found, expected, strict=True):
        assert (entry.slide, entry.value, entry.area, entry.spacing) == (other.slide, *other[1:3], other.spacing)
        assert entry.points.dtype == other.points.dtype
        np.testing.assert_array_equal(entry.points, other.points)


def test_classes_are_looked_for_once_until_the_labels_are_written_again(tmp_path, monkeypatch):
    path, first, second = tmp_path / "a.ome.zarr", disks(0), disks(3)
    expected = locate_classes(2, label_slide(first, (1, 4)), 1)
    scans = []
    scan = balance._scan
    monkeypatch.setattr(balance, "_scan", lambda *args: scans.append(args) or scan(*args))
    write_labels(path, first)
    for _ in range(2):
        assert_same_classes(locate_classes(2, open_slide(path), 1), expected)
    assert len(scans) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.ome.zarr"]
    assert (path / ".classes.json").is_file()
    locate_classes(0, open_slide(path), 4)  # another level is another question
    assert len(scans) == 2
    for shard in path.glob("0/c/*/*"):  # one label is changed in place; sizes and names stay
        content = shard.read_bytes()
        shard.write_bytes(content)
    locate_classes(2, open_slide(path), 1)
    assert len(scans) == 3
    shutil.rmtree(path)
    write_labels(path, second)
    assert_same_classes(locate_classes(2, open_slide(path), 1), locate_classes(2, label_slide(second, (1, 4)), 1))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"key": 1, "classes": [[1]]}', b"\xff\xfe"])
def test_a_damaged_index_of_classes_is_made_again(tmp_path, content):
    slide = open_slide(write_labels(tmp_path / "a.ome.zarr", disks(0)))
    expected = locate_classes(0, slide, 1)
    (slide.path / ".classes.json").write_bytes(content)
    assert_same_classes(locate_classes(0, slide, 1), expected)


def test_classes_are_located_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(file, content):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(balance, "write_whole", refuse)
    slide = open_slide(write_labels(tmp_path / "a.ome.zarr", disks(0)))
    assert_same_classes(locate_classes(0, slide, 1), locate_classes(0, label_slide(disks(0), (1, 4)), 1))
    assert not (slide.path / ".classes.json").exists()


def test_annotations_that_change_their_meaning_are_searched_again(tmp_path):
    file = tmp_path / "a.geojson"
    square = {"type": "Polygon", "coordinates": [[[8, 8], [40, 8], [40, 40], [8, 40], [8, 8]]]}
    named = {"classification": {"name": "Tumour"}}
    feature = {"type": "Feature", "geometry": square, "properties": named}
    file.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    image = label_slide(np.zeros((64, 64), np.uint8), name="a")
    for value in (1, 3, 1):
        labels = open_annotations(file, image, AnnotationConfig(classes={"Tumour": value}))
        assert [entry.value for entry in locate_classes(0, labels, 1)] == [0, value]
        assert (tmp_path / ".a.classes.json").is_file()
