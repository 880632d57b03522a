"""Shards that are missing, cut, zeroed or changed: each is named, and no reader takes them for background."""

import json
import random
import shutil

import numpy as np
import pytest
import tensorstore

from muvit.data.pyramids.convert import convert_image
from muvit.data.pyramids.manifest import ShardDigest, check_store, read_manifest
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.data.slides.open import open_slide
from muvit.errors import MuViTError, ReadError

SIZE = {"chunk": 8, "shard": 16}
FAULTS = ("missing", "cut", "longer", "zeroed", "flipped", "swapped", "extra")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """An image, labels with empty shards, and a volume, with their pixels at each level."""
    folder, draw = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    image = draw.integers(1, 256, (2, 50, 40), dtype=np.uint8)
    labels = np.zeros((1, 60, 50), np.uint8)
    labels[:, :20, :20] = draw.integers(1, 3, (1, 20, 20))
    volume = draw.integers(0, 2**16, (1, 20, 40, 20), dtype=np.uint16)
    made = {}
    for name, pixels, kind in (("image", image, "image"), ("labels", labels, "label"), ("volume", volume, "image")):
        writer = PyramidWriter.create(
            folder / name, shape=pixels.shape[1:], num_channels=len(pixels), dtype=pixels.dtype, kind=kind,
            levels=(1, 2), **SIZE,
        )  # fmt: skip
        writer.write((0,) * (pixels.ndim - 1), pixels)
        writer.finish()
        made[folder / name] = whole(OmeZarrSlide(folder / name))
    return made


def whole(slide):
    return [slide.read(level, (0,) * slide.ndim, slide.level_shape(level)) for level in slide.levels]


def shards(store):
    return sorted(path for path in store.glob("*/c/**/*") if path.is_file())


def damage(store, fault, draw):
    """Do something to one shard; returns its file."""
    file = draw.choice(shards(store))
    content = file.read_bytes()
    if fault == "missing":
        file.unlink()
    elif fault == "cut":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif fault == "longer":
        file.write_bytes(content + bytes(draw.randint(1, 9)))
    elif fault == "zeroed":
        file.write_bytes(bytes(len(content)))
    elif fault == "flipped":
        place = draw.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
    elif fault == "swapped":  # with another of the same size, if there is one, or of another size
        other = draw.choice([path for path in shards(store) if path.read_bytes() != content] or [file])
        file.write_bytes(other.read_bytes() if other != file else content[::-1])
    else:  # a shard where all pixels are 0, which has no file
        empty = list(empty_shards(store))
        file = draw.choice(empty) if empty else file.with_name("7")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return file, content


