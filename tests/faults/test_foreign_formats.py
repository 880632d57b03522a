"""Damaged files of other software: no traceback, and no silence about what their format can reveal."""

import json
import logging
import random
import shutil
from collections import Counter
from logging.handlers import BufferingHandler

import numpy as np
import pytest
import tensorstore
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter

from muvit.data.slides.open import open_slide
from muvit.errors import MuViTError

SIDE = 96
TILED = {"tile": (32, 32), "photometric": "rgb"}
TIFFS = {
    "TIFF": {},
    "TIFF, LZW": {"compression": "lzw"},
    "TIFF, deflate": {"compression": "zlib"},
    "TIFF, zstd": {"compression": "zstd"},
    "TIFF, JPEG": {"compression": "jpeg"},
    "SVS": {"compression": "jpeg", "description": "Aperio Image Library v1.0\n96x96|AppMag = 20|MPP = 0.5"},
}
BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}
ZARRS = {
    "Zarr 2": None,
    "Zarr 2, gzip": {"id": "gzip", "level": 5},
    "Zarr 2, blosc": BLOSC,
    "Zarr 2, zstd": {"id": "zstd", "level": 3},
}
FORMATS = ("PNG", "JPEG", *TIFFS, *ZARRS, "Zarr 3, crc32c")
FAULTS = ("empty", "cut", "end zeroed", "middle zeroed", "bit flipped")

REVEALED = {
    "PNG": FAULTS,
    "JPEG": ("empty", "cut", "end zeroed"),
    "TIFF": ("empty", "cut"),
    "TIFF, LZW": ("empty", "cut"),
    "TIFF, deflate": ("empty", "cut"),
    "TIFF, zstd": ("empty", "cut"),
    "TIFF, JPEG": ("empty", "cut", "end zeroed"),
    "SVS": ("empty", "cut"),
    "Zarr 2": ("empty", "cut"),
    "Zarr 2, gzip": FAULTS,
    "Zarr 2, blosc": ("empty", "cut"),
    "Zarr 2, zstd": ("empty", "cut"),
    "Zarr 3, crc32c": FAULTS,
}
"""Faults of which none is read silently, by format; of the others some are, as docs/guide/bad-input.md says."""


def picture():
    rough = np.random.default_rng(0).normal(size=(SIDE, SIDE, 3))
    smooth = gaussian_filter(rough, (3, 3, 0))
    return np.clip(128 + 60 * smooth / smooth.std() + 4 * rough, 1, 255).astype(np.uint8)


def write(path, kind):
    """Write the picture; the path of what can be opened."""
    pixels = picture()
    if kind in ("PNG", "JPEG"):
        file = path / f"a.{kind.lower()}"
        Image.fromarray(pixels).save(file)
        return file
    if kind in TIFFS:
        file = path / ("a.svs" if kind == "SVS" else "a.tif")
        tifffile.imwrite(file, pixels, **TILED, **TIFFS[kind], metadata=None)
        return file
    store = path / "a.zarr"
    array = np.ascontiguousarray(pixels[..., 0])
    if kind in ZARRS:
        spec = {"driver": "zarr", "metadata": {"compressor": ZARRS[kind], "dimension_separator": "/"}}
        spec["metadata"] |= {"dtype": "|u1", "chunks": [32, 32], "shape": list(array.shape)}
        group = {".zgroup": {"zarr_format": 2}, ".zattrs": multiscales("0.4")}
    else:
        codecs = [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 3}}, {"name": "crc32c"}]
        spec = {"driver": "zarr3", "metadata": {"codecs": codecs, "data_type": "uint8", "shape": list(array.shape)}}
        spec["metadata"]["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": [32, 32]}}
        attributes = {"ome": {"version": "0.5", **multiscales(None)}}
        group = {"zarr.json": {"zarr_format": 3, "node_type": "group", "attributes": attributes}}
    spec["kvstore"] = {"driver": "file", "path": str(store / "0")}
    tensorstore.open(spec, create=True).result().write(array).result()
    for name, content in group.items():
        (store / name).write_text(json.dumps(content))
    return store


def multiscales(version):
    scale = {"type": "scale", "scale": [1.0, 1.0]}
    entry = {"axes": [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]}
    entry["datasets"] = [{"path": "0", "coordinateTransformations": [scale]}]
    return {"multiscales": [entry | ({} if version is None else {"version": version})]}


def damage(file, fault, draw):
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content))
    if fault == "empty":
        content = b""
    elif fault == "cut":
        content = content[: max(place, 1)]
    elif fault == "end zeroed":
        content[place:] = bytes(len(content) - place)
    elif fault == "middle zeroed":
        end = min(place + 64, len(content))
        content[place:end] = bytes(end - place)
    else:
        content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def read(path):
    slide = open_slide(path)
    return slide.read(1, (0, 0), slide.shape)


def outcome(original, path, fault, seed, tmp_path):
    """What becomes of one fault: named by an error or a warning, harmless, or silent."""
    copy = tmp_path / path.name
    if copy.is_dir():
        shutil.rmtree(copy)
    shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
    draw = random.Random(f"{fault} {seed}")
    files = (
        sorted(file for file in copy.rglob("*") if file.is_file() and file.parent.name != copy.name)
        if copy.is_dir()
        else [copy]
    )
    files = [file for file in files if not file.name.startswith((".z", "zarr"))]
    damage(draw.choice(files), fault, draw)
    handler = BufferingHandler(1000)
    logging.getLogger("muvit").addHandler(handler)
    try:
        is_same = np.array_equal(read(copy), original)
    except MuViTError as error:
        assert "\n" not in str(error) and str(copy) in str(error)
        return "named"
    finally:
        logging.getLogger("muvit").removeHandler(handler)
    return "harmless" if is_same else "named" if handler.buffer else "silent"


def outcomes(kind, tmp_path, number):
    (tmp_path / "whole").mkdir()
    path = write(tmp_path / "whole", kind)
    original = read(path)
    return {fault: Counter(outcome(original, path, fault, i, tmp_path) for i in range(number)) for fault in FAULTS}


def check(found, kind):
    silent = {fault for fault, counts in found.items() if counts["silent"]}
    assert not silent & set(REVEALED[kind]), (kind, found)


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files(kind, tmp_path):
    check(outcomes(kind, tmp_path, 3), kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_in_two_hundred_cases(kind, tmp_path, record_property):
    found = outcomes(kind, tmp_path, 40)
    record_property(kind, {fault: dict(counts) for fault, counts in found.items()})
    check(found, kind)
