import json

import numpy as np
import pytest

from muvit.data.folders import open_labelled_folder
from muvit.data.synthetic.free import LegendConfig, generate_legend, write_legend
from muvit.errors import InputError

CONFIG = LegendConfig()


@pytest.mark.parametrize("index", range(3))
def test_every_cell_has_the_class_of_the_stripe_above_it(index):
    image, label = generate_legend(index, CONFIG)
    assert image.shape == label.shape == CONFIG.size_px
    assert (image.dtype, label.dtype) == (np.float32, np.uint8)
    is_bright = image[: CONFIG.legend_px - 2].mean(0) > (CONFIG.bright + CONFIG.dark) / 2
    widths = np.diff(np.flatnonzero(np.diff(is_bright.astype(int))))
    assert widths.min() >= CONFIG.stripe_px[0] - 1
    assert widths.max() <= CONFIG.stripe_px[1] + 1
    cells = label > 0
    agrees = label[cells] == 1 + np.broadcast_to(is_bright, label.shape)[cells]
    assert agrees.mean() > 0.85  # all but those that lie across a border
    assert 0.35 < (label[cells] == 2).mean() < 0.65


def test_no_nested_view_around_a_cell_shows_the_legend():
    image, label = generate_legend(0, CONFIG)
    first = np.flatnonzero((label > 0).any(1))[0]
    # of 32 px at level 4: a view that holds a crop around a cell ends above it, at the latest, by its own height
    assert first - (4 * 32 - 32) - 32 >= CONFIG.legend_px
    columns = np.flatnonzero((label > 0).any(0))
    assert columns[0] >= CONFIG.margin_px
    assert columns[-1] < CONFIG.size_px[1] - CONFIG.margin_px
    assert image[CONFIG.legend_px + 4 : first - 4].max() < 6 * CONFIG.noise


def test_a_view_of_the_legend_without_its_place_says_little():
    """The class at the middle of a view that may be moved by 48 px either way: what most of it says is often wrong."""
    guesses, config = [], LegendConfig(size_px=(210, 300), margin_px=80)
    for index in range(60):
        is_bright = generate_legend(index, config)[0][: config.legend_px - 2].mean(0) > 0.6
        middle = config.size_px[1] // 2
        guesses.append(is_bright[middle] == (is_bright[middle - 48 : middle + 48].mean() > 0.5))
    assert 0.3 < np.mean(guesses) < 0.7


def test_images_depend_on_seed_and_index_alone():
    for first, second in zip(generate_legend(5, CONFIG), generate_legend(5, CONFIG), strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(generate_legend(5, CONFIG)[1], generate_legend(6, CONFIG)[1])
    assert not np.array_equal(generate_legend(5, CONFIG)[1], generate_legend(5, LegendConfig(seed=1))[1])


def test_the_data_set_is_stored(tmp_path):
    config = LegendConfig(size_px=(240, 300))
    folder = write_legend(tmp_path / "data", num_train=1, num_val=0, num_test=1, config=config)
    ((image, label),) = open_labelled_folder(folder / "test")
    assert image.name == "00001"
    assert image.levels == (1, 4)
    np.testing.assert_array_equal(label.read(1, (0, 0), label.shape)[0], generate_legend(1, config)[1])
    assert json.loads((folder / "synthetic.json").read_text())["kind"] == "free"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size_px": (200, 640)}, "config.size_px: expected more than"),
        ({"size_px": (384, 230)}, "config.size_px: expected more than"),
        ({"stripe_px": (0, 5)}, "config.stripe_px"),
        ({"pitch_px": 0}, "config"),
        ({"noise": -1}, "config.noise"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        LegendConfig(**settings)
    with pytest.raises(InputError, match="index"):
        generate_legend(-1, CONFIG)
