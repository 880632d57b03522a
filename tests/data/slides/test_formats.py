"""Formats of scanners and microscopes: found by what is in the files, and read in part."""

import pickle
from importlib.util import find_spec

import numpy as np
import pytest
import tifffile
from dicom_files import write_dicom
from memory_slide import MemorySlide

from muvit.cli import main
from muvit.data.folders import image_files, is_slide_folder, open_folder
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.open import open_slide
from muvit.data.slides.selection import select
from muvit.data.slides.tiff import TiffSlide
from muvit.data.slides.whole_slide import WholeSlide
from muvit.errors import InputError, ReadError

PHILIPS = """<?xml version="1.0"?><DataObject ObjectType="DPUfsImport"><Attribute Name="PIM_DP_SCANNED_IMAGES"
Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray"><Array><DataObject ObjectType="DPScannedImage"><Attribute
Name="PIM_DP_IMAGE_TYPE" Group="0x301D" Element="0x1004" PMSVR="IString">WSI</Attribute><Attribute
Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" Group="0x1001" Element="0x8B01" PMSVR="IDataObjectArray"><Array>
<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030"
PMSVR="IDoubleArray">&quot;0.0005&quot; &quot;0.00025&quot;</Attribute></DataObject></Array></Attribute></DataObject>
</Array></Attribute></DataObject>"""


def colours(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, (x + y) // 2]).astype(np.uint8)


def noise(shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def test_dicom_opens_as_a_file_and_as_a_folder(tmp_path):
    pixels, folder = colours(150, 200), tmp_path / "slide"
    folder.mkdir()
    file = write_dicom(folder / "0.dcm", pixels)
    for path, name in ((file, "0"), (folder, "slide")):
        slide = open_slide(path)
        assert isinstance(slide, WholeSlide)
        assert (slide.name, slide.shape, slide.pixel_size_um) == (name, (150, 200), pytest.approx((0.25, 0.25)))
        assert abs(slide.read(1, (0, 0), (150, 200)).astype(int) - pixels).max() <= 4  # JPEG
    assert image_files([folder]) == [folder] and not is_slide_folder(folder)
    assert list(open_folder(tmp_path)) == ["slide"]


def test_a_dicom_folder_of_several_slides_needs_a_choice(tmp_path):
    for name, series, height in (("a", "1.2.3", 70), ("b", "1.2.4", 90)):
        write_dicom(tmp_path / f"{name}.dcm", colours(height, 80), series)
    with pytest.raises(InputError, match=r"expected the files of one slide, got those of 2: a\.dcm, b\.dcm\. Name one"):
        open_slide(tmp_path)
    assert [open_slide(tmp_path, series=number).shape for number in (0, 1)] == [(70, 80), (90, 80)]
    with pytest.raises(InputError, match=r"series of .*: expected a number from 0 to 1, got 2"):
        open_slide(tmp_path, series=2)
    (tmp_path / "b.dcm").write_bytes(b"nothing")
    assert open_slide(tmp_path).shape == (70, 80)
    (tmp_path / "a.dcm").unlink()
    with pytest.raises(ReadError, match="DICOM files of a slide"):
        open_slide(tmp_path)


def test_tiffs_of_philips_are_put_together_by_openslide(tmp_path):
    pixels = colours(128, 192)
    options = {"tile": (64, 64), "photometric": "rgb", "software": "Philips DP v1.0"}
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(np.moveaxis(pixels, 0, -1), description=PHILIPS, metadata=None, **options)
    slide = open_slide(tmp_path / "a.tif")
    assert isinstance(slide, WholeSlide)
    np.testing.assert_array_equal(slide.read(1, (0, 0), (128, 192)), pixels)
    tifffile.imwrite(tmp_path / "b.tif", np.moveaxis(pixels, 0, -1), tile=(64, 64), photometric="rgb")
    assert isinstance(open_slide(tmp_path / "b.tif"), TiffSlide)


@pytest.fixture
def stack():
    return MemorySlide(
        {1: noise((2, 3, 4, 40, 60)), (1, 2, 4, 4): noise((2, 3, 2, 10, 15)), (1, 1, 4, 4): noise((2, 3, 4, 10, 15))}
    )


def test_planes_time_points_and_channels_are_chosen(stack):
    stack.channel_names = ("DAPI", "GFP")
    stack.state_pixel_size((2.0, 1.0, 0.5, 0.25))
    part = select(stack, z=3, t=1, channels=["GFP"])
    assert (part.axes, part.shape, part.levels, part.channel_names) == ("yx", (40, 60), (1, 4), ("GFP",))
    assert part.pixel_size_um == (0.5, 0.25)
    for level, stored in ((1, stack.pyramid[1]), (4, stack.pyramid[(1, 1, 4, 4)])):
        np.testing.assert_array_equal(part.read(level, (0, 0), part.level_shape(level)), stored[1:, 1, 3])
    swapped = select(stack, z=0, channels=["1", 0])
    assert (swapped.axes, swapped.channel_names) == ("tyx", ("GFP", "DAPI"))
    np.testing.assert_array_equal(swapped.read(1, (0, 0, 0), swapped.shape), stack.pyramid[1][::-1, :, 0])
    assert select(stack, channels=["DAPI", "GFP"]) is stack
    coarse = select(MemorySlide({1: noise((1, 4, 40, 60)), 4: noise((1, 1, 10, 15))}), z=3)
    np.testing.assert_array_equal(coarse.read(4, (0, 0), (10, 15)), noise((1, 1, 10, 15))[:, 0])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"z": 4}, "z of memory: expected a number from 0 to 3, got 4"),
        ({"t": -1}, "t of memory: expected a number from 0 to 2, got -1"),
        ({"channels": ["CFP"]}, "channels of memory: expected names among channel 0, channel 1, .* got CFP"),
        ({"channels": []}, "channels of memory: expected at least one, got none"),
    ],
)
def test_what_is_not_there_cannot_be_chosen(stack, choice, message):
    with pytest.raises(InputError, match=message):
        select(stack, **choice)
    with pytest.raises(InputError, match="z of memory: expected 0, as there is a single z plane, got 1"):
        select(MemorySlide({1: noise((1, 9, 9))}), z=1)


