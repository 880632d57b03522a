from dataclasses import replace

import numpy as np
import pytest
import torch
from memory_slide import world_slide

from muvit.data.crops.augment import Augmentation
from muvit.data.crops.classified import ClassifiedCrops, ClassifiedTiles
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import CropConfig
from muvit.errors import InputError

CONFIG = CropConfig(levels=(1, 4), size=(8, 8), normalization=Range(high=1))


@pytest.fixture
def slides():
    return [world_slide((32 * (i + 1), 40), (1, 4), f"slide{i}") for i in range(3)]


def test_samples_show_the_pixels_of_their_box_on_their_slide(slides):
    crops = ClassifiedCrops(slides, [2, 0, 1], CONFIG, num_samples=12)
    for i, sample in enumerate(crops[i] for i in range(12)):
        assert int(sample["slide"]) == i % 3
        assert int(sample["class"]) == (2, 0, 1)[i % 3]
        lower, upper = sample["bbox"][0]
        assert upper.tolist() == (lower + 8).tolist()
        assert torch.equal(sample["img"][0, :, 0, 0], lower + 0.5)  # channels hold the coordinates
        assert (sample["bbox"][1, 0] <= lower).all() and (sample["bbox"][1, 1] >= upper).all()
        assert upper[0] <= 32 * (i % 3 + 1)


def test_samples_follow_from_seed_and_number(slides):
    one, same, other = (ClassifiedCrops(slides, None, CONFIG, num_samples=9, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[i]["img"], same[i]["img"]) for i in (0, 5, 100))
    assert any(not torch.equal(one[i]["bbox"], other[i]["bbox"]) for i in range(9))
    assert "class" not in one[0]
    with pytest.raises(IndexError):
        one[-1]


def test_classes_come_equally_often_if_asked(slides):
    many = [*slides, *(world_slide((32, 40), (1, 4), f"more{i}") for i in range(5))]
    classes = [0, 1, 1, 1, 1, 1, 1, 1]
    crops = ClassifiedCrops(many, classes, CONFIG, num_samples=200, choice="classes")
    drawn = np.array([(int(s["class"]), int(s["slide"])) for s in (crops[i] for i in range(200))])
    assert abs((drawn[:, 0] == 0).mean() - 0.5) < 0.1
    assert set(drawn[:, 1]) == set(range(8))
    assert all(classes[slide] == label for label, slide in drawn)


def test_augmentation_keeps_class_and_slide(slides):
    augmented = ClassifiedCrops(slides, [2, 0, 1], CONFIG, num_samples=3, augmentation=Augmentation())
    plain = ClassifiedCrops(slides, [2, 0, 1], CONFIG, num_samples=3)
    assert not torch.equal(augmented[1]["img"], plain[1]["img"])
    assert int(augmented[1]["class"]) == 0 and int(augmented[1]["slide"]) == 1


def test_views_of_one_centre_are_scaled_and_keep_class_and_slide(slides):
    config, augmentation = replace(CONFIG, placement="concentric"), Augmentation(scale=(2, 2), scale_probability=1)
    crops = ClassifiedCrops(slides, [2, 0, 1], config, num_samples=3, augmentation=augmentation)
    for i, sample in enumerate(crops[i] for i in range(3)):
        assert int(sample["class"]) == (2, 0, 1)[i] and int(sample["slide"]) == i
    with pytest.raises(InputError, match="expected views with one centre"):
        ClassifiedCrops(slides, [2, 0, 1], CONFIG, num_samples=3, augmentation=augmentation)


def test_tiles_cover_every_slide_once(slides):
    tiles = ClassifiedTiles(slides, [2, 0, 1], CONFIG)
    assert [int(tiles[i]["slide"]) for i in range(len(tiles))] == [0] * 20 + [1] * 40 + [2] * 60
    assert int(tiles[25]["class"]) == 0
    assert len({tuple(tiles[i]["bbox"][0, 0].tolist()) for i in range(20)}) == 20


def test_what_does_not_fit_is_refused(slides):
    with pytest.raises(InputError, match="classes: expected 3, one for each slide, got 2"):
        ClassifiedTiles(slides, [0, 1], CONFIG)
    with pytest.raises(InputError, match="choice: expected slides or classes"):
        ClassifiedCrops(slides, [0, 1, 1], CONFIG, num_samples=1, choice="any")
    with pytest.raises(InputError, match="choice 'classes': expected slides with classes"):
        ClassifiedCrops(slides, None, CONFIG, num_samples=1, choice="classes")
    with pytest.raises(InputError, match="num_samples and seed"):
        ClassifiedCrops(slides, None, CONFIG, num_samples=0)
