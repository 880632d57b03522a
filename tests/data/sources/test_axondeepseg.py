import json

import numpy as np
import pytest
from PIL import Image

from muvit.data.folders import open_labelled_folder
from muvit.data.sources.axondeepseg import GAP, find_axondeepseg
from muvit.data.sources.label_map import LabelMap
from muvit.data.sources.prepare import prepare
from muvit.data.sources.source import check_source
from muvit.errors import InputError

WIDTH = 40
GREYS = np.tile(np.repeat(np.uint8([0, 127, 255, 128]), WIDTH // 4), (6, 1))
CLASSES = np.repeat(np.uint8([0, 1, 2, 1]), WIDTH // 4)


def save(file, pixels):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def write_bids(folder, animal, sample, size):
    name = f"sub-{animal}_sample-{sample}_SEM"
    place = folder / f"sub-{animal}" / "micr"
    save(place / f"{name}.png", np.tile(np.arange(WIDTH, dtype=np.uint8), (6, 1)))
    (place / f"{name}.json").write_text(json.dumps(size))
    labels = folder / "derivatives" / "labels" / f"sub-{animal}" / "micr"
    save(labels / f"{name}_seg-axonmyelin-manual.png", GREYS)
    save(labels / f"{name}_seg-axon-manual.png", GREYS)


@pytest.fixture
def bids(tmp_path):
    write_bids(tmp_path, "rat1", "data1", {"PixelSize": 0.18})
    write_bids(tmp_path, "rat3", "data9", {"PixelSize": [0.1, 0.1], "PixelSizeUnits": "um"})
    write_bids(tmp_path, "rat3", "data10", {"PixelSize": [130, 130], "PixelSizeUnits": "nm"})
    return tmp_path


def test_animals_are_held_out_whole_and_pixel_sizes_are_those_of_each_image(bids, tmp_path_factory):
    source = find_axondeepseg(bids, test_subjects=["sub-rat3"])
    assert {item.name: (item.split, item.animal, item.group) for item in source.items} == {
        "sub-rat1_sample-data1_SEM": ("train", "sub-rat1", "SEM"),
        "sub-rat3_sample-data9_SEM": ("test", "sub-rat3", "SEM"),
        "sub-rat3_sample-data10_SEM": ("test", "sub-rat3", "SEM"),
    }
    output = prepare(source, tmp_path_factory.mktemp("out") / "axons")
    [(image, labels)] = open_labelled_folder(output / "train")
    assert image.pixel_size_um == labels.pixel_size_um == (0.18, 0.18)
    np.testing.assert_array_equal(labels.read(1, (0, 0), (1, WIDTH))[0, 0], CLASSES)
    assert labels.label_names == {0: "background", 1: "myelin", 2: "axon"}
    assert {slide.pixel_size_um for slide, _ in open_labelled_folder(output / "test")} == {(0.1, 0.1), (0.13, 0.13)}


def test_one_image_is_cut_in_two_parts_that_share_no_pixel(tmp_path, tmp_path_factory):
    save(tmp_path / "sem_1" / "image.png", np.tile(np.arange(WIDTH, dtype=np.uint8), (6, 1)))
    save(tmp_path / "sem_1" / "mask.png", np.stack([GREYS] * 3, -1))
    (tmp_path / "sem_1" / "pixel_size_in_micrometer.txt").write_text("0.07\n")
    save(tmp_path / "tem_2" / "image.png", GREYS)
    save(tmp_path / "tem_2" / "image_seg-axonmyelin.png", GREYS)
    source = find_axondeepseg(tmp_path, test_part=0.3)
    assert source.warnings == (f"{tmp_path / 'tem_2' / 'image.png'}: left out, no mask.png beside it",)
    output = prepare(source, tmp_path_factory.mktemp("out") / "axons")
    read = {}
    for split in ("train", "test"):
        [(image, labels)] = open_labelled_folder(output / split)
        columns = image.read(1, (0, 0), (1, image.shape[1]))[0, 0]  # the pixels of the image number its columns
        np.testing.assert_array_equal(labels.read(1, (0, 0), (1, len(columns)))[0, 0], CLASSES[columns])
        assert (image.name, image.pixel_size_um) == (
            f"sem_1_{'left' if split == 'train' else 'right'}",
            (0.07, 0.07),
        )
        read[split] = columns
    assert read["test"].tolist() == list(range(28, WIDTH))
    assert read["train"].tolist() == list(range(28 - round(GAP * WIDTH)))
    # another cut makes both parts again
    prepare(find_axondeepseg(tmp_path, test_part=0.5), output, overwrite=True)
    assert open_labelled_folder(output / "test")[0][0].shape == (6, 20)


def test_what_is_missing_or_contradictory_is_listed_together(bids):
    next(bids.rglob("sub-rat1_*_seg-axonmyelin-manual.png")).unlink()
    (bids / "sub-rat3" / "micr" / "sub-rat3_sample-data9_SEM.json").write_text('{"PixelSize": [1, 2]}')
    with pytest.raises(InputError, match="3 problems") as caught:
        check_source(find_axondeepseg(bids, test_subjects=["sub-rat8"]))
    for problem in ("sub-rat1_sample-data1_SEM.png: no masks", "data9_SEM.json: no pixel size", "no image of sub-rat8"):
        assert problem in str(caught.value)
    (bids / "empty").mkdir()
    with pytest.raises(InputError, match="no images sub-<animal>"):
        check_source(find_axondeepseg(bids / "empty"))


def test_grey_values_of_no_class_are_refused_unless_a_map_gives_them_one(bids, tmp_path_factory):
    for mask in bids.rglob("*_seg-axonmyelin-manual.png"):
        save(mask, np.full_like(GREYS, 1))
    with pytest.raises(InputError, match=r"expected labels of the classes .* got the value 1"):
        prepare(find_axondeepseg(bids), tmp_path_factory.mktemp("out") / "axons")
    source = find_axondeepseg(bids, label_map=LabelMap({"background": (0,), "axon": (1,)}))
    assert source.open_labels(source.items[0]).read(1, (0, 0), (1, 1)) == 1


def test_settings_that_contradict_each_other_are_refused(bids):
    with pytest.raises(InputError, match="val_subjects: expected none of the test subjects, got sub-rat1"):
        find_axondeepseg(bids, test_subjects=["sub-rat1"], val_subjects=["sub-rat1"])
    for part in (-0.1, 0.95):
        with pytest.raises(InputError, match=r"test_part: expected a share from 0 to below 0\.9"):
            find_axondeepseg(bids, test_part=part)