def empty_shards(store):
    for level, record in read_manifest(store).items():
        grid = json.loads((store / level / "zarr.json").read_text())
        counts = [
            -(-n // s) for n, s in zip(grid["shape"], grid["chunk_grid"]["configuration"]["chunk_shape"], strict=True)
        ]
        for index, digest in zip(np.ndindex(*counts), record.shards, strict=True):
            if digest.size == 0:
                yield (store / level / "c").joinpath(*map(str, index))


def check_case(stores, folder, fault, seed):
    draw = random.Random(f"{fault} {seed}")
    name = "labels" if fault == "extra" else draw.choice(["image", "labels", "volume"])
    source, pixels = next((path, levels) for path, levels in stores.items() if path.name == name)
    store = folder / f"{fault}{seed}"
    shutil.copytree(source, store)
    assert check_store(store, checksums=True)
    opened = OmeZarrSlide(store)
    file, content = damage(store, fault, draw)
    with pytest.raises(ReadError) as caught:
        check_store(store, checksums=True)
    assert str(caught.value).startswith(f"{file}: expected ")
    for slide in (lambda: opened, lambda: open_slide(store)):  # opened before, and after
        try:
            found = whole(slide())
        except ReadError as error:
            assert str(store) in str(error)
        else:  # only the checksum of the whole file tells: what was flipped holds no pixel, or two shards are alike
            assert fault in ("flipped", "swapped") and file.stat().st_size == len(content)
            assert fault == "swapped" or all(map(np.array_equal, found, pixels))


@pytest.mark.parametrize("fault", FAULTS)
def test_no_damaged_shard_is_read(stores, tmp_path, fault):
    check_case(stores, tmp_path, fault, 0)


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_no_damaged_shard_is_read_in_two_hundred_cases(stores, tmp_path, fault):
    for seed in range(1, 30):
        check_case(stores, tmp_path, fault, seed)


def test_a_store_of_which_much_is_missing_is_refused_when_it_is_opened(stores, tmp_path):
    source = next(iter(stores))
    shutil.copytree(source, tmp_path / "a.ome.zarr")
    shutil.rmtree(tmp_path / "a.ome.zarr" / "0" / "c")
    with pytest.raises(
        ReadError, match=r"0/c/0/0/0: expected a shard of \d+ bytes, got nothing there, and 11 more of 12"
    ):
        open_slide(tmp_path / "a.ome.zarr")
    with pytest.raises(ReadError, match="Restore it from a copy"):
        convert_image(tmp_path / "a.ome.zarr", tmp_path / "b.ome.zarr")
    assert not (tmp_path / "b.ome.zarr").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2, 40, 40]}, r"0/zarr\.json: expected the metadata that were written, got others"),
        ({"fill_value": 7}, r"0/zarr\.json: expected the metadata that were written"),
        ({"data_type": "int8"}, r"0/zarr\.json: expected the metadata that were written"),
        ({"codecs": []}, r"0/zarr\.json: expected the metadata that were written"),
    ],
)
def test_changed_metadata_of_a_level_are_refused(stores, tmp_path, change, message):
    shutil.copytree(next(iter(stores)), tmp_path / "a.ome.zarr")
    file = tmp_path / "a.ome.zarr" / "0" / "zarr.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "attributes": {"note": "from other software"}}))
    whole(open_slide(tmp_path / "a.ome.zarr"))
    file.write_text(json.dumps(content | change))
    with pytest.raises(ReadError, match=message):
        open_slide(tmp_path / "a.ome.zarr")


@pytest.mark.parametrize("record", [3, {"0": 3}, {"0": {"metadata": "", "shards": "x:y"}}, {"0": {}}, {"../x": {}}])
def test_a_record_that_is_no_record_is_one_sentence(stores, tmp_path, record):
    shutil.copytree(next(iter(stores)), tmp_path / "a.ome.zarr")
    file = tmp_path / "a.ome.zarr" / "zarr.json"
    content = json.loads(file.read_text())
    content["attributes"]["muvit"]["manifest"] = record
    file.write_text(json.dumps(content))
    with pytest.raises(ReadError, match=r"a\.ome\.zarr"):
        open_slide(tmp_path / "a.ome.zarr")


def test_a_store_of_an_earlier_version_opens(stores, tmp_path):
    shutil.copytree(next(iter(stores)), tmp_path / "a.ome.zarr")
    file = tmp_path / "a.ome.zarr" / "zarr.json"
    content = json.loads(file.read_text())
    del content["attributes"]["muvit"]
    file.write_text(json.dumps(content))
    assert not check_store(tmp_path / "a.ome.zarr", checksums=True)
    assert all(map(np.array_equal, whole(open_slide(tmp_path / "a.ome.zarr")), next(iter(stores.values()))))


def test_the_record_is_the_same_however_the_pixels_were_written(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 40, 40), dtype=np.uint8)
    pixels[:, 16:32, :16] = 0
    described = []
    for name, steps in (("whole", [(0, 40)]), ("shards", [(0, 16), (16, 32), (32, 40)]), ("rows", [(0, 5), (5, 40)])):
        path = tmp_path / name / "a.ome.zarr"
        writer = PyramidWriter.create(path, shape=(40, 40), num_channels=1, dtype=np.uint8, levels=(1, 4), **SIZE)
        for a, b in steps:
            for c, d in steps:
                writer.write((a, c), pixels[:, a:b, c:d])
        PyramidWriter.open(path).finish() if name == "rows" else writer.finish()
        described.append((path / "zarr.json").read_bytes())
        assert read_manifest(path)["0"].shards[3] == ShardDigest(0, 0)
    assert len(set(described)) == 1


