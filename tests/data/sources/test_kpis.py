from dataclasses import replace

import numpy as np
import pytest
import tifffile

from muvit.data.pyramids.reduction import area_mean, majority
from muvit.data.slides.open import open_slide
from muvit.data.sources.kpis import animal_of, find_kpis
from muvit.data.sources.prepare import prepare
from muvit.data.sources.source import check_source
from muvit.errors import InputError

TRAIN = {"56Nx": ["12_116", "12-117"], "DN": ["11-356"], "NEP25": ["08_368_01", "08_368_02"], "normal": ["normal_F1"]}
VAL = {"56NX": ["12-173"], "dn": ["11-359"], "NEP25": ["18-575"], "Normal": ["normal_M1"]}
TEST = {"56Nx": ["12-299"], "DN": ["11-362"], "NEP25": ["18-578"], "normal": ["normal_M1574"]}
DOWNLOADED = {"KPIs24 Training Data": TRAIN, "KPIs24_Validation_Data": VAL, "KPIs24 Testing Data": TEST}
CONTAINER = {"train": TRAIN, "validation": VAL, "test": TEST}


def write_pair(image, mask, case):
    rng = np.random.default_rng(sum(case.encode()))
    for file in (image, mask):
        file.parent.mkdir(parents=True, exist_ok=True)
    rgb, cells = rng.integers(0, 256, (61, 44, 3), dtype=np.uint8), rng.random((61, 44)) < 0.3
    tifffile.imwrite(image, rgb, tile=(16, 16), resolution=(40000, 40000), resolutionunit=3)
    tifffile.imwrite(mask, np.where(cells, 255 if case.startswith("12") else 1, 0).astype(np.uint8))


def write_downloaded(folder, roots=DOWNLOADED):
    for root, groups in roots.items():
        for group, cases in groups.items():
            for case in cases:
                place = folder / root / "Task2_WSI_level" / group
                write_pair(place / f"{case}_wsi.tiff", place / f"{case}_mask.tiff", case)
        (folder / root / "Task1_patch_level").mkdir()
    return folder


def write_container(folder):
    for root, groups in CONTAINER.items():
        for group, cases in groups.items():
            for case in cases:
                place = folder / root / group
                write_pair(place / "img" / f"{case}_wsi.tiff", place / "mask" / f"{case}_mask.tiff", case)
    return folder


def table(source):
    return {(item.name, item.split, item.group, item.animal, item.factor) for item in source.items}


def test_both_layouts_hold_the_same_slides(tmp_path):
    one, two = find_kpis(write_downloaded(tmp_path / "one")), find_kpis(write_container(tmp_path / "two"))
    assert table(one) == table(two)
    assert {("56Nx_12-116", "train", "56Nx", "12-116", 2), ("NEP25_08-368-02", "train", "NEP25", "08-368", 1)} <= table(
        one
    )
    assert {("normal_M1", "val", "normal", "M1", 2), ("56Nx_12-299", "test", "56Nx", "12-299", 2)} <= table(one)
    assert len(table(one)) == 6 + 4 + 4
    assert check_source(one).keys() == set(one.items)


def test_all_but_nep25_are_halved_and_masks_count_above_0(tmp_path):
    source = find_kpis(write_downloaded(tmp_path / "in"))
    source = replace(source, items=tuple(i for i in source.items if i.split == "test" or i.name == "NEP25_08-368-01"))
    prepare(source, tmp_path / "out")
    for item in source.items:
        rgb, mask = tifffile.imread(item.images[0]), tifffile.imread(item.labels[0])
        image, labels = (
            open_slide(tmp_path / "out" / item.split / kind / f"{item.name}.ome.zarr") for kind in ("images", "labels")
        )
        factor = 1 if item.group == "NEP25" else 2
        expected = majority((mask > 0).astype(np.uint8)[None], factor)
        np.testing.assert_array_equal(image.read(1, (0, 0), image.shape), area_mean(rgb.transpose(2, 0, 1), factor))
        np.testing.assert_array_equal(labels.read(1, (0, 0), labels.shape), expected)
        assert labels.label_names == {0: "background", 1: "glomerulus"}
        assert image.levels == labels.levels == (1, 2, 4, 8, 16, 32, 64)
        assert image.pixel_size_um == labels.pixel_size_um == pytest.approx((0.25 * factor,) * 2)


def test_missing_partners_are_listed_together_and_numbers_only_remarked_upon(tmp_path):
    write_downloaded(tmp_path)
    (tmp_path / "KPIs24 Training Data/Task2_WSI_level/DN/11-356_mask.tiff").unlink()
    (tmp_path / "KPIs24_Validation_Data/Task2_WSI_level/dn/11-359_wsi.tiff").unlink()
    source = find_kpis(tmp_path)
    with pytest.raises(InputError, match="2 problems") as caught:
        check_source(source)
    assert "11-356_wsi.tiff: no 11-356_mask.tiff" in str(caught.value)
    assert "11-359_mask.tiff: no 11-359_wsi.tiff" in str(caught.value)
    assert "train NEP25: 2 slides instead of the published 15" in source.warnings


def test_the_published_numbers_raise_no_remark(tmp_path):
    counts = {"train": (5, 5, 15, 5), "validation": (2,) * 4, "test": (3,) * 4}
    for root, numbers in counts.items():
        for group, count in zip(TRAIN, numbers, strict=True):
            for index in range(count):
                for kind in ("wsi", "mask"):
                    file = tmp_path / root / "Task2_WSI_level" / group / f"{root}{index}_{kind}.tiff"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.touch()
    source = find_kpis(tmp_path)
    assert (source.warnings, source.problems, len(source.items)) == ((), (), 50)


def test_an_animal_in_two_splits_is_refused(tmp_path):
    write_downloaded(tmp_path, DOWNLOADED | {"KPIs24 Testing Data": {"NEP25": ["08-368-03"]}})
    with pytest.raises(InputError, match="slides of one animal, 08-368, are in train and test"):
        check_source(find_kpis(tmp_path))


def test_a_split_that_is_there_twice_and_a_case_spelt_twice_are_refused(tmp_path):
    write_downloaded(tmp_path, DOWNLOADED | {"train": {"DN": ["11-370"]}})
    place = tmp_path / "KPIs24 Testing Data/Task2_WSI_level/DN"
    write_pair(place / "11_362_wsi.tiff", place / "11_362_mask.tiff", "11")
    with pytest.raises(InputError, match="several folders for train: KPIs24 Training Data, train") as caught:
        check_source(find_kpis(tmp_path))
    assert "two files of one case" in str(caught.value)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    source = find_kpis(tmp_path)
    assert source.warnings == ()
    with pytest.raises(InputError, match="Task2_WSI_level"):
        check_source(source)


def test_a_mask_of_another_size_is_refused(tmp_path):
    write_downloaded(tmp_path)
    file = tmp_path / "KPIs24 Training Data/Task2_WSI_level/DN/11-356_mask.tiff"
    tifffile.imwrite(file, np.zeros((30, 44), np.uint8))
    with pytest.raises(InputError, match=r"11-356_wsi\.tiff has shape \(31, 22\), 11-356_mask\.tiff \(15, 22\)"):
        check_source(find_kpis(tmp_path))


@pytest.mark.parametrize(
    ("case", "animal"), [("08-368-02", "08-368"), ("12-116", "12-116"), ("M1574", "M1574"), ("F1", "F1")]
)
def test_animals_are_named_without_the_section(case, animal):
    assert animal_of(case) == animal
