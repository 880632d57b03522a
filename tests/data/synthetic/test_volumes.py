import json

import numpy as np
import pytest
import yaozarrs

from muvit.data.folders import class_legend, open_labelled_folder
from muvit.data.synthetic.volumes import STORE, VolumeConfig, generate_volume, write_volumes
from muvit.errors import ExistsError, InputError

SMALL = VolumeConfig(size_px=(16, 60, 84), territory_lattices_px=(32.0, 16.0))


@pytest.mark.parametrize("index", range(3))
def test_every_cell_has_the_class_of_the_territory_below_it(index):
    image, label = generate_volume(index, SMALL)
    assert image.shape == label.shape == SMALL.size_px
    assert (image.dtype, label.dtype) == (np.float32, np.uint8)
    is_bright = image[: SMALL.floor_px].mean(0) > (SMALL.bright + SMALL.dark) / 2
    assert 0.45 < is_bright.mean() < 0.55
    cells = label > 0
    agrees = label[cells] == 1 + np.broadcast_to(is_bright, label.shape)[cells]
    assert agrees.mean() > 0.85  # all but those that lie across a border
    assert {1, 2} <= set(np.unique(label))


def test_a_crop_of_the_hidden_height_never_holds_both_floor_and_cells():
    image, label = generate_volume(0, SMALL)
    height = SMALL.hidden_px
    assert height == 8
    for start in range(SMALL.size_px[0] - height + 1):
        sees_floor, sees_cells = start < SMALL.floor_px, (label[start : start + height] > 0).any()
        assert not (sees_floor and sees_cells)
    between = image[SMALL.floor_px : SMALL.floor_px + SMALL.empty_px]
    assert between.max() < 6 * SMALL.noise
    # one slice more would tell
    assert (label[: SMALL.floor_px + SMALL.empty_px + 1] > 0).any()


def test_both_classes_look_alike():
    pixels = {value: [] for value in (1, 2)}
    for index in range(6):
        image, label = generate_volume(index, SMALL)
        for value, seen in pixels.items():
            seen.append(image[label == value])
    one, two = (np.concatenate(seen) for seen in pixels.values())
    assert one.mean() == pytest.approx(two.mean(), rel=0.03)
    assert one.std() == pytest.approx(two.std(), rel=0.05)


def test_volumes_depend_on_seed_and_index_alone():
    for first, second in zip(generate_volume(5, SMALL), generate_volume(5, SMALL), strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(generate_volume(5, SMALL)[1], generate_volume(6, SMALL)[1])
    other = VolumeConfig(size_px=SMALL.size_px, territory_lattices_px=(32.0, 16.0), seed=1)
    assert not np.array_equal(generate_volume(5, SMALL)[1], generate_volume(5, other)[1])


def test_the_data_set_is_stored_with_levels_of_its_own_for_each_axis(tmp_path):
    calls = []
    folder = write_volumes(
        tmp_path / "data", num_train=2, num_val=1, num_test=1, config=SMALL, progress=lambda *done: calls.append(done)
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    (image, label), _ = open_labelled_folder(folder / "train")
    assert image.levels == label.levels == (1, (1, 2, 2), (2, 4, 4))
    assert image.pixel_size_um == (2.0, 0.5, 0.5)
    assert class_legend(label, 3)[0] == STORE.label_names
    np.testing.assert_array_equal(label.read(1, (0, 0, 0), label.shape)[0], generate_volume(0, SMALL)[1])
    yaozarrs.validate_zarr_store(image.path)
    record = json.loads((folder / "synthetic.json").read_text())
    assert record["kind"] == "volumes"
    assert record["indices"] == {"train": [0, 2], "val": [2, 3], "test": [3, 4]}
    assert tuple(record["config"]["size_px"]) == SMALL.size_px


def test_what_is_there_is_kept_unless_it_may_be_replaced(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("kept")
    counts = {"num_train": 1, "num_val": 0, "num_test": 0, "config": SMALL}
    with pytest.raises(ExistsError):
        write_volumes(tmp_path / "data", **counts)
    for _ in range(2):
        write_volumes(tmp_path / "data", overwrite=True, **counts)
    assert (tmp_path / "data" / "mine.txt").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize("counts", [(0, 0, 0), (-1, 1, 1)])
def test_wrong_counts_are_refused(counts, tmp_path):
    with pytest.raises(InputError, match="num_train"):
        write_volumes(tmp_path / "data", num_train=counts[0], num_val=counts[1], num_test=counts[2], config=SMALL)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size_px": (10, 60, 60)}, "config.size_px: expected slices for cells"),
        ({"noise": -1}, "config.noise"),
        ({"noise": float("nan")}, "config.noise"),
        ({"pitch_px": (0, 12, 12)}, "config.pitch_px: expected a value above 0"),
        ({"radius_px": (5, 3)}, "config.radius_px: expected 0 < lowest <= highest"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        VolumeConfig(**settings)
    with pytest.raises(InputError, match="index"):
        generate_volume(-1, SMALL)