# -- stores of other software ------------------------------------------------------------------------------------------


def foreign(folder, pixels, *, levels=(1, 2), kind="image", scales=None):
    """An OME-Zarr image of zarr 2 with chunks of 8 pixels and no sharding."""
    datasets = []
    for number, level in enumerate(levels):
        array = pixels[..., ::level, ::level]
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(folder / f"s{number}")},
            "metadata": {
                "dtype": "|u1",
                "chunks": [8, 8],
                "shape": list(array.shape),
                "dimension_separator": "/",
                "fill_value": 0,
            },
        }
        tensorstore.open(spec, create=True).result().write(array).result()
        scale = {"type": "scale", "scale": [(scales or levels)[number]] * 2}
        datasets.append({"path": f"s{number}", "coordinateTransformations": [scale]})
    entry = {"version": "0.4", "axes": [{"name": "y"}, {"name": "x"}], "datasets": datasets}
    label = {"image-label": {}} if kind == "label" else {}
    (folder / ".zgroup").write_text('{"zarr_format": 2}')
    (folder / ".zattrs").write_text(json.dumps({"multiscales": [entry], **label}))


def test_missing_chunks_of_other_software_are_counted_and_a_missing_level_is_refused(tmp_path, caplog):
    foreign(tmp_path / "a.zarr", np.full((32, 24), 9, np.uint8))
    open_slide(tmp_path / "a.zarr")
    assert not caplog.text
    shutil.rmtree(tmp_path / "a.zarr" / "s0" / "1")
    slide = open_slide(tmp_path / "a.zarr")
    assert "a.zarr: chunks that are not stored are read as empty: 3 of 12 in s0" in caplog.text
    assert slide.read(1, (8, 0), (8, 24)).max() == 0
    for row in "01":
        shutil.rmtree(tmp_path / "a.zarr" / "s1" / row)
    with pytest.raises(
        ReadError, match=r"s1: expected chunks of an array, up to 4, got none\. .* copy the image again"
    ):
        open_slide(tmp_path / "a.zarr")


def test_labels_of_other_software_may_be_all_background_but_not_at_the_finest_level_alone(tmp_path):
    foreign(tmp_path / "a.zarr", np.zeros((32, 24), np.uint8), kind="label")
    assert open_slide(tmp_path / "a.zarr").read(1, (0, 0), (32, 24)).max() == 0
    labels = np.zeros((32, 24), np.uint8)
    labels[1, 1] = 1  # which every second pixel misses
    foreign(tmp_path / "b.zarr", labels, kind="label")
    open_slide(tmp_path / "b.zarr")
    labels[0, 0] = 1
    foreign(tmp_path / "c.zarr", labels, kind="label")
    shutil.rmtree(tmp_path / "c.zarr" / "s0" / "0")
    with pytest.raises(ReadError, match="s0: expected chunks"):
        open_slide(tmp_path / "c.zarr")


@pytest.mark.parametrize(("scales", "fits"), [((1, 2), True), ((1, 2.06), True), ((1, 2.5), False), ((1, 4), False)])
def test_a_shape_that_contradicts_its_scale_is_refused(tmp_path, scales, fits):
    foreign(tmp_path / "a.zarr", np.full((32, 48), 9, np.uint8), scales=scales)
    if fits:
        assert len(open_slide(tmp_path / "a.zarr").levels) == 2
        return
    with pytest.raises(MuViTError, match=r"a\.zarr, level .*: expected shape .*, as its factor gives, got \(16, 24\)"):
        open_slide(tmp_path / "a.zarr")
