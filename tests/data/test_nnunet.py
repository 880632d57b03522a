import json

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage import io

from muvit import open_slide
from muvit.cli import main
from muvit.data.nnunet import NnunetConfig, divide, open_predictions, write_nnunet
from muvit.data.pyramids.writer import PyramidWriter
from muvit.errors import ExistsError, InputError, ReadError

SIZE_UM = 0.5
NAMES = {0: "background", 3: "tumour", 7: "stroma"}


def store(path, pixels, **facts):
    writer = PyramidWriter.create(
        path, shape=pixels.shape[1:], num_channels=len(pixels), dtype=pixels.dtype, pixel_size_um=SIZE_UM, **facts
    )
    writer.write((0,) * (pixels.ndim - 1), pixels)
    writer.finish()
    return open_slide(path)


def slides(folder, names, shape=(50, 70), channels=3, dtype=np.uint8, labels=NAMES, seed=0):
    """Images of noise in ``folder/images``, and labels of random values of the classes in ``folder/labels``."""
    rng, pairs = np.random.default_rng(seed), []
    for name in names:
        pixels = rng.integers(0, 255, (channels, *shape)).astype(dtype)
        image = store(folder / "images" / f"{name}.ome.zarr", pixels)
        values = rng.choice(list(labels), (1, *shape)).astype(np.uint8)
        label = store(folder / "labels" / f"{name}.ome.zarr", values, kind="label", label_names=labels)
        pairs.append((image, label))
    return pairs


def crops_of(dataset):
    return json.loads((dataset / "slides.json").read_text())["slides"]


def test_a_data_set_follows_the_documented_format(tmp_path):
    train, test = slides(tmp_path / "train", ["a", "b"]), slides(tmp_path / "test", ["c"], seed=1)
    dataset = tmp_path / "nnUNet_raw" / "Dataset007_Tissue"
    write_nnunet(train, [image for image, _ in test], dataset, NnunetConfig(crop_px=40))
    described = json.loads((dataset / "dataset.json").read_text())
    assert described == {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "tumour": 1, "stroma": 2},
        "numTraining": 8,
        "file_ending": ".png",
        "overwrite_image_reader_writer": "NaturalImage2DIO",
    }
    files = {
        name: sorted(file.name for file in (dataset / name).iterdir()) for name in ("imagesTr", "labelsTr", "imagesTs")
    }
    cases = [f"{slide}_{number:05}" for slide in "ab" for number in range(4)]
    assert files["imagesTr"] == [f"{case}_0000.png" for case in cases]
    assert files["labelsTr"] == [f"{case}.png" for case in cases]
    assert files["imagesTs"] == [f"c_{number:05}_0000.png" for number in range(4)]
    (image, label), crop = train[1], crops_of(dataset)["b"]["crops"][3]
    assert (crop["start"], crop["size"]) == ([25, 35], [25, 35])
    stored = io.imread(dataset / "imagesTr" / "b_00003_0000.png")  # as nnU-Net's reader does
    assert (stored == np.moveaxis(image.read(1, (25, 35), (25, 35)), 0, -1)).all()
    codes = io.imread(dataset / "labelsTr" / "b_00003.png")
    assert (np.array([0, 3, 7])[codes] == label.read(1, (25, 35), (25, 35))[0]).all()


def test_other_pixels_become_a_tiff_for_each_channel(tmp_path):
    train = slides(tmp_path / "train", ["a"], channels=2, dtype=np.uint16)
    dataset = write_nnunet(train, [], tmp_path / "Dataset001_A", NnunetConfig(level=2))
    described = json.loads((dataset / "dataset.json").read_text())
    assert (described["file_ending"], described["numTraining"]) == (".tif", 1)
    assert described["channel_names"] == {"0": "channel 0", "1": "channel 1"}
    for number in range(2):
        stored = io.imread(dataset / "imagesTr" / f"a_00000_000{number}.tif")
        halved = train[0][0].read(1, (0, 0), (50, 70))[number].reshape(25, 2, 35, 2).mean((1, 3))
        assert stored.shape == (25, 35) and stored.dtype == np.uint16
        assert np.abs(stored - halved).max() <= 0.5
    assert crops_of(dataset)["a"]["pixel_size_um"] == [1.0, 1.0]


def test_volumes_come_with_their_spacing(tmp_path):
    train = slides(tmp_path / "train", ["v"], shape=(6, 20, 20), channels=1)
    dataset = write_nnunet(train, [], tmp_path / "Dataset001_A", NnunetConfig(crop_px=20))
    assert tifffile.imread(dataset / "imagesTr" / "v_00000_0000.tif").shape == (6, 20, 20)
    for folder in ("imagesTr", "labelsTr"):
        assert json.loads((dataset / folder / "v_00000.json").read_text()) == {"spacing": [SIZE_UM] * 3}
    assert json.loads((dataset / "dataset.json").read_text())["overwrite_image_reader_writer"] == "Tiff3DIO"