def test_images_of_a_file_are_chosen_by_number(tmp_path, capfd):
    images = [noise((40, 50)), noise((30, 20), np.uint16)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        for pixels in images:
            tif.write(pixels)
    assert open_slide(tmp_path / "a.tif").shape == (40, 50)  # the largest
    for number, pixels in enumerate(images):
        slide = open_slide(tmp_path / "a.tif", series=number)
        np.testing.assert_array_equal(slide.read(1, (0, 0), slide.shape)[0], pixels)
    with pytest.raises(InputError, match=r"series of .*: expected a number from 0 to 1, got 2"):
        open_slide(tmp_path / "a.tif", series=2)
    assert main(["convert", str(tmp_path / "a.tif"), "--series", "1", "--output", str(tmp_path / "out")]) == 0
    assert open_slide(tmp_path / "out" / "a.ome.zarr").shape == (30, 20)
    assert main(["info", str(tmp_path / "a.tif"), "--series", "1"]) == 0
    assert "shape           30 x 20" in capfd.readouterr().out


def test_images_of_a_collection_are_chosen_by_number(tmp_path):
    for number, size in enumerate((20, 30)):
        writer = PyramidWriter.create(
            tmp_path / "a.zarr" / str(number), shape=(size, size), num_channels=1, dtype=np.uint8
        )
        writer.finish()
    (tmp_path / "a.zarr" / "zarr.json").write_text(
        '{"zarr_format":3,"node_type":"group","attributes":{"ome":{"version":"0.5","bioformats2raw.layout":3}}}'
    )
    with pytest.raises(InputError, match=r"a\.zarr: expected one image, got a collection of several"):
        open_slide(tmp_path / "a.zarr")
    assert [open_slide(tmp_path / "a.zarr", series=number).shape for number in (0, 1)] == [(20, 20), (30, 30)]
    for path, number in ((tmp_path / "a.zarr", 2), (tmp_path / "a.zarr" / "1", 1)):
        with pytest.raises(InputError, match="series of"):
            open_slide(path, series=number)


def test_dicom_that_openslide_refuses_is_read_by_wsidicom(tmp_path):
    pixels = colours(150, 200)
    file = write_dicom(tmp_path / "grey.dcm", pixels[:1])
    if find_spec("wsidicom") is None:
        with pytest.raises(ReadError, match="a slide that OpenSlide reads") as refused:
            open_slide(file)
        assert "pip install 'muvit[dicom]'" in refused.value.__notes__[0]
        return
    slide = open_slide(file)
    assert (slide.shape, slide.num_channels, slide.pixel_size_um) == ((150, 200), 1, pytest.approx((0.25, 0.25)))
    read = pickle.loads(pickle.dumps(slide)).read(1, (3, 5), (100, 150))
    assert abs(read.astype(int) - pixels[:1, 3:103, 5:155]).max() <= 4  # JPEG
    with pytest.raises(InputError, match="series of"):
        open_slide(file, series=1)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ReadError, match="DICOM files of a slide"):
        open_slide(file)


