import numpy as np
import pytest
from PIL import Image

from muvit.data.slides.open import open_slide
from muvit.data.sources.idrid import find_idrid
from muvit.data.sources.prepare import prepare
from muvit.data.sources.source import check_source
from muvit.errors import InputError

SHAPE = (32, 48)
FOLDERS = {
    "MA": "1. Microaneurysms",
    "HE": "2. Haemorrhages",
    "EX": "3. Hard Exudates",
    "SE": "4. Soft Exudates",
    "OD": "5. Optic Disc",
}


def write_photograph(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*SHAPE, 3), 90, np.uint8)).save(file)


def write_mask(file, columns, *, palette=True):
    """A mask that marks columns in red, in a palette or as blurred colours."""
    file.parent.mkdir(parents=True, exist_ok=True)
    marked = np.zeros(SHAPE, np.uint8)
    marked[:, columns] = 1
    if palette:
        image = Image.fromarray(marked)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.save(file)
    else:
        Image.fromarray(np.stack([marked * 255, marked * 0, marked * 0], -1)).save(file, quality=90, subsampling=0)


def published(folder, splits):
    """The layout of the download: numbers of the photographs, by split, each with columns of some masks."""
    root = folder / "A. Segmentation"
    for split, photographs in splits.items():
        for number, masks in photographs.items():
            write_photograph(root / "1. Original Images" / split / f"IDRiD_{number}.jpg")
            for code, columns in masks.items():
                place = root / "2. All Segmentation Groundtruths" / split / FOLDERS[code]
                write_mask(place / f"IDRiD_{number}_{code}.tif", columns)
    return folder


@pytest.fixture
def download(tmp_path):
    train = {
        "01": {"OD": slice(0, 16), "EX": slice(8, 24), "MA": slice(16, 32)},
        "02": {"OD": slice(0, 8), "MA": slice(40, 48)},
    }
    test = {"55": {"OD": slice(0, 8), "EX": slice(16, 24)}}
    return published(tmp_path, {"a. Training Set": train, "b. Testing Set": test})


def row(source, name):
    item = next(item for item in source.items if item.name == name)
    return source.open_labels(item).read(1, (0, 0), (1, SHAPE[1] // item.factor))[0, 0]


def test_the_published_split_tests_and_later_classes_cover_earlier_ones(download, tmp_path_factory):
    # the other tasks of the data set come with other photographs
    write_photograph(download / "B. Disease Grading" / "a. Training Set" / "IDRiD_001.jpg")
    source = find_idrid(download, lesions=["MA", "EX"], val_images=["IDRiD_02"], factor=2)
    splits = {item.name: item.split for item in source.items}
    assert splits == {"IDRiD_01": "train", "IDRiD_02": "val", "IDRiD_55": "test"}
    assert source.class_names == ("background", "optic disc", "microaneurysm", "hard exudate")
    np.testing.assert_array_equal(row(source, "IDRiD_01"), np.repeat([1, 3, 2, 0], [4, 8, 4, 8]))
    np.testing.assert_array_equal(row(source, "IDRiD_02"), np.repeat([1, 0, 2], [4, 16, 4]))  # without EX: none there
    assert source.warnings == tuple(
        f"{code}: {found} masks instead of the published 81" for code, found in {"OD": 3, "MA": 2, "EX": 2}.items()
    )
    output = prepare(source, tmp_path_factory.mktemp("out") / "idrid")
    labels = open_slide(output / "val" / "labels" / "IDRiD_02.ome.zarr")
    assert (labels.shape, labels.has_background) == ((16, 24), True)
    assert labels.label_names[3] == "hard exudate"


def test_photographs_in_one_folder_are_held_out_by_name_and_masks_may_be_jpeg(tmp_path):
    for number in ("01", "02"):
        write_photograph(tmp_path / f"IDRiD_{number}.jpg")
        write_mask(tmp_path / f"IDRiD_{number}_OD.tif", slice(0, 8))
        write_mask(tmp_path / f"IDRiD_{number}_EX.jpg", slice(32, 48), palette=False)
    source = find_idrid(tmp_path, test_images=["IDRiD_02"])
    assert [(item.name, item.split) for item in source.items] == [("IDRiD_01", "train"), ("IDRiD_02", "test")]
    np.testing.assert_array_equal(row(source, "IDRiD_02"), np.repeat([1, 0, 2], [8, 24, 16]))
    assert check_source(source)


def test_what_is_missing_is_listed_together(download):
    next(download.rglob("IDRiD_55_OD.tif")).unlink()
    write_photograph(download / "copy" / "IDRiD_01.jpg")
    with pytest.raises(InputError, match="4 problems") as caught:
        check_source(find_idrid(download, lesions=["EX", "SE"], test_images=["IDRiD_33"]))
    for problem in (
        "IDRiD_55.jpg: no mask IDRiD_55_OD.tif of its optic disc",
        "two files of one name: ",
        "no image IDRiD_33",
        "no masks IDRiD_<n>_SE.tif",
    ):
        assert problem in str(caught.value)
    (download / "empty").mkdir()
    with pytest.raises(InputError, match="no photographs"):
        check_source(find_idrid(download / "empty"))


def test_settings_that_do_not_fit_are_refused(download):
    for lesions in ([], ["EX", "EX"], ["OD"]):
        with pytest.raises(InputError, match="lesions: expected some of MA, HE, EX, SE, each once"):
            find_idrid(download, lesions=lesions)
    with pytest.raises(InputError, match="val_images: expected none of the test images, got IDRiD_01"):
        find_idrid(download, test_images=["IDRiD_01"], val_images=["IDRiD_01"])
    with pytest.raises(InputError, match="factor: expected a whole number from 1, got 0"):
        find_idrid(download, factor=0)