def test_ignored_pixels_are_the_last_label_and_background_is_kept_free(tmp_path):
    labels = {0: "road", 4: "sky", 255: "void"}
    (image, label), *_ = train = slides(tmp_path / "train", ["a"], labels=labels)
    label.has_background, label.label_names = False, {0: "road", 4: "sky"}
    dataset = write_nnunet(train, [], tmp_path / "Dataset001_A", NnunetConfig(ignore_labels=(255,)))
    described = json.loads((dataset / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "road": 1, "sky": 2, "ignore": 3}
    codes = io.imread(dataset / "labelsTr" / "a_00000.png")
    assert (np.array([-1, 0, 4, 255])[codes] == label.read(1, (0, 0), image.shape)[0]).all()
    with pytest.raises(InputError, match=r"a\.ome\.zarr: expected labels 0, 4, got 255"):
        write_nnunet(train, [], tmp_path / "Dataset002_A")


@pytest.mark.parametrize("extent, count", [(100, 1), (101, 2), (250, 3)])
def test_crops_are_as_few_as_may_be_and_of_equal_size(tmp_path, extent, count):
    (image, _), *_ = slides(tmp_path, ["a"], shape=(extent, 40))
    crops = list(divide(image, NnunetConfig(crop_px=100)))
    assert len(crops) == count
    assert sum(crop.size[0] for crop in crops) == extent
    assert max(crop.size[0] for crop in crops) - min(crop.size[0] for crop in crops) <= 1


def test_predictions_are_put_together_and_scored(tmp_path, capsys):
    """From slides to nnU-Net and back: labels that equal the truth but for one crop score as they should."""
    slides(tmp_path / "train", ["a"])
    test = slides(tmp_path / "test", ["c", "d"], shape=(64, 96), seed=1)
    dataset, predicted = tmp_path / "nnUNet_raw" / "Dataset001_A", tmp_path / "predicted"
    export = ["convert", str(tmp_path / "train"), "--test", str(tmp_path / "test"), "--format", "nnunet"]
    assert main([*export, "--crop_px", "32", "--output", str(dataset)]) == 0
    predicted.mkdir()
    for _, label in test:
        for crop in crops_of(dataset)[label.name]["crops"]:
            values = label.read(1, crop["start"], crop["size"])[0]
            codes = np.searchsorted([0, 3, 7], values).astype(np.uint8)
            Image.fromarray(codes if crop["case"] != "d_00000" else 0 * codes).save(predicted / f"{crop['case']}.png")
    (predicted / "dataset.json").write_text("{}")  # nnU-Net leaves its settings there
    back = ["convert", str(predicted), "--kind", "label", "--nnunet", str(dataset), "--output", str(tmp_path / "back")]
    assert main(back) == 0
    made, truth = open_slide(tmp_path / "back" / "c.ome.zarr"), test[0][1]
    assert (made.read(1, (0, 0), (64, 96)) == truth.read(1, (0, 0), (64, 96))).all()
    assert (made.label_names, made.pixel_size_um) == (NAMES, (SIZE_UM, SIZE_UM))
    scores = tmp_path / "scores.json"
    assert main(["evaluate", str(tmp_path / "back"), str(tmp_path / "test" / "labels"), "--output", str(scores)]) == 0
    wrong = (test[1][1].read(1, (0, 0), (32, 32)) != 0).sum()
    assert json.loads(scores.read_text())["pooled"]["accuracy"] == pytest.approx(1 - wrong / (2 * 64 * 96))
    capsys.readouterr()


def test_predictions_that_do_not_fit_are_refused(tmp_path):
    dataset = tmp_path / "Dataset001_A"
    pairs = slides(tmp_path, ["a", "c"])
    write_nnunet(pairs[:1], [pairs[1][0]], dataset, NnunetConfig(crop_px=70))
    predicted = tmp_path / "predicted"
    predicted.mkdir()
    with pytest.raises(ReadError, match="expected predictions of the crops of c, got none of 'c_00000'"):
        open_predictions(predicted, dataset)
    for content, message in [
        (np.full((50, 70), 9), "expected labels 0, 1, 2, got 9"),
        (np.zeros((50, 60)), r"expected whole numbers in one channel of \(50, 70\) pixels"),
    ]:
        Image.fromarray(content.astype(np.uint8)).save(predicted / "c_00000.png")
        (slide,) = open_predictions(predicted, dataset)
        with pytest.raises(ReadError, match=message):
            slide.read(1, (0, 0), (50, 70))
    (dataset / "slides.json").write_text('{"slides": {}, "values": []}')
    with pytest.raises(ReadError, match="expected a data set of `muvit convert --format nnunet`"):
        open_predictions(predicted, dataset)


def test_slides_that_nnunet_cannot_take_are_refused(tmp_path):
    pairs = slides(tmp_path / "train", ["a"])
    other = slides(tmp_path / "other", ["a", "b"], channels=1)
    with pytest.raises(InputError, match="a folder named as Dataset001_Name"):
        write_nnunet(pairs, [], tmp_path / "mine")
    with pytest.raises(InputError, match="slides: expected different names, in training and test alike"):
        write_nnunet(pairs, [pairs[0][0]], tmp_path / "Dataset001_A")
    with pytest.raises(InputError, match="expected 3 channels and 2 axes"):
        write_nnunet(pairs, [other[1][0]], tmp_path / "Dataset001_A")
    with pytest.raises(InputError, match="crop_px: expected a positive number"):
        NnunetConfig(crop_px=0)
    write_nnunet(pairs, [], tmp_path / "Dataset001_A")
    with pytest.raises(ExistsError):
        write_nnunet(pairs, [], tmp_path / "Dataset001_A")
    assert [path.name for path in tmp_path.glob("Dataset*")] == ["Dataset001_A"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--format", "nnunet", "--kind", "label"], "--format nnunet: expected source, --output"),
        (["--format", "nnunet", "--levels", "[1,2]"], "levels"),
        (["--format", "nnunet", "--pixel_size_um", "1"], "got --pixel_size_um"),
        (["--crop_px", "64"], "--crop_px: expected --format nnunet"),
        (["--nnunet", "Dataset001_A"], "--nnunet: expected --kind label"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, capsys, options, message):
    assert main(["convert", str(tmp_path), "--output", str(tmp_path / "Dataset001_A"), *options]) == 1
    assert message in capsys.readouterr().err
