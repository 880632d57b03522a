"""Pyramids for other software, each read back by a reader of somebody else."""

import json

import numpy as np
import openslide
import pytest
import tensorstore
import tifffile
import yaozarrs
from memory_slide import MemorySlide

from muvit.cli import main
from muvit.data.pyramids.convert import convert_image
from muvit.data.pyramids.reduction import area_mean, majority
from muvit.data.slides.open import open_slide
from muvit.errors import ExistsError

NAMES, COLORS = {0: "background", 1: "tumour, necrotic"}, {1: (255, 0, 0, 255)}


def noise(shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def written(tmp_path, pixels, form, **options):
    suffix = "tif" if form == "ome-tiff" else "zarr"
    return convert_image(
        MemorySlide({1: pixels}), tmp_path / f"a.ome.{suffix}", format=form, pixel_size_um=0.25, **options
    )


@pytest.mark.parametrize("form", ["ome-zarr-0.4", "ome-tiff"])
@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [((3, 530, 311), np.uint8, "image"), ((2, 530, 311), np.uint16, "image"), ((1, 530, 311), np.uint8, "label")],
)
def test_every_level_comes_back_with_its_size_and_names(tmp_path, form, shape, dtype, kind):
    pixels = noise(shape, dtype) // (1 if kind == "image" else 128)
    legend = {"label_names": NAMES, "label_colors": COLORS} if kind == "label" else {}
    file = written(tmp_path, pixels, form, kind=kind, levels=(1, 4), **legend)
    assert [one.name for one in tmp_path.iterdir()] == [file.name]
    slide = open_slide(file, palette="index")
    assert (slide.levels, slide.pixel_size_um, slide.dtype) == ((1, 4), pytest.approx((0.25, 0.25)), dtype)
    if kind == "label":
        assert (slide.label_names, slide.label_colors) == (NAMES, COLORS)
    else:
        named = ("red", "green", "blue") if dtype == np.uint8 else ("channel 0", "channel 1")
        assert slide.channel_names == (named if form == "ome-tiff" else MemorySlide({1: pixels}).channel_names)
    coarse = (area_mean if kind == "image" else majority)(pixels, 4)
    for level, expected in ((1, pixels), (4, coarse)):
        np.testing.assert_array_equal(slide.read(level, (0, 0), expected.shape[1:]), expected)


def test_tifffile_reads_the_ome_tiff(tmp_path):
    pixels = noise((2, 530, 311), np.uint16)
    with tifffile.TiffFile(written(tmp_path, pixels, "ome-tiff", levels=(1, 2), channel_names=["DAPI", "GFP"])) as tif:
        (series,) = tif.series
        assert (series.axes, [level.shape for level in series.levels]) == ("CYX", [(2, 530, 311), (2, 265, 156)])
        np.testing.assert_array_equal(series.levels[0].asarray(), pixels)
        np.testing.assert_array_equal(series.levels[1].asarray(), area_mean(pixels, 2))
        assert all(level.keyframe.is_tiled for level in series.levels)
        ome = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]["Pixels"]
        assert (ome["PhysicalSizeX"], ome["PhysicalSizeXUnit"]) == (0.25, "µm")
        assert [channel["Name"] for channel in ome["Channel"]] == ["DAPI", "GFP"]


def test_openslide_reads_rgb_at_its_pixel_size(tmp_path):
    pixels = noise((3, 530, 311))
    slide = openslide.OpenSlide(written(tmp_path, pixels, "ome-tiff"))
    np.testing.assert_array_equal(
        np.asarray(slide.read_region((0, 0), 0, (311, 530)))[..., :3], pixels.transpose(1, 2, 0)
    )
    assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25, rel=1e-4)


def test_stacks_keep_the_levels_that_coarsen_planes(tmp_path, caplog):
    pixels = noise((1, 5, 40, 60), np.float32)
    file = written(tmp_path, pixels, "ome-tiff", levels=(1, (1, 2, 2), (2, 4, 4)))
    assert "level 2x4x4 is left out, as OME-TIFF coarsens planes only" in caplog.text
    np.testing.assert_array_equal(tifffile.imread(file), pixels[0])
    np.testing.assert_array_equal(tifffile.imread(file, level=1), area_mean(pixels, (1, 2, 2))[0])


@pytest.mark.parametrize("kind", ["image", "label"])
def test_ome_zarr_04_is_valid_and_tensorstore_reads_it(tmp_path, kind):
    pixels = noise((1 if kind == "label" else 3, 300, 70))
    legend = {"label_names": NAMES, "label_colors": COLORS} if kind == "label" else {}
    folder = written(tmp_path, pixels, "ome-zarr-0.4", kind=kind, levels=(1, 2), **legend)
    yaozarrs.validate_zarr_store(str(folder))
    attributes = json.loads((folder / ".zattrs").read_text())
    assert attributes["multiscales"][0]["version"] == "0.4" and ("image-label" in attributes) == (kind == "label")
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/0/"}}
    stored = tensorstore.open(spec).result().read().result()
    np.testing.assert_array_equal(stored, pixels[0] if kind == "label" else pixels)


def test_labels_are_listed_in_the_zarr_format_of_their_image(tmp_path, caplog):
    image = written(tmp_path, noise((3, 300, 70)), "ome-zarr-0.4", levels=(1, 2))
    slide = MemorySlide({1: noise((1, 300, 70)) // 128})
    for name in ("nuclei", "tumour"):
        convert_image(slide, image / "labels" / name, kind="label", format="ome-zarr-0.4", label_names=NAMES)
    assert not caplog.messages
    yaozarrs.validate_zarr_store(str(image))
    yaozarrs.validate_zarr_store(str(image / "labels" / "tumour"))
    assert json.loads((image / "labels" / ".zattrs").read_text()) == {"labels": ["nuclei", "tumour"]}
    assert not (image / "labels" / "zarr.json").exists()
    assert open_slide(image).labels() == ("nuclei", "tumour")
    convert_image(slide, image / "labels" / "other", kind="label")
    assert "labels of zarr format 3 in an image of format 2" in caplog.text


def test_a_prediction_is_converted_on_the_command_line(tmp_path, capfd):
    pixels = noise((1, 90, 70)) // 128
    labels = convert_image(MemorySlide({1: pixels}), tmp_path / "a.ome.zarr", kind="label", label_names=NAMES)
    for form, name in (("ome-tiff", "a.ome.tif"), ("ome-zarr-0.4", "a.ome.zarr")):
        options = ["--kind", "label", "--format", form, "--output", str(tmp_path / "out")]
        assert main(["convert", str(labels), *options]) == 0
        assert capfd.readouterr().out == f"{tmp_path / 'out' / name}\n"
        assert open_slide(tmp_path / "out" / name).label_names == NAMES
    with pytest.raises(ExistsError):
        written(tmp_path / "out", pixels, "ome-tiff")
