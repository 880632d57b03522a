import pickle
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from memory_slide import MemorySlide
from PIL import Image

from muvit.data.slides import raster
from muvit.data.slides.formats import pyramid_factor, slide_name
from muvit.data.slides.open import open_slide
from muvit.data.slides.tiff import TiffSlide
from muvit.errors import InputError, ReadError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (3, 90, 70), dtype=np.uint8)
RGB_LAST = np.ascontiguousarray(RGB.transpose(1, 2, 0))
STACK = RNG.integers(0, 2**16, (5, 90, 70), dtype=np.uint16)
CHANNELS = RNG.integers(0, 2**16, (3, 5, 90, 70), dtype=np.uint16)

LAYOUTS = {
    "plain": {},
    "striped": {"rowsperstrip": 7, "compression": "lzw"},
    "tiled": {"tile": (32, 32)},
    "packed": {"tile": (32, 32), "compression": "zlib", "predictor": True},
    "big_endian": {"tile": (32, 32), "compression": "zlib", "byteorder": ">"},
}


def whole(slide):
    return slide.read(1, (0,) * slide.ndim, slide.shape)


# --- windows and padding


@st.composite
def windows(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    start = tuple(draw(st.integers(-25, 25)) for _ in shape)
    size = tuple(draw(st.integers(1, 30)) for _ in shape)
    return shape, start, size


@given(windows(), st.sampled_from([("zero", "constant"), ("edge", "edge"), ("reflect", "reflect")]))
def test_a_window_equals_the_slice_of_the_padded_image(window, modes):
    shape, start, size = window
    padding, numpy_mode = modes
    pixels = np.arange(1, 2 * np.prod(shape) + 1, dtype=np.int32).reshape(2, *shape)
    margin = 60
    padded = np.pad(pixels, [(0, 0)] + [(margin, margin)] * len(shape), mode=numpy_mode)
    expected = padded[(slice(None), *(slice(a + margin, a + margin + n) for a, n in zip(start, size, strict=True)))]
    got = MemorySlide({1: pixels}).read(1, start, size, padding=padding)
    assert got.dtype == pixels.dtype
    np.testing.assert_array_equal(got, expected)


def test_reflection_reads_no_more_pixels_than_the_window_has():
    slide = MemorySlide({1: np.zeros((1, 500, 400), np.uint8)})
    slide.read(1, (-900, 390), (64, 64), padding="reflect")
    assert all(n <= 64 for _, window in slide.windows for n in window)


def test_a_missing_level_names_file_level_and_what_is_stored():
    slide = MemorySlide({1: np.zeros((1, 8, 8)), 4: np.zeros((1, 2, 2))}, name="brain.tif")
    with pytest.raises(InputError, match=r"brain\.tif, level 8: expected one of its stored levels 1, 4.*muvit convert"):
        slide.read(8, (0, 0), (1, 1))


@pytest.mark.parametrize(("start", "size"), [((0,), (1, 1)), ((0, 0), (1, 0)), ((0, 0, 0), (1, 1, 1))])
def test_a_window_of_wrong_form_is_refused(start, size):
    with pytest.raises(InputError, match="window of m: expected start and size of 2 whole numbers"):
        MemorySlide({1: np.zeros((1, 8, 8))}, name="m").read(1, start, size)


def test_an_unknown_padding_is_refused():
    with pytest.raises(InputError, match="zero, edge, reflect"):
        MemorySlide({1: np.zeros((1, 8, 8))}).read(1, (-1, 0), (2, 2), padding="wrap")


@given(st.integers(1, 40), st.lists(st.integers(100, 5000), min_size=2, max_size=3), st.booleans())
def test_factors_of_level_shapes_rounded_down_or_up_are_whole(factor, shape, up):
    coarse = [-(-n // factor) if up else max(n // factor, 1) for n in shape]
    # the longest side must tell the factor apart from its neighbours
    if max(shape) >= 4 * factor**2:
        assert pyramid_factor(shape, coarse) == factor


def test_levels_that_are_not_coarsened_alike_have_no_factor():
    assert pyramid_factor((20, 512, 512), (20, 256, 256)) is None
    assert pyramid_factor((512, 512), (512, 100)) is None


@pytest.mark.parametrize("name", ["a.ome.zarr", "a.zarr", "a.ome.tif", "a.ome.tiff", "a.TIF", "a.png", "a.svs", "a"])
def test_the_name_leaves_out_image_suffixes(name):
    assert slide_name(Path("folder.d") / name) == "a"


# --- TIFF


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("pixels", "options", "expected"),
    [
        (RGB_LAST, {"photometric": "rgb"}, RGB),
        (RGB, {"photometric": "rgb", "planarconfig": "separate"}, RGB),
        (np.dstack([RGB_LAST, RGB_LAST[..., :1]]), {"photometric": "rgb", "extrasamples": ["unassalpha"]}, RGB),
        (STACK, {"photometric": "minisblack"}, STACK[None]),
        (CHANNELS, {"photometric": "minisblack", "ome": True, "metadata": {"axes": "CZYX"}}, CHANNELS),
        (
            CHANNELS.transpose(1, 0, 2, 3),
            {"photometric": "minisblack", "ome": True, "metadata": {"axes": "ZCYX"}},
            CHANNELS,
        ),
        (STACK[0].astype(np.float32), {}, STACK[:1].astype(np.float32)),
    ],
    ids=["rgb", "planar", "rgba", "stack", "ome-czyx", "ome-zcyx", "float"],
)
def test_tiff_windows_equal_the_written_pixels(tmp_path, layout, pixels, options, expected):
    if pixels.dtype == np.float32 and "predictor" in LAYOUTS[layout]:
        options = {**options, "predictor": 3}
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, pixels, **{**LAYOUTS[layout], **options})
    slide = open_slide(file)
    assert (slide.shape, slide.num_channels, slide.dtype) == (expected.shape[1:], len(expected), expected.dtype)
    np.testing.assert_array_equal(whole(slide), expected)
    start, size = tuple(n // 3 for n in slide.shape), tuple(n // 2 for n in slide.shape)
    inside = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    np.testing.assert_array_equal(slide.read(1, start, size), expected[(slice(None), *inside)])


def test_a_time_series_keeps_its_axis(tmp_path):
    tifffile.imwrite(tmp_path / "a.ome.tif", STACK, ome=True, metadata={"axes": "TYX"}, photometric="minisblack")
    slide = open_slide(tmp_path / "a.ome.tif")
    assert (slide.axes, slide.shape) == ("tyx", (5, 90, 70))


def test_ome_tiff_states_pixel_size_and_channel_names(tmp_path):
    metadata = {
        "axes": "CZYX", "PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25, "PhysicalSizeZ": 2.0,
        "Channel": {"Name": ["DAPI", "GFP", "Cy5"]},
    }  # fmt: skip
    tifffile.imwrite(tmp_path / "a.ome.tif", CHANNELS, ome=True, metadata=metadata, photometric="minisblack")
    slide = open_slide(tmp_path / "a.ome.tif")
    assert slide.pixel_size_um == pytest.approx((2.0, 0.25, 0.25))
    assert slide.channel_names == ("DAPI", "GFP", "Cy5")


def test_imagej_stacks_state_their_pixel_size(tmp_path):
    options = {"imagej": True, "metadata": {"axes": "ZCYX", "unit": "um", "spacing": 3.0}, "resolution": (4, 2)}
    tifffile.imwrite(tmp_path / "a.tif", CHANNELS[:2].transpose(1, 0, 2, 3), **options)
    slide = open_slide(tmp_path / "a.tif")
    assert slide.pixel_size_um == pytest.approx((3.0, 0.5, 0.25))
    np.testing.assert_array_equal(whole(slide), CHANNELS[:2])


@pytest.mark.parametrize(
    ("resolution", "unit", "expected"),
    [(20000, "CENTIMETER", (0.5, 0.5)), (50800, "INCH", (0.5, 0.5)), (300, "INCH", None), (1, "NONE", None)],
)
def test_a_printers_resolution_is_no_pixel_size(tmp_path, resolution, unit, expected):
    tifffile.imwrite(tmp_path / "a.tif", STACK[0], resolution=(resolution, resolution), resolutionunit=unit)
    size = open_slide(tmp_path / "a.tif").pixel_size_um
    assert size == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("subifds", [True, False])
def test_tiff_pyramids_offer_their_levels(tmp_path, subifds):
    file = tmp_path / ("a.ome.tif" if subifds else "a.tif")
    with tifffile.TiffWriter(file, ome=subifds) as tif:
        extra = {"subifds": 2, "metadata": {"axes": "YXS"}} if subifds else {"metadata": None}
        tif.write(RGB_LAST, tile=(32, 32), **extra)
        for factor in (2, 4):
            part = RGB_LAST[::factor, ::factor]
            tif.write(part, tile=(32, 32), **({"subfiletype": 1} if subifds else {"metadata": None}))
        if not subifds:
            # a macro picture of another aspect is no level
            tif.write(RGB_LAST[:20, :60], metadata=None)
    slide = open_slide(file)
    assert slide.levels == (1, 2, 4)
    assert slide.level_shape(4) == (23, 18)
    np.testing.assert_array_equal(slide.read(4, (3, 2), (15, 16)), RGB[:, ::4, ::4][:, 3:18, 2:18])


def test_colour_tables_give_colours_or_indices(tmp_path):
    indices = (RGB_LAST[..., 0] % 7).astype(np.uint8)
    table = RNG.integers(0, 256, (3, 256), dtype=np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif", indices, photometric="palette", colormap=table.astype(np.uint16) << 8, compression="zlib"
    )
    image = Image.fromarray(indices)
    image.putpalette(table.T.tobytes())
    image.save(tmp_path / "a.png")
    for name in ("a.tif", "a.png"):
        np.testing.assert_array_equal(whole(open_slide(tmp_path / name)), table[:, indices])
        np.testing.assert_array_equal(whole(open_slide(tmp_path / name, palette="index")), indices[None])


def test_bilevel_tiffs_are_zero_and_one(tmp_path):
    mask = RGB_LAST[..., 0] > 128
    tifffile.imwrite(tmp_path / "a.tif", mask)
    slide = open_slide(tmp_path / "a.tif")
    assert slide.dtype == np.uint8
    np.testing.assert_array_equal(whole(slide), mask[None])


# --- PNG and JPEG


def test_png_pixels_come_as_stored_without_alpha(tmp_path):
    alpha = np.zeros((90, 70, 1), np.uint8)
    cases = {
        "grey": (Image.fromarray(RGB_LAST[..., 0]), RGB[:1]),
        "rgb": (Image.fromarray(RGB_LAST), RGB),
        "rgba": (Image.fromarray(np.dstack([RGB_LAST, alpha])), RGB),
        "grey_alpha": (Image.fromarray(np.dstack([RGB_LAST[..., :1], alpha])), RGB[:1]),
        "grey16": (Image.fromarray(STACK[0]), STACK[:1]),
        "bilevel": (Image.fromarray(RGB_LAST[..., 0] > 99), (RGB[:1] > 99).astype(np.uint8)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / f"{name}.png")
        slide = open_slide(tmp_path / f"{name}.png")
        assert slide.dtype == expected.dtype
        np.testing.assert_array_equal(
            slide.read(1, (-3, 5), (50, 40)), np.pad(expected, [(0, 0), (3, 0), (0, 0)])[:, :50, 5:45]
        )


def test_colour_pngs_of_16_bits_keep_them(tmp_path):
    deep = np.ascontiguousarray(STACK[:3].transpose(1, 2, 0))
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(deep))
    np.testing.assert_array_equal(whole(open_slide(tmp_path / "a.png")), STACK[:3])


def test_images_beyond_pillows_limit_open(tmp_path, monkeypatch):
    Image.fromarray(RGB_LAST).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    np.testing.assert_array_equal(whole(open_slide(tmp_path / "a.png")), RGB)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_decoded_pngs_are_let_go_when_they_get_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(raster, "_DECODED_BYTES", 3 * 90 * 70)
    slides = []
    for number in range(5):
        Image.fromarray(RGB_LAST[..., 0]).save(tmp_path / f"{number}.png")
        slides.append(open_slide(tmp_path / f"{number}.png"))
        whole(slides[-1])
    assert [slide._decoded is not None for slide in slides] == [False, False, True, True, True]
    np.testing.assert_array_equal(whole(slides[0]), RGB[:1])


@pytest.mark.parametrize("window", [((0, 0), (90, 70)), ((50, 10), (30, 40)), ((3, 60), (20, 20))])
def test_large_files_are_streamed(tmp_path, monkeypatch, caplog, window):
    deep = np.ascontiguousarray(STACK[:3].transpose(1, 2, 0))
    (tmp_path / "deep.png").write_bytes(imagecodecs.png_encode(deep))
    images = {
        "grey": Image.fromarray(RGB_LAST[..., 0]),
        "rgba": Image.fromarray(np.dstack([RGB_LAST, RGB_LAST[..., :1]])),
        "table": Image.fromarray(RGB_LAST).quantize(16),
        "bilevel": Image.fromarray(RGB_LAST[..., 0] > 99),
        "grey16": Image.fromarray(STACK[0]),
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
    smooth = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8)[:, None, None], (1, 70, 3)))
    smooth.save(tmp_path / "a.jpg", quality=95)
    files = sorted(file for file in tmp_path.iterdir())
    whole_ones = [open_slide(file).read(1, *window) for file in files]
    caplog.clear()
    monkeypatch.setattr(raster, "_DECODED_BYTES", 10)
    for file, expected in zip(files, whole_ones, strict=True):
        slide = pickle.loads(pickle.dumps(open_slide(file)))
        streamed = slide.read(1, *window)
        assert slide._decoded is None and streamed.dtype == expected.dtype
        np.testing.assert_allclose(streamed, expected, rtol=0, atol=1 if file.suffix == ".jpg" else 0)
    assert len(caplog.messages) == len(files) and "streamed from its first row on" in caplog.text


