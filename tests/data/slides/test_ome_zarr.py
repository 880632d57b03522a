import itertools
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorstore
import yaozarrs
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from muvit.data.pyramids.arrays import ShardedArray, TensorStoreArray, crc32c, open_array
from muvit.data.pyramids.convert import convert_image
from muvit.data.pyramids.reduction import area_mean, majority
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.data.slides.open import open_slide
from muvit.errors import ExistsError, InputError, ReadError

RNG = np.random.default_rng(0)
SMALL = {"chunk": 16, "shard": 32}


def write(path, pixels, **options):
    """A finished store of these pixels, written shard by shard."""
    options = {"shape": pixels.shape[1:], "num_channels": len(pixels), "dtype": pixels.dtype, **SMALL, **options}
    writer = PyramidWriter.create(path, **options)
    for start, size in writer.shards():
        writer.write(start, pixels[(slice(None), *(slice(a, a + n) for a, n in zip(start, size, strict=True)))])
    writer.finish()
    return OmeZarrSlide(path)


def whole(slide, level=1):
    return slide.read(level, (0,) * slide.ndim, slide.level_shape(level))


def blocks(pixels, factor):
    """Index of every output pixel, and the input pixels that it stands for."""
    for index in itertools.product(*(range(-(-n // factor)) for n in pixels.shape[1:])):
        yield index, pixels[(slice(None), *(slice(i * factor, (i + 1) * factor) for i in index))]


# --- reduction

arrays = st.tuples(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int16, np.int32]),
        st.lists(st.integers(1, 9), min_size=2, max_size=3).map(lambda shape: (2, *shape)),
    ),
    st.integers(1, 4),
)


@given(arrays)
def test_area_mean_is_the_rounded_mean_of_every_block(case):
    pixels, factor = case
    reduced = area_mean(pixels, factor)
    assert reduced.dtype == pixels.dtype
    assert reduced.shape[1:] == tuple(-(-n // factor) for n in pixels.shape[1:])
    for index, block in blocks(pixels, factor):
        for channel in range(2):
            values = [int(v) for v in block[channel].flat]
            assert reduced[(channel, *index)] == (2 * sum(values) + len(values)) // (2 * len(values))


@given(arrays)
def test_area_mean_of_floats_is_the_mean_of_every_block(case):
    pixels, factor = case
    pixels = pixels.astype(np.float64)
    reduced = area_mean(pixels, factor)
    for index, block in blocks(pixels, factor):
        np.testing.assert_allclose(reduced[(slice(None), *index)], block.reshape(2, -1).mean(1), rtol=1e-12)


# --- round trips

CASES = {
    "rgb": ((3, 75, 90), np.uint8, {}),
    "grey_float": ((1, 64, 32), np.float32, {"levels": (1, 4, 8)}),
    "channels_16_bit": ((5, 40, 33), np.uint16, {"channel_names": tuple("abcde")}),
    "volume": ((2, 20, 35, 40), np.uint16, {"levels": (1, 2)}),
    "time": ((2, 6, 35, 40), np.uint8, {"levels": (1,), "axes": "tyx", "pixel_size_um": (30, 0.5, 0.5)}),
    "volume_in_time": ((2, 3, 10, 35, 40), np.uint8, {"levels": (1, 2)}),
    "ragged_levels": ((1, 100, 71), np.uint8, {"levels": (1, 3, 9)}),
    "one_pixel": ((1, 1, 1), np.uint8, {}),
}


def random_pixels(shape, dtype):
    top = 200 if np.dtype(dtype).itemsize == 1 else 60000
    return (RNG.random(shape) * top).astype(dtype)


@pytest.mark.parametrize("case", CASES)
def test_every_level_round_trips_and_holds_the_mean_of_the_one_before(tmp_path, case):
    shape, dtype, options = CASES[case]
    pixels = random_pixels(shape, dtype)
    slide = write(tmp_path / "a.ome.zarr", pixels, **options)
    assert slide.axes == options.get("axes", "tzyx"[-len(slide.shape) :])
    assert slide.pixel_size_um == options.get("pixel_size_um")
    assert (slide.name, slide.shape, slide.num_channels, slide.dtype) == ("a", shape[1:], shape[0], np.dtype(dtype))
    np.testing.assert_array_equal(whole(slide), pixels)
    for finer, coarser in itertools.pairwise(slide.levels):
        np.testing.assert_array_equal(whole(slide, coarser), area_mean(whole(slide, finer), int(coarser / finer)))
    assert all(shift == 0 for shifts in slide.level_shifts for shift in shifts)
    yaozarrs.validate_zarr_store(tmp_path / "a.ome.zarr")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64])
def test_label_images_keep_values_names_and_colours(tmp_path, dtype):
    labels = RNG.integers(0, 100, (1, 75, 90)).astype(dtype)
    names, colors = {0: "background", 7: "axon ☂"}, {7: (255, 0, 10), 9: (1, 2, 3, 128)}
    slide = write(
        tmp_path / "a.ome.zarr", labels, kind="label", label_names=names, label_colors=colors, pixel_size_um=0.5
    )
    np.testing.assert_array_equal(whole(slide), labels)
    for level in slide.levels:
        np.testing.assert_array_equal(whole(slide, level), majority(labels, int(level)))
    assert slide.label_names == names
    assert slide.label_colors == {7: (255, 0, 10, 255), 9: (1, 2, 3, 128)}
    metadata = yaozarrs.validate_zarr_store(tmp_path / "a.ome.zarr").ome_metadata()
    assert [axis.name for axis in metadata.multiscales[0].axes] == ["y", "x"]
    entry = json.loads((tmp_path / "a.ome.zarr/zarr.json").read_text())["attributes"]["ome"]["image-label"]
    assert all(type(item["label-value"]) is int for item in entry["colors"] + entry["properties"])


def test_metadata_state_sizes_shifts_and_channels(tmp_path):
    slide = write(tmp_path / "a.ome.zarr", random_pixels((3, 64, 64), np.uint8), pixel_size_um=(0.5, 0.25))
    assert slide.pixel_size_um == (0.5, 0.25)
    assert slide.channel_names == ("red", "green", "blue")
    ome = json.loads((tmp_path / "a.ome.zarr/zarr.json").read_text())["attributes"]["ome"]
    # level 4: pixels of 4 x 0.5 um, the first one's centre 1.5 finest pixels in
    assert ome["multiscales"][0]["datasets"][2]["coordinateTransformations"] == [
        {"type": "scale", "scale": [1.0, 2.0, 1.0]},
        {"type": "translation", "translation": [0.0, 0.75, 0.375]},
    ]
    assert [(c["color"], c["window"]["end"]) for c in ome["omero"]["channels"]] == [
        ("FF0000", 255), ("00FF00", 255), ("0000FF", 255)
    ]  # fmt: skip


def test_files_are_few_compressed_and_checked(tmp_path):
    write(tmp_path / "a.ome.zarr", random_pixels((3, 600, 500), np.uint8), levels=(1,), chunk=None, shard=None)
    assert [p.name for p in (tmp_path / "a.ome.zarr/0/c").rglob("*") if p.is_file()] == ["0"]
    array = json.loads((tmp_path / "a.ome.zarr/0/zarr.json").read_text())
    sharding = array["codecs"][0]["configuration"]
    assert array["chunk_grid"]["configuration"]["chunk_shape"] == [3, 768, 512]
    assert sharding["chunk_shape"] == [3, 256, 256]
    assert [codec["name"] for codec in sharding["codecs"]] == ["bytes", "zstd", "crc32c"]
    assert sharding["codecs"][1]["configuration"]["level"] == 1
    assert sharding["index_codecs"][-1]["name"] == "crc32c"
    assert array["dimension_names"] == ["c", "y", "x"]


def test_a_default_shard_of_many_channels_stays_within_memory(tmp_path):
    writer = PyramidWriter.create(tmp_path / "a.zarr", shape=(9000, 9000), num_channels=40, dtype=np.uint16)
    assert writer.spec.num_bytes(writer.spec.shard_shape(0)) <= 256 << 20
    assert writer.spec.shard % writer.spec.chunk == 0


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    pixels = random_pixels((2, 150, 130), np.uint16)
    # chunks of zeros are not stored at all
    pixels[:, 40:100, 20:90] = 0
    folder = tmp_path_factory.mktemp("store") / "a.ome.zarr"
    write(folder, pixels, levels=(1,))
    return folder, pixels


@given(data=st.data())
def test_own_reader_tensorstore_and_slices_agree_on_every_window(stored, data):
    folder, pixels = stored
    bounds = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in (150, 130)]
    start, stop = (0, *(a for a, _ in bounds)), (2, *(b for _, b in bounds))
    expected = pixels[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    own = open_array(folder / "0", 3)
    assert isinstance(own, ShardedArray)
    np.testing.assert_array_equal(own.read(start, stop), expected)
    other = TensorStoreArray(folder / "0", 3, own.shape, own.dtype).request(start, stop)
    np.testing.assert_array_equal(other(), expected)


@settings(max_examples=20)
@given(data=st.data())
def test_blocks_of_any_size_and_order_make_the_same_image(tmp_path_factory, data):
    pixels = random_pixels((1, 50, 40), np.uint8)
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(1, n - 1), max_size=2))}) for n in (50, 40)]
    pieces = list(itertools.product(*(itertools.pairwise(cut) for cut in cuts)))
    folder = tmp_path_factory.mktemp("blocks") / "a.ome.zarr"
    writer = PyramidWriter.create(folder, shape=(50, 40), num_channels=1, dtype=np.uint8, **SMALL)
    for (y0, y1), (x0, x1) in data.draw(st.permutations(pieces)):
        writer.write((y0, x0), pixels[:, y0:y1, x0:x1])
    writer.finish()
    np.testing.assert_array_equal(whole(OmeZarrSlide(folder)), pixels)


