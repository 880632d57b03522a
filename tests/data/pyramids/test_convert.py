import subprocess
import sys

import numpy as np
import pytest
import tifffile
import yaozarrs
from PIL import Image

from muvit.data.pyramids import convert
from muvit.data.pyramids.convert import convert_image
from muvit.data.pyramids.reduction import area_mean
from muvit.data.slides.open import open_slide
from muvit.errors import ExistsError, InputError, ReadError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (300, 400, 3), dtype=np.uint8)
VOLUME = RNG.integers(0, 2**16, (2, 10, 60, 70), dtype=np.uint16)


def whole(slide):
    return slide.read(1, (0,) * slide.ndim, slide.shape)


@pytest.fixture
def sources(tmp_path):
    files = {name: tmp_path / name for name in ("a.png", "a.jpg", "a.tif", "b.tif", "a.ome.tif")}
    Image.fromarray(RGB).save(files["a.png"])
    Image.fromarray(RGB).save(files["a.jpg"])
    tifffile.imwrite(files["a.tif"], RGB, tile=(64, 64), compression="zlib")
    tifffile.imwrite(files["b.tif"], RGB[..., 0], rowsperstrip=8)
    metadata = {"axes": "CZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 2.0}
    metadata["Channel"] = {"Name": ["DAPI", "GFP"]}
    tifffile.imwrite(files["a.ome.tif"], VOLUME, ome=True, metadata=metadata, photometric="minisblack")
    return files


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "b.tif", "a.ome.tif"])
def test_every_format_becomes_a_valid_pyramid_of_the_same_pixels(tmp_path, sources, name):
    target = convert_image(sources[name], tmp_path / "out.ome.zarr")
    source, slide = open_slide(sources[name]), open_slide(target)
    np.testing.assert_array_equal(whole(slide), whole(source))
    assert slide.channel_names == source.channel_names
    yaozarrs.validate_zarr_store(target)


def test_physical_pixel_size_and_channel_names_are_carried_over(tmp_path, sources):
    slide = open_slide(convert_image(sources["a.ome.tif"], tmp_path / "out.ome.zarr"))
    assert slide.pixel_size_um == pytest.approx((2.0, 0.25, 0.5))
    assert slide.channel_names == ("DAPI", "GFP")
    assert slide.shape == (10, 60, 70)
    again = open_slide(convert_image(slide.path, tmp_path / "again.ome.zarr"))
    assert (again.pixel_size_um, again.channel_names) == (slide.pixel_size_um, slide.channel_names)


def test_what_is_given_wins_over_what_the_source_states(tmp_path, sources):
    options = {"pixel_size_um": 3.0, "channel_names": ["one", "two"], "levels": (1, 3)}
    slide = open_slide(convert_image(sources["a.ome.tif"], tmp_path / "out.ome.zarr", **options))
    assert (slide.pixel_size_um, slide.channel_names, slide.levels) == ((3.0, 3.0, 3.0), ("one", "two"), (1, 3))
    np.testing.assert_array_equal(slide.read(3, (0, 0, 0), slide.level_shape(3)), area_mean(VOLUME, 3))