def test_a_broken_streamed_file_is_named(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(raster, "_DECODED_BYTES", 10)
    with pytest.raises(ReadError, match=r"a\.jpg, level 1, window .* expected readable pixels"):
        open_slide(tmp_path / "a.jpg").read(1, (0, 0), (300, 400))


# --- whole-slide formats


@pytest.fixture
def aperio(tmp_path):
    tile = {"tile": (256, 256), "photometric": "rgb", "metadata": None}
    picture = RNG.integers(0, 256, (512, 768, 3), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.svs") as tif:
        tif.write(picture, description="Aperio Image Library v1.0\n768x512|AppMag = 20|MPP = 0.5", **tile)
        tif.write(picture[:100, :150], photometric="rgb", rowsperstrip=100, metadata=None)
        tif.write(picture[::4, ::4], description="Aperio Image Library", **tile)
    return tmp_path / "a.svs", picture.transpose(2, 0, 1)


def test_openslide_formats(aperio):
    file, picture = aperio
    slide = open_slide(file)
    assert (slide.shape, slide.levels, slide.pixel_size_um, slide.bounds) == ((512, 768), (1, 4), (0.5, 0.5), None)
    np.testing.assert_array_equal(slide.read(1, (100, -10), (200, 300))[..., 10:], picture[:, 100:300, :290])
    np.testing.assert_array_equal(slide.read(4, (20, 30), (64, 64)), picture[:, ::4, ::4][:, 20:84, 30:94])


# --- sharing and bad files


def test_slides_survive_pickling(tmp_path, aperio):
    tifffile.imwrite(tmp_path / "a.tif", RGB_LAST, tile=(32, 32), compression="zlib")
    Image.fromarray(RGB_LAST).save(tmp_path / "a.png")
    for file in (tmp_path / "a.tif", tmp_path / "a.png", aperio[0]):
        slide = open_slide(file)
        before = whole(slide)
        copy = pickle.loads(pickle.dumps(slide))
        assert copy.path == file
        np.testing.assert_array_equal(whole(copy), before)


FORKED = """
import multiprocessing, sys
import numpy as np
from muvit.data.slides.open import open_slide
slides = [open_slide(file) for file in sys.argv[1:]]
def windows(seed):
    rng = np.random.default_rng(seed)
    starts = [[int(v) for v in rng.integers(0, 40, 2)] for _ in range(50)]
    return [slide.read(1, start, (30, 30)).tobytes() for start in starts for slide in slides]
expected = [windows(seed) for seed in range(4)]
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(windows, range(4)) == expected
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system cannot fork")
def test_slides_opened_and_read_before_a_fork_are_right_in_the_workers(tmp_path, aperio):
    tifffile.imwrite(tmp_path / "a.tif", RGB_LAST, tile=(32, 32), compression="zlib")
    tifffile.imwrite(tmp_path / "b.tif", RGB_LAST)
    Image.fromarray(RGB_LAST).save(tmp_path / "a.png")
    files = [tmp_path / "a.tif", tmp_path / "b.tif", tmp_path / "a.png", aperio[0]]
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED, *map(str, files)], check=True, timeout=60)


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg", "a.svs", "a.txt"])
def test_foreign_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no image at all")
    with pytest.raises(ReadError, match=rf"{name}: expected "):
        open_slide(tmp_path / name)


def test_missing_files_and_plain_folders_are_refused(tmp_path):
    with pytest.raises(ReadError, match=r"gone\.tif: expected an image file or an OME-Zarr folder, got nothing there"):
        open_slide(tmp_path / "gone.tif")
    with pytest.raises(ReadError, match="got a folder without zarr metadata"):
        open_slide(tmp_path)


@pytest.mark.parametrize("layout", ["plain", "tiled", "striped"])
def test_a_truncated_tiff_is_refused_at_opening(tmp_path, layout):
    tifffile.imwrite(tmp_path / "a.tif", RGB_LAST, **LAYOUTS[layout])
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[: len(data) // 2])
    with pytest.raises(ReadError, match=r"a\.tif"):
        TiffSlide(tmp_path / "a.tif")


def test_damaged_pixels_are_refused_with_file_level_and_window(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RGB_LAST, tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        offset = tif.pages[0].dataoffsets[0]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[offset : offset + 40] = bytes(40)
    (tmp_path / "a.tif").write_bytes(data)
    slide = open_slide(tmp_path / "a.tif")
    message = r"a\.tif, level 1, window \(0, 0\) to \(8, 8\): expected readable pixels, got .* chunk 0 .* is corrupt"
    with pytest.raises(ReadError, match=message):
        slide.read(1, (0, 0), (8, 8))
    np.testing.assert_array_equal(slide.read(1, (32, 32), (8, 8)), RGB[:, 32:40, 32:40])


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_truncated_raster_is_refused_when_read(tmp_path, name):
    Image.fromarray(RGB_LAST).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ReadError, match=name):
        whole(open_slide(tmp_path / name))