def test_crc32c_of_the_standard_check_value():
    assert crc32c(b"123456789") == 0xE3069283


# --- several processes

WRITE_PART = """
import pickle, sys
import numpy as np
writer = pickle.loads(bytes.fromhex(sys.argv[1]))
part = int(sys.argv[2])
for number, (start, size) in enumerate(writer.shards()):
    if number % 2 == part:
        writer.write(start, np.full((1, *size), number + 1, np.uint8))
"""


def test_processes_write_disjoint_shards_of_one_store(tmp_path):
    folder = tmp_path / "a.ome.zarr"
    writer = PyramidWriter.create(folder, shape=(90, 70), num_channels=1, dtype=np.uint8, **SMALL)
    handle = pickle.dumps(writer).hex()
    parts = [subprocess.Popen([sys.executable, "-c", WRITE_PART, handle, str(part)]) for part in (0, 1)]
    assert [part.wait(timeout=60) for part in parts] == [0, 0]
    PyramidWriter.open(folder).finish()
    slide = OmeZarrSlide(folder)
    for number, (start, size) in enumerate(writer.shards()):
        assert (slide.read(1, start, size) == number + 1).all()


FORK_AFTER_WRITING = """
import multiprocessing, sys
import numpy as np
from muvit.data.slides.ome_zarr import OmeZarrSlide, PyramidWriter
from muvit.errors import MuViTError
pixels = np.random.default_rng(0).integers(0, 255, (1, 90, 90), dtype=np.uint8)
writer = PyramidWriter.create(sys.argv[1], shape=(90, 90), num_channels=1, dtype="uint8", chunk=16, shard=32)
writer.write((0, 0), pixels)
writer.finish()
slide = OmeZarrSlide(sys.argv[1])
slide.read(1, (0, 0), (90, 90))
def read(start):
    return np.array_equal(slide.read(1, (start, start), (40, 40)), pixels[:, start:start + 40, start:start + 40])
def refused(_):
    try:
        writer.write((0, 0), pixels)
    except MuViTError as error:
        return "forked" in str(error)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(pool.map(read, range(50)))
    assert all(pool.map(refused, range(2)))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system cannot fork")
def test_forked_workers_read_although_their_parent_has_written(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FORK_AFTER_WRITING, str(tmp_path / "a.ome.zarr")]
    subprocess.run(command, check=True, timeout=60)


# --- unfinished, existing, wrong


def test_an_unfinished_store_is_refused_until_it_is_finished(tmp_path):
    folder = tmp_path / "a.ome.zarr"
    writer = PyramidWriter.create(folder, shape=(50, 40), num_channels=1, dtype=np.uint8, **SMALL)
    writer.write((0, 0), np.ones((1, 50, 40), np.uint8))
    with pytest.raises(ReadError, match=r"a\.ome\.zarr: expected a finished OME-Zarr image, got an unfinished one"):
        open_slide(folder)
    steps = []
    PyramidWriter.open(folder).finish(lambda done, total: steps.append((done, total)))
    assert steps == [(i + 1, writer.num_coarse_shards) for i in range(writer.num_coarse_shards)]
    assert (whole(open_slide(folder), 2) == 1).all()
    with pytest.raises(ReadError, match="expected an unfinished OME-Zarr store, got a finished one"):
        PyramidWriter.open(folder)
    with pytest.raises(InputError, match="expected an unfinished store, got a finished one"):
        writer.write((0, 0), np.zeros((1, 50, 40), np.uint8))


def test_a_crash_while_building_levels_leaves_a_refused_store_that_can_be_finished(tmp_path):
    folder = tmp_path / "a.ome.zarr"
    pixels = random_pixels((1, 70, 70), np.uint8)
    writer = PyramidWriter.create(folder, shape=(70, 70), num_channels=1, dtype=np.uint8, **SMALL)
    writer.write((0, 0), pixels)

    def crash(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.finish(crash)
    with pytest.raises(ReadError, match="unfinished"):
        open_slide(folder)
    PyramidWriter.open(folder).finish()
    np.testing.assert_array_equal(whole(open_slide(folder), 2), area_mean(pixels, 2))


def test_existing_output_is_replaced_only_when_asked_and_only_if_it_is_a_store(tmp_path):
    folder = tmp_path / "a.ome.zarr"
    old = random_pixels((1, 20, 20), np.uint8)
    write(folder, old)
    with pytest.raises(ExistsError, match=r"a\.ome\.zarr: exists already"):
        write(folder, old)
    np.testing.assert_array_equal(whole(OmeZarrSlide(folder)), old)
    new = random_pixels((1, 30, 30), np.uint8)
    np.testing.assert_array_equal(whole(write(folder, new, overwrite=True)), new)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("years of work")
    with pytest.raises(ExistsError, match="no OME-Zarr store"):
        write(tmp_path / "notes", new, overwrite=True)
    assert (tmp_path / "notes/thesis.txt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": (1, 2, 3)}, "levels: expected whole numbers from 1 up"),
        ({"levels": (2, 4)}, "levels: expected"),
        ({"levels": (1, 2.5)}, "levels: expected"),
        ({"dtype": np.uint64}, "dtype of the image"),
        ({"kind": "label", "dtype": np.float32}, "dtype of the label"),
        ({"kind": "label", "num_channels": 2}, "num_channels: expected 1, got 2"),
        ({"kind": "mask"}, "kind: expected image or label"),
        ({"pixel_size_um": -1}, "pixel_size_um: expected one positive number, or 2"),
        ({"pixel_size_um": (1, 1, 1)}, "pixel_size_um: expected one positive number, or 2"),
        ({"channel_names": ["a", "b"]}, "channel_names: expected 1 names, got 2: a, b"),
        ({"label_colors": {3: (1, 2)}}, "colour of label 3"),
        ({"chunk": 24, "shard": 32}, "chunk and shard"),
        ({"shape": (5,)}, "shape: expected 2 to 4 positive numbers"),
        ({"axes": "zyx"}, "axes: expected one of"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, options, message):
    settings = {"shape": (20, 20), "num_channels": 1, "dtype": np.uint8, **options}
    with pytest.raises(InputError, match=message):
        PyramidWriter.create(tmp_path / "a.ome.zarr", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("start", "block", "message"),
    [
        ((0, 0), np.zeros((1, 5, 5), np.uint16), "expected dtype uint8, got uint16"),
        ((0, 0), np.zeros((2, 5, 5), np.uint8), "expected 1 channels"),
        ((0, 0), np.zeros((5, 5), np.uint8), "expected 1 channels"),
        ((16, 0), np.zeros((1, 5, 5), np.uint8), r"expected a block inside the image \(20, 20\)"),
        ((-1, 0), np.zeros((1, 5, 5), np.uint8), "expected a block inside the image"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(tmp_path, start, block, message):
    writer = PyramidWriter.create(tmp_path / "a.ome.zarr", shape=(20, 20), num_channels=1, dtype=np.uint8)
    with pytest.raises(InputError, match=message):
        writer.write(start, block)


# --- damage


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", ["chunk", "index", "truncated", "missing"])
def test_a_damaged_shard_is_refused_with_file_level_and_window(tmp_path, damage):
    write(tmp_path / "a.ome.zarr", random_pixels((1, 64, 64), np.uint8), levels=(1, 2))
    slide = OmeZarrSlide(tmp_path / "a.ome.zarr")
    shard = tmp_path / "a.ome.zarr/1/c/0/0/0"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:100])
    elif damage == "missing":
        shard.unlink()
    else:
        flip(shard, 50 if damage == "chunk" else -20)
    with pytest.raises(
        ReadError, match=r"a\.ome\.zarr, level 2, window \(0, 0\) to \(8, 8\): expected readable pixels"
    ):
        slide.read(2, (0, 0), (8, 8))
    slide.read(1, (0, 0), (8, 8))


def test_every_flipped_bit_of_the_pixels_is_noticed(tmp_path):
    write(tmp_path / "a.ome.zarr", random_pixels((1, 16, 16), np.uint8), levels=(1,))
    shard = tmp_path / "a.ome.zarr/0/c/0/0/0"
    frame = len(shard.read_bytes()) - (16 + 4) - 4  # less index, its checksum, and the chunk's crc32c
    for position in range(0, frame, 7):
        flip(shard, position)
        with pytest.raises(ReadError):
            whole(OmeZarrSlide(tmp_path / "a.ome.zarr"))
        flip(shard, position)
    whole(OmeZarrSlide(tmp_path / "a.ome.zarr"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "expected a readable JSON file"),
        ("[]", "expected a JSON object"),
        ('{"zarr_format": 3, "node_type": "group", "attributes": {}}', "no OME metadata"),
        (
            '{"attributes": {"ome": {"multiscales": [{"axes": [{"name": "y"}]}]}}}',
            "expected a complete NGFF multiscales",
        ),
    ],
)
def test_damaged_or_foreign_metadata_are_refused(tmp_path, content, message):
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(ReadError, match=message):
        open_slide(tmp_path)


def test_a_store_without_one_of_its_arrays_is_refused(tmp_path):
    write(tmp_path / "a.ome.zarr", random_pixels((1, 64, 64), np.uint8))
    (tmp_path / "a.ome.zarr/1/zarr.json").unlink()
    with pytest.raises(ReadError, match=r"a\.ome\.zarr/1: expected a zarr array with its zarr\.json"):
        open_slide(tmp_path / "a.ome.zarr")


# --- stores of other writers


def foreign(folder, pixels, axes, transforms, zarr_format=2, unit="micrometer"):
    """An NGFF 0.4 image on zarr v2, or 0.5 without shards; one array per entry of ``pixels``."""
    folder.mkdir()
    described = [{"name": a, **({"unit": unit} if a in "zyx" else {})} for a in axes]
    datasets = [{"path": f"s{i}", "coordinateTransformations": t} for i, t in enumerate(transforms)]
    entry = {"version": "0.4", "axes": described, "datasets": datasets}
    for i, array in enumerate(pixels):
        store = {"driver": "file", "path": str(folder / f"s{i}")}
        if zarr_format == 2:
            spec = {
                "driver": "zarr",
                "kvstore": store,
                "metadata": {"dtype": array.dtype.str, "chunks": [16] * array.ndim},
            }
            spec["metadata"]["shape"] = list(array.shape)
        else:
            spec = {
                "driver": "zarr3",
                "kvstore": store,
                "schema": {"dtype": array.dtype.name, "domain": {"shape": array.shape}},
            }
        tensorstore.open(spec, create=True).result().write(array).result()
    if zarr_format == 2:
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(json.dumps({"multiscales": [entry]}))
    else:
        content = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"ome": {"version": "0.5", "multiscales": [entry]}},
        }
        (folder / "zarr.json").write_text(json.dumps(content))


def scale(*factors):
    return {"type": "scale", "scale": list(factors)}


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_images_of_other_writers_open(tmp_path, zarr_format):
    pixels = RNG.integers(0, 2**16, (1, 2, 1, 40, 30)).astype(">u2" if zarr_format == 2 else np.uint16)
    levels = [pixels, pixels[..., ::2, ::2]]
    transforms = [[scale(1, 1, 1, 250, 250)], [scale(1, 1, 1, 500, 500)]]
    foreign(tmp_path / "a.zarr", levels, "tczyx", transforms, zarr_format, unit="nanometer")
    slide = open_slide(tmp_path / "a.zarr")
    assert (slide.shape, slide.num_channels, slide.levels) == ((40, 30), 2, (1, 2))
    assert slide.dtype == np.dtype(np.uint16)
    assert slide.pixel_size_um == pytest.approx((0.25, 0.25))
    np.testing.assert_array_equal(whole(slide), pixels[0, :, 0])
    np.testing.assert_array_equal(slide.read(2, (-1, 3), (5, 5))[:, 1:], levels[1][0, :, 0, :4, 3:8])


def test_shifted_levels_are_read_at_the_nearest_whole_pixel(tmp_path):
    pixels = RNG.integers(0, 255, (64, 64)).astype(np.uint8)
    coarse = [pixels[::2, ::2], pixels[::4, ::4]]
    transforms = [
        [scale(1, 1)],
        # as if strided: a quarter of a pixel before the block's centre
        [scale(2, 2), {"type": "translation", "translation": [0, 0]}],
        # three pixels of that level further down
        [scale(4, 4), {"type": "translation", "translation": [1.5 + 12, 1.5]}],
    ]
    foreign(tmp_path / "a.zarr", [pixels, *coarse], "yx", transforms)
    slide = OmeZarrSlide(tmp_path / "a.zarr")
    assert slide.level_shifts == ((0, 0), (-0.25, -0.25), (3, 0))
    np.testing.assert_array_equal(slide.read(2, (4, 4), (8, 8))[0], coarse[0][4:12, 4:12])
    np.testing.assert_array_equal(slide.read(4, (4, 4), (8, 8))[0], coarse[1][1:9, 4:12])


def test_levels_coarsened_in_planes_only_have_a_factor_for_each_axis(tmp_path):
    volume = RNG.integers(0, 255, (4, 20, 20)).astype(np.uint8)
    # the second one as if strided, and a plane further down
    transforms = [
        [scale(2, 1, 1)],
        [scale(2, 2, 2), {"type": "translation", "translation": [0, 0.5, 0.5]}],
        [scale(4, 4, 4), {"type": "translation", "translation": [5, 1.5, 1.5]}],
    ]
    levels = [volume, volume[:, ::2, ::2], volume[::2, ::4, ::4]]
    foreign(tmp_path / "a.zarr", levels, "zyx", transforms)
    slide = open_slide(tmp_path / "a.zarr")
    assert slide.levels == (1, (1, 2, 2), (2, 4, 4))
    assert slide.level_shape([1, 2, 2]) == (4, 10, 10)
    assert slide.level_shifts == ((0, 0, 0), (0, 0, 0), (1, 0, 0))
    np.testing.assert_array_equal(slide.read((1, 2, 2), (1, 2, 3), (2, 4, 5))[0], levels[1][1:3, 2:6, 3:8])
    np.testing.assert_array_equal(slide.read((2, 4, 4), (1, 0, 0), (1, 5, 5))[0], levels[2][:1])
    assert "(1.0, 2.0, 2.0)" not in repr(slide)
    assert "1, 1x2x2, 2x4x4" in repr(slide)
    with pytest.raises(InputError, match=r"level 1x4x4: expected one of its stored levels 1, 1x2x2, 2x4x4"):
        slide.read((1, 4, 4), (0, 0, 0), (1, 1, 1))


def test_pyramids_may_coarsen_each_axis_by_its_own_factor(tmp_path):
    levels = [1, (1, 2, 2), (2, 4, 4), (6, 4, 8)]
    volume, labels = random_pixels((2, 13, 50, 70), np.uint8), random_pixels((1, 13, 50, 70), np.uint8)
    for kind, pixels in (("image", volume), ("label", labels)):
        slide = write(tmp_path / f"{kind}.ome.zarr", pixels, levels=levels, kind=kind, chunk=16, shard=32)
        yaozarrs.validate_zarr_store(tmp_path / f"{kind}.ome.zarr")
        assert slide.levels == (1, (1, 2, 2), (2, 4, 4), (6, 4, 8))
        assert [slide.level_shape(level) for level in levels] == [(13, 50, 70), (13, 25, 35), (7, 13, 18), (3, 13, 9)]
        assert all(shift == (0, 0, 0) for shift in slide.level_shifts)
    image, label = (open_slide(tmp_path / f"{kind}.ome.zarr") for kind in ("image", "label"))
    for finer, coarser, factors in zip(levels, levels[1:], [(1, 2, 2), (2, 2, 2), (3, 1, 2)], strict=False):
        np.testing.assert_array_equal(whole(image, coarser), area_mean(whole(image, finer), factors))
    for level in levels[1:]:  # of labels each from the finest
        np.testing.assert_array_equal(whole(label, level), majority(labels, level))


def test_reduction_by_equal_factors_is_the_same_however_they_are_given():
    pixels = random_pixels((2, 9, 13, 11), np.uint8)
    for reduce in (area_mean, majority):
        np.testing.assert_array_equal(reduce(pixels, 3), reduce(pixels, (3, 3, 3)))
    # one axis after the other, where blocks are whole and nothing is rounded
    exact = pixels[:, :8, :12].astype(np.float64)
    np.testing.assert_allclose(area_mean(area_mean(exact, (1, 3, 1)), (2, 1, 1)), area_mean(exact, (2, 3, 1)))


def test_labels_tell_whether_0_is_background(tmp_path):
    labels = RNG.integers(0, 3, (1, 40, 40)).astype(np.uint8)
    for names in ({}, {0: "road", 1: "car"}):
        for has_background in (True, False):
            path = tmp_path / f"{len(names)}{has_background}.ome.zarr"
            slide = write(path, labels, kind="label", label_names=names, has_background=has_background)
            assert slide.has_background is has_background
            assert slide.label_names == names
            yaozarrs.validate_zarr_store(path)
    copied = convert_image(slide, tmp_path / "copy.ome.zarr", kind="label")
    assert not OmeZarrSlide(copied).has_background


def test_label_images_inside_an_image_are_found(tmp_path):
    image = write(tmp_path / "a.ome.zarr", random_pixels((3, 40, 40), np.uint8))
    assert image.labels() == ()
    labels = RNG.integers(0, 3, (1, 40, 40)).astype(np.uint8)
    for name in ("nuclei", "tissue"):
        write(tmp_path / "a.ome.zarr/labels" / name, labels, kind="label", label_names={1: name})
    yaozarrs.validate_zarr_store(tmp_path / "a.ome.zarr")
    assert image.labels() == ("nuclei", "tissue")
    assert image.label("tissue").label_names == {1: "tissue"}
    np.testing.assert_array_equal(whole(image.label("nuclei")), labels)
    with pytest.raises(InputError, match="nuclei, tissue"):
        image.label("cells")


def test_coordinate_systems_of_version_06_take_the_place_of_axes(tmp_path):
    image = write(
        tmp_path / "a.ome.zarr", RNG.integers(0, 99, (2, 40, 60)).astype(np.uint8), levels=(1, 2), pixel_size_um=0.5
    )
    file = tmp_path / "a.ome.zarr" / "zarr.json"
    content = json.loads(file.read_text())
    ome = content["attributes"]["ome"]
    (entry,) = ome["multiscales"]
    systems = [{"name": "other", "axes": []}, {"name": "physical", "axes": entry.pop("axes")}]
    for dataset in entry["datasets"]:
        steps = dataset["coordinateTransformations"]
        ends = {"input": {"path": dataset["path"]}, "output": {"name": "physical"}}
        dataset["coordinateTransformations"] = [{"type": "sequence", "transformations": steps, **ends}]
    ome["version"] = "0.6"
    turned = {"type": "rotation", "rotation": [[0, 1], [1, 0]], "input": "physical", "output": "other"}
    entry |= {"coordinateSystems": systems, "coordinateTransformations": [turned]}  # beyond the image's own system
    file.write_text(json.dumps(content))
    slide = open_slide(file.parent)
    assert (slide.axes, slide.levels, slide.pixel_size_um) == ("yx", (1, 2), (0.5, 0.5))
    assert slide.level_shifts == image.level_shifts
    np.testing.assert_array_equal(whole(slide, 2), whole(image, 2))
    entry["datasets"][1]["coordinateTransformations"] = [
        {**turned, "input": {"path": "1"}, "output": {"name": "physical"}}
    ]
    file.write_text(json.dumps(content))
    with pytest.raises(ReadError, match="a coordinate transformation of type 'rotation'"):
        open_slide(file.parent)