def test_czi_opens_with_its_planes_channels_and_scenes(tmp_path):
    if find_spec("pylibCZIrw") is None:
        (tmp_path / "a.czi").write_bytes(b"")
        with pytest.raises(InputError, match=r"expected the package pylibCZIrw, .* pip install 'muvit\[czi\]'"):
            open_slide(tmp_path / "a.czi")
        return
    from pylibCZIrw.czi import create_czi

    pixels = noise((2, 3, 60, 80), np.uint16)
    with create_czi(str(tmp_path / "a.czi")) as czi:
        for channel, z in np.ndindex(2, 3):
            czi.write(pixels[channel, z][..., None], plane={"C": channel, "Z": z, "T": 0})
        czi.write_metadata("a", channel_names={0: "DAPI", 1: "GFP"}, scale_x=2.5e-7, scale_y=5e-7, scale_z=1e-6)
    slide = open_slide(tmp_path / "a.czi")
    assert (slide.axes, slide.channel_names) == ("zyx", ("DAPI", "GFP"))
    assert slide.pixel_size_um == pytest.approx((1.0, 0.5, 0.25))
    read = pickle.loads(pickle.dumps(slide)).read(1, (1, 10, 20), (2, 30, 40))
    np.testing.assert_array_equal(read, pixels[:, 1:, 10:40, 20:60])
    scenes = [colours(40, 50), colours(30, 50)]
    with create_czi(str(tmp_path / "b.czi")) as czi:
        for number, part in enumerate(scenes):  # stored as blue, green, red
            rows = np.ascontiguousarray(np.moveaxis(part[::-1], 0, -1))
            czi.write(rows, plane={"C": 0, "Z": 0, "T": 0}, location=(7, 100 * number), scene=number)
    assert open_slide(tmp_path / "b.czi").shape == (130, 50)
    for number, part in enumerate(scenes):
        scene = open_slide(tmp_path / "b.czi", series=number)
        np.testing.assert_array_equal(scene.read(1, (0, 0), scene.shape), part)
    with pytest.raises(InputError, match=r"series of .*: expected a number from 0 to 1, got 2"):
        open_slide(tmp_path / "b.czi", series=2)
    (tmp_path / "b.czi").write_bytes(b"nothing")
    with pytest.raises(ReadError, match="expected a CZI file"):
        open_slide(tmp_path / "b.czi")
