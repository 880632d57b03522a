import csv
import re
import shutil

import numpy as np
import orjson
import pytest
import tifffile
import torch
from PIL import Image
from rasterio.features import rasterize
from shapely.geometry import shape

from muvit.cli import main
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.folders import open_label_images
from muvit.data.pyramids.convert import convert_image
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.data.slides.open import open_slide
from muvit.errors import ReadError
from muvit.inference.predict import predict_slide
from muvit.inference.run.plan import PredictOptions
from muvit.models.segmentation_model import SegmentationModel, Views

LABELS = np.zeros((64, 96), np.uint8)
LABELS[8:40, 10:70] = 1
LABELS[16:24, 20:40] = 2
LABELS[50, 80] = 2


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Predicted labels with names and a pixel size, and their images, which are twice as fine."""
    folder = tmp_path_factory.mktemp("work")
    for number, name in enumerate(("a", "b")):
        tifffile.imwrite(folder / f"{name}.tif", np.roll(LABELS, number, axis=0))
        names, colors = {0: "glass", 1: "tumour", 2: "vessel"}, {1: (10, 200, 30)}
        target = folder / "labels" / f"{name}.ome.zarr"
        options = {"pixel_size_um": 0.5, "label_names": names, "label_colors": colors}
        convert_image(folder / f"{name}.tif", target, kind="label", **options)
        picture = np.random.default_rng(number).integers(0, 256, (128, 191, 3), dtype=np.uint8)
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / "images" / f"{name}.png")
    return folder


def run(*argv):
    return main(["export", *map(str, argv)])


def said(capfd):
    out, err = capfd.readouterr()
    lines = err.replace("\r", "\n").splitlines()
    return out.splitlines(), [line for line in lines if line.strip() and not re.search(r"\[\d\d:\d\d", line)]


def features(file):
    return orjson.loads(file.read_bytes())["features"]


def test_all_kinds_are_written_for_every_slide(work, tmp_path, capfd):
    assert run(work / "labels", "--image", work / "images", "--output", tmp_path / "out") == 0
    out = tmp_path / "out"
    assert said(capfd) == (
        [
            f"{out / 'a.geojson'}: 3 annotations",
            f"{out / 'a.png'}",
            f"{out / 'b.geojson'}: 3 annotations",
            f"{out / 'b.png'}",
            f"{out / 'areas.csv'}",
        ],
        [],
    )
    tumour = next(f for f in features(out / "a.geojson") if f["properties"]["classification"]["name"] == "tumour")
    assert tumour["properties"]["classification"]["color"] == [10, 200, 30]
    measured = tumour["properties"]["measurements"]
    assert (measured["Area px^2"], measured["Area µm^2"]) == (4 * 1760, 1760 / 4)
    assert measured["Perimeter µm"] == 2 * (60 + 32) / 2
    assert shape(tumour["geometry"]).bounds == (20, 16, 140, 80)  # pixels of the image
    with (out / "areas.csv").open(newline="") as lines:
        table = [
            (row["slide"], row["class"], int(row["pixels"]), float(row["area_um2"])) for row in csv.DictReader(lines)
        ]
    expected = [("glass", 6144 - 1921, (6144 - 1921) / 4), ("tumour", 1760, 440.0), ("vessel", 161, 40.25)]
    assert table == [(slide, *row) for slide in ("a", "b") for row in expected]
    with Image.open(out / "b.png") as picture:
        assert picture.width == 191 and picture.height > 128


def test_only_labels_are_taken_from_a_folder(work, tmp_path):
    folder = tmp_path / "predictions"
    shutil.copytree(work / "labels", folder)
    for name, dtype, channels in (("probabilities", "uint8", 3), ("entropy", "float16", 1)):
        writer = PyramidWriter.create(
            folder / f"a.{name}.ome.zarr", shape=LABELS.shape, num_channels=channels, dtype=dtype
        )
        writer.write((0, 0), np.zeros((channels, *LABELS.shape), dtype))
        writer.finish()
    (folder / "notes.txt").touch()
    assert run(folder, "--areas", "--output", tmp_path / "out") == 0
    with (tmp_path / "out" / "areas.csv").open(newline="") as lines:
        assert {row["slide"] for row in csv.DictReader(lines)} == {"a", "b"}
    for name in "ab":
        shutil.rmtree(folder / f"{name}.ome.zarr")
    with pytest.raises(ReadError, match="a folder of label images"):
        open_label_images([folder])


def test_one_label_image_stands_alone(work, tmp_path):
    options = ("--simplify", 0, "--min_area_um2", 1, "--object_type", "detection")
    assert run(work / "labels" / "a.ome.zarr", "--output", tmp_path, "--geojson", *options) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["a.geojson"]
    found = features(tmp_path / "a.geojson")
    assert {f["properties"]["objectType"] for f in found} == {"detection"}
    assert sorted(shape(f["geometry"]).area for f in found) == [160, 1760]
    labels = OmeZarrSlide(work / "labels" / "a.ome.zarr").read(1, (0, 0), (64, 96))[0]
    assert sum(shape(f["geometry"]).area for f in found) == (labels > 0).sum() - 1


def test_labels_are_cleaned_for_every_output(work, tmp_path):
    options = ("--smooth_um", 1, "--fill_holes_um", 6, "--split_um", 100, "--geojson", "--areas")
    assert run(work / "labels" / "a.ome.zarr", "--output", tmp_path, *options) == 0
    found = features(tmp_path / "a.geojson")
    assert [f["properties"]["classification"]["name"] for f in found] == ["vessel", "tumour"]  # no single pixel
    with (tmp_path / "areas.csv").open(newline="") as lines:
        areas = {row["class"]: float(row["area_um2"]) for row in csv.DictReader(lines)}
    assert [f["properties"]["measurements"]["Area µm^2"] for f in found] == [areas["vessel"], areas["tumour"]]


def test_probabilities_beside_the_labels_are_measured(work, tmp_path):
    folder = tmp_path / "predictions"
    shutil.copytree(work / "labels" / "a.ome.zarr", folder / "a.ome.zarr")
    writer = PyramidWriter.create(
        folder / "a.probabilities.ome.zarr",
        shape=LABELS.shape,
        num_channels=2,
        dtype="uint8",
        channel_names=("glass", "tumour"),
    )
    writer.write((0, 0), np.stack([np.full(LABELS.shape, 51), np.where(LABELS == 1, 204, 0)]).astype(np.uint8))
    writer.finish()
    assert run(folder, "--geojson", "--output", tmp_path / "out") == 0
    tumour = max(
        (f["properties"]["measurements"] for f in features(tmp_path / "out" / "a.geojson")),
        key=lambda one: one["Area µm^2"],
    )
    assert (tumour["Probability glass"], tumour["Probability tumour"]) == (pytest.approx(0.2), pytest.approx(0.8))


def test_plain_labels_get_a_pixel_size_by_hand(work, tmp_path):
    assert run(work / "a.tif", "--output", tmp_path, "--areas", "--pixel_size_um", 2) == 0
    with (tmp_path / "areas.csv").open(newline="") as lines:
        assert [(row["class"], row["area_um2"]) for row in csv.DictReader(lines)][1] == ("class 1", "7040.0")


def test_nothing_is_overwritten_unasked(work, tmp_path, capfd):
    (tmp_path / "b.png").write_bytes(b"mine")
    assert run(work / "labels", "--output", tmp_path) == 1
    _, (complaint,) = said(capfd)
    assert "b.png: exists already" in complaint
    assert [file.name for file in tmp_path.iterdir()] == ["b.png"]  # found before any work
    assert run(work / "labels", "--output", tmp_path, "--overwrite") == 0
    assert len(list(tmp_path.iterdir())) == 5 and (tmp_path / "b.png").read_bytes() != b"mine"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nowhere.tif",), "nowhere.tif: expected an image file"),
        (("a.tif", "labels/a.ome.zarr"), "labels: expected label images of different names"),
        (("labels", "--image", "images/a.png"), "--image: expected a folder of images, for several label images"),
        (("a.tif", "--image", "labels/../empty"), "expected an image, or a folder of images"),
        (("a.tif", "b.tif", "--image", "only_b"), "expected the image of every label image, got none of 'a'"),
        (("images/a.png",), "expected 2D labels: whole numbers in one channel"),
        (("a.tif", "--image", "small.png"), "expected labels of"),
        (("a.tif", "--min_area_um2", "5"), "expected labels with a pixel size"),
        (("a.tif", "--smooth_um", "5"), "smooth_um: expected labels with a pixel size"),
        (("a.tif", "--split_um", "5"), "split_um: expected labels with a pixel size"),
        (("a.tif", "--fill_holes_um", "-1"), "fill_holes_um: expected a number >= 0"),
        (("a.tif", "--simplify", "-1"), "simplify_px: expected a number >= 0"),
        (("a.tif", "--overview_px", "0"), "--overview_px: expected a positive number"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(work, tmp_path, capfd, monkeypatch, arguments, message):
    (work / "empty").mkdir(exist_ok=True)
    (work / "only_b").mkdir(exist_ok=True)
    for file in (work / "only_b" / "b.png", work / "small.png"):
        Image.new("RGB", (96, 50)).save(file)
    monkeypatch.chdir(work)
    assert run(*arguments, "--output", tmp_path / "out") == 1
    _, (complaint,) = said(capfd)
    assert complaint.startswith("muvit: ") and message in complaint
    assert not (tmp_path / "out").exists()


def test_a_corrupt_label_image_leaves_no_half_file(work, tmp_path, capfd):
    file = work / "torn.tif"
    tifffile.imwrite(file, np.ones((512, 512), np.uint8), tile=(256, 256), compression="zlib")
    file.write_bytes(file.read_bytes()[:600])
    assert run(file, "--output", tmp_path / "out", "--geojson") == 1
    _, (complaint,) = said(capfd)
    assert "torn.tif" in complaint
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


class Bright(SegmentationModel):
    """Class 1 where a pixel is bright."""

    views = Views(levels=(1,), in_channels=1, ndim=2, multiple=(1, 1))
    num_classes = 2

    def __init__(self):
        super().__init__()
        self.middle = torch.nn.Parameter(torch.tensor(0.5))

    def label_logits(self, img, bbox=None):
        return torch.cat([self.middle - img[:, 0], img[:, 0] - self.middle], 1)


def test_objects_across_tiles_and_blocks_come_out_whole(tmp_path):
    y, x = np.indices((150, 170))
    distance = np.hypot(y - 75, x - 85)
    truth = ((distance < 70) & (distance > 30) | (distance < 9)).astype(np.uint8)  # a ring and a disc in its hole
    Image.fromarray(truth * 255).save(tmp_path / "image.png")
    settings = Preprocessing(
        crop_size=(16, 24), normalization=Range(high=255), class_names=("glass", "ring"), class_colors=((0, 0, 0),) * 2
    )
    labels = tmp_path / "labels.ome.zarr"
    options = PredictOptions(block_px=40, overlap=0.25)
    predict_slide(Bright(), open_slide(tmp_path / "image.png"), labels, settings, options=options, device="cpu")
    assert run(labels, "--image", tmp_path / "image.png", "--output", tmp_path, "--geojson", "--simplify", 0) == 0
    found = sorted((shape(f["geometry"]) for f in features(tmp_path / "labels.geojson")), key=lambda one: -one.area)
    assert [(one.geom_type, one.is_valid, len(one.interiors)) for one in found] == [
        ("Polygon", True, 1),
        ("Polygon", True, 0),
    ]
    assert (rasterize(found, out_shape=truth.shape) == truth).all()
