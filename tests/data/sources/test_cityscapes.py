import numpy as np
import pytest
from PIL import Image

from muvit.data.slides.open import open_slide
from muvit.data.sources.cityscapes import LABEL_IDS, find_cityscapes
from muvit.data.sources.prepare import prepare
from muvit.data.sources.source import check_source
from muvit.errors import InputError
from muvit.labels import IGNORED

CITIES = {"train": ["aachen", "zurich"], "val": ["frankfurt", "lindau"], "test": ["berlin"]}
IDS = np.arange(34, dtype=np.uint8)


def write(folder, suffix, values):
    for split, cities in CITIES.items():
        for city in cities:
            name = f"{city}_000000_000019"
            image = folder / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
            labels = folder / "gtFine" / split / city / f"{name}_gtFine_{suffix}.png"
            for file, pixels in (
                (image, np.zeros((4, len(values), 3), np.uint8)),
                (labels, np.tile(values, (4, 1))),
            ):
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
    return folder


def test_ids_become_the_19_scored_classes_and_validation_cities_the_test(tmp_path):
    source = find_cityscapes(write(tmp_path / "in", "labelIds", IDS))
    assert {item.name.split("_")[0]: (item.split, item.group) for item in source.items} == {
        "aachen": ("train", "aachen"),
        "zurich": ("train", "zurich"),
        "frankfurt": ("test", "frankfurt"),
        "lindau": ("val", "lindau"),
    }
    prepare(source, tmp_path / "out")
    labels = open_slide(tmp_path / "out" / "val" / "labels" / "lindau_000000_000019.ome.zarr")
    stored = labels.read(1, (0, 0), (1, 34))[0, 0]
    assert stored[[7, 8, 11, 26, 31, 33]].tolist() == [0, 1, 2, 13, 16, 18]
    assert sorted(set(stored.tolist())) == [*range(19), IGNORED]
    assert (stored == IGNORED).sum() == 34 - 19
    assert (labels.label_names[0], labels.label_names[18]) == ("road", "bicycle")
    assert not labels.has_background
    assert "train: 2 images instead of the published 2975" in source.warnings


def test_ids_for_training_give_the_same_classes(tmp_path):
    ids = find_cityscapes(write(tmp_path / "ids", "labelIds", IDS))
    train_ids = LABEL_IDS.decode(IDS[None, None], tmp_path)[0]
    source = find_cityscapes(write(tmp_path / "train_ids", "labelTrainIds", train_ids))
    stored = [each.open_labels(each.items[0]).read(1, (0, 0), (4, 34)) for each in (ids, source)]
    np.testing.assert_array_equal(*stored)


def test_the_published_validation_set_stays_whole_if_asked_for(tmp_path):
    source = find_cityscapes(write(tmp_path, "labelIds", IDS), test_cities=[])
    assert sorted(item.group for item in source.items if item.split == "val") == ["frankfurt", "lindau"]


def test_what_is_missing_is_listed_together(tmp_path):
    write(tmp_path, "labelIds", IDS)
    (tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(InputError, match="2 problems") as caught:
        check_source(find_cityscapes(tmp_path, test_cities=["munster"]))
    assert "no gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png" in str(caught.value)
    assert "no images leftImg8bit/val/munster" in str(caught.value)
    with pytest.raises(InputError, match="no images leftImg8bit/train"):
        check_source(find_cityscapes(tmp_path / "gtFine"))
