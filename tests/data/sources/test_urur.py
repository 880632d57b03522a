import numpy as np
import pytest
import tifffile
from PIL import Image

from muvit.data.slides.open import open_slide
from muvit.data.sources.label_map import LabelMap
from muvit.data.sources.prepare import prepare
from muvit.data.sources.source import check_source
from muvit.data.sources.urur import LAND, find_urur
from muvit.errors import InputError
from muvit.labels import IGNORED

COLORS = [color for colors in LAND.classes.values() for color in colors]


@pytest.fixture
def folder(tmp_path):
    """Labels in the true colours of all classes and of what is ignored, stored in some other order in a palette."""
    order = np.random.default_rng(0).permutation(len(COLORS))
    classes = np.tile(np.arange(len(COLORS), dtype=np.uint8), (9, 1))
    for split in ("train", "val", "test"):
        for kind in ("image", "label"):
            (tmp_path / split / kind).mkdir(parents=True)
        tifffile.imwrite(tmp_path / split / "image" / "00000.tif", np.zeros((9, 9, 3), np.uint8))
        palette = Image.fromarray(np.argsort(order)[classes].astype(np.uint8))
        palette.putpalette(np.array(COLORS, np.uint8)[order].tobytes())
        palette.save(tmp_path / split / "label" / "00000.png")
    Image.fromarray(np.array(COLORS, np.uint8)[classes]).save(tmp_path / "test" / "label" / "00000.png")
    return tmp_path


def test_colours_become_classes_whether_in_a_palette_or_not(folder, tmp_path_factory):
    source = find_urur(folder)
    output = prepare(source, tmp_path_factory.mktemp("out") / "urur")
    assert [(item.split, item.name) for item in source.items] == [
        ("train", "train_00000"),
        ("val", "val_00000"),
        ("test", "test_00000"),
    ]
    for item in source.items:
        labels = open_slide(output / item.split / "labels" / f"{item.name}.ome.zarr")
        np.testing.assert_array_equal(labels.read(1, (4, 0), (1, 9)), [[[0, 1, 2, 3, 4, 5, 6, 7, IGNORED]]])
        assert list(labels.label_names.values())[:3] == ["others", "building", "greenhouse"]
        assert not labels.has_background
    assert "train: 1 images instead of the published 2157" in source.warnings


def test_labels_stored_as_numbers_need_a_map(folder, tmp_path_factory):
    numbers = {name: (index,) for index, name in enumerate(LAND.names)}
    for split in ("train", "val", "test"):
        Image.fromarray(np.full((9, 9), 7, np.uint8)).save(folder / split / "label" / "00000.png")
    with pytest.raises(InputError, match=r"00000\.png: expected labels in colours .* got 1 channel.*--label_map"):
        prepare(find_urur(folder), tmp_path_factory.mktemp("out") / "urur")
    source = find_urur(folder, label_map=LabelMap(numbers))
    assert source.open_labels(source.items[0]).read(1, (0, 0), (1, 1)) == 7


def test_what_is_missing_is_listed_together(folder):
    (folder / "train" / "label" / "00000.png").unlink()
    (folder / "val" / "image" / "00000.tif").unlink()
    with pytest.raises(InputError, match="3 problems") as caught:
        check_source(find_urur(folder))
    for problem in ("00000.tif: no train/label/00000.png", "no images val/image", "00000.png: no val/image/00000.tif"):
        assert problem in str(caught.value)