def test_bands_smaller_than_the_image_give_the_same_pixels(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(convert, "_BAND_BYTES", 1)
    monkeypatch.setattr("muvit.data.pyramids.spec._SHARD", {2: 64})
    monkeypatch.setattr("muvit.data.pyramids.spec._CHUNK", {2: 32})
    steps = []
    target = convert_image(sources["a.tif"], tmp_path / "out.ome.zarr", progress=lambda *step: steps.append(step))
    np.testing.assert_array_equal(whole(open_slide(target)), RGB.transpose(2, 0, 1))
    total = steps[-1][1]
    assert steps == [(done, total) for done in range(1, total + 1)]
    assert total > 35


def test_label_masks_keep_their_values(tmp_path):
    labels = (RGB[..., 0] % 5).astype(np.uint8)
    palette = Image.fromarray(labels)
    palette.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    palette.save(tmp_path / "palette.png")
    tifffile.imwrite(tmp_path / "bilevel.tif", labels > 2)
    expected = {"palette.png": labels, "bilevel.tif": (labels > 2).astype(np.uint8)}
    for name, values in expected.items():
        target = convert_image(
            tmp_path / name,
            tmp_path / f"{name}.ome.zarr",
            kind="label",
            label_names={1: "one"},
            label_colors={1: (9, 8, 7)},
        )
        slide = open_slide(target)
        np.testing.assert_array_equal(whole(slide)[0], values)
        assert set(np.unique(slide.read(2, (0, 0), (150, 200)))) <= set(np.unique(values))
        again = open_slide(convert_image(target, tmp_path / f"{name}.again.ome.zarr", kind="label"))
        assert (again.label_names, again.label_colors) == ({1: "one"}, {1: (9, 8, 7, 255)})


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.png", r"a\.png: expected labels in one channel, got 3"), ("a.jpg", "lossless"), ("f.tif", "integer dtype")],
)
def test_images_that_are_no_labels_are_refused(tmp_path, sources, name, message):
    tifffile.imwrite(tmp_path / "f.tif", np.zeros((20, 20), np.float32))
    with pytest.raises(InputError, match=message):
        convert_image(tmp_path / name, tmp_path / "out.ome.zarr", kind="label")
    assert not (tmp_path / "out.ome.zarr").exists()


def test_a_label_converted_into_an_image_is_listed_there(tmp_path, sources):
    image = convert_image(sources["a.tif"], tmp_path / "image.ome.zarr")
    convert_image(sources["b.tif"], image / "labels/mask", kind="label")
    assert open_slide(image).labels() == ("mask",)


def test_existing_output_is_kept_unless_overwriting_is_asked_for(tmp_path, sources):
    target = convert_image(sources["b.tif"], tmp_path / "out.ome.zarr")
    with pytest.raises(ExistsError):
        convert_image(sources["a.tif"], target)
    assert open_slide(target).num_channels == 1
    convert_image(sources["a.tif"], target, overwrite=True)
    assert open_slide(target).num_channels == 3
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")]


def test_an_image_can_be_converted_onto_itself(tmp_path, sources):
    target = convert_image(sources["a.tif"], tmp_path / "out.ome.zarr")
    convert_image(target, target, levels=(1, 4), overwrite=True)
    assert open_slide(target).levels == (1, 4)
    np.testing.assert_array_equal(whole(open_slide(target)), RGB.transpose(2, 0, 1))


@pytest.mark.parametrize("failure", ["damaged pixels", "interrupt", "missing", "foreign"])
def test_a_failed_conversion_leaves_the_old_output_and_nothing_else(tmp_path, sources, failure):
    target = convert_image(sources["b.tif"], tmp_path / "out.ome.zarr")
    source = sources["a.tif"]
    progress = None
    if failure == "damaged pixels":
        with tifffile.TiffFile(source) as tif:
            offset = tif.pages[0].dataoffsets[-1]
        data = bytearray(source.read_bytes())
        data[offset : offset + 50] = bytes(50)
        source.write_bytes(data)
    elif failure == "missing":
        source = tmp_path / "gone.tif"
    elif failure == "foreign":
        source.write_text("no image")
    else:

        def progress(done, total):
            raise KeyboardInterrupt

    files = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt if failure == "interrupt" else ReadError):
        convert_image(source, target, overwrite=True, progress=progress)
    assert sorted(tmp_path.iterdir()) == files
    np.testing.assert_array_equal(whole(open_slide(target))[0], RGB[..., 0])


MEASURED = """
import resource, sys
import muvit.data.slides.tiff
from muvit.data.pyramids.convert import convert_image
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
convert_image(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
"""


def test_memory_is_bounded_by_bands_not_by_the_image(tmp_path):
    shape = (4096 * 24, 4096)
    block = np.tile(np.arange(64, dtype=np.uint8), (4096, 64))
    tiles = (block for _ in range(24))
    tifffile.imwrite(tmp_path / "tall.tif", tiles, shape=shape, dtype=np.uint8, compression="zlib", tile=(4096, 4096))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "tall.tif"), str(tmp_path / "out.ome.zarr")]
    grown = int(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    # decoded whole, the image alone would take 384 MiB
    assert grown < 256 << 20
