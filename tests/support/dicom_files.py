"""DICOM whole-slide files, for tests: the fewest attributes with which OpenSlide reads one."""

import struct

import imagecodecs
import numpy as np

SLIDE_STORAGE, JPEG = "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.840.10008.1.2.4.50"
_LONG = ("OB", "SQ", "UN")


def write_dicom(file, pixels, series="1.2.3", size_mm=0.00025, tile=64):
    """Write pixels ``(3, y, x)``, or grey ones ``(1, y, x)``, as one level of a slide in JPEG tiles of best quality."""
    samples, height, width = pixels.shape
    grid = -(-height // tile), -(-width // tile)
    padded = np.zeros((grid[0] * tile, grid[1] * tile, samples), np.uint8)
    padded[:height, :width] = np.moveaxis(pixels, 0, -1)
    tiles = padded.reshape(grid[0], tile, grid[1], tile, samples).swapaxes(1, 2).reshape(-1, tile, tile, samples)
    colours = {"colorspace": "RGB", "outcolorspace": "YCbCr", "subsampling": "444"} if samples == 3 else {}
    frames = [imagecodecs.jpeg_encode(part.squeeze(), level=100, **colours) for part in tiles]
    spacing = _item(_element(0x0028, 0x0030, "DS", f"{size_mm}\\{size_mm}"))
    measures = _item(_element(0x0028, 0x9110, "SQ", spacing))
    content = [
        _element(0x0008, 0x0008, "CS", "ORIGINAL\\PRIMARY\\VOLUME\\NONE"),
        _element(0x0008, 0x0016, "UI", SLIDE_STORAGE),
        _element(0x0008, 0x0018, "UI", f"{series}.{height}"),
        _element(0x0008, 0x0060, "CS", "SM"),
        _element(0x0020, 0x000D, "UI", "1.2"),
        _element(0x0020, 0x000E, "UI", series),
        _element(0x0020, 0x0013, "IS", "1"),
        _element(0x0020, 0x0052, "UI", "1.2.5"),
        _element(0x0020, 0x9311, "CS", "TILED_FULL"),
        _element(0x0028, 0x0002, "US", samples),
        _element(0x0028, 0x0004, "CS", "YBR_FULL_422" if samples == 3 else "MONOCHROME2"),
        _element(0x0028, 0x0006, "US", 0),
        _element(0x0028, 0x0008, "IS", str(len(frames))),
        _element(0x0028, 0x0010, "US", tile),
        _element(0x0028, 0x0011, "US", tile),
        *(
            _element(0x0028, number, "US", value)
            for number, value in ((0x0100, 8), (0x0101, 8), (0x0102, 7), (0x0103, 0))
        ),
        _element(0x0048, 0x0001, "FL", struct.pack("<f", width * size_mm)),
        _element(0x0048, 0x0002, "FL", struct.pack("<f", height * size_mm)),
        _element(0x0048, 0x0003, "FL", struct.pack("<f", 0.001)),
        _element(0x0048, 0x0006, "UL", width),
        _element(0x0048, 0x0007, "UL", height),
        _element(0x0048, 0x0105, "SQ", _item(_element(0x0048, 0x0106, "SH", "1"))),
        _element(0x5200, 0x9229, "SQ", measures),
        _pixel_data(frames),
    ]
    meta = b"".join(
        [
            _element(0x0002, 0x0001, "OB", b"\0\1"),
            _element(0x0002, 0x0002, "UI", SLIDE_STORAGE),
            _element(0x0002, 0x0003, "UI", f"{series}.{height}"),
            _element(0x0002, 0x0010, "UI", JPEG),
            _element(0x0002, 0x0012, "UI", "1.2.3.4"),
        ]
    )
    file.write_bytes(b"\0" * 128 + b"DICM" + _element(0x0002, 0x0000, "UL", len(meta)) + meta + b"".join(content))
    return file


def _element(group, number, kind, value):
    if isinstance(value, int):
        value = struct.pack("<H" if kind == "US" else "<I", value)
    elif isinstance(value, str):
        value = value.encode()
        value += (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
    length = struct.pack("<HI", 0, len(value)) if kind in _LONG else struct.pack("<H", len(value))
    return struct.pack("<HH", group, number) + kind.encode() + length + value


def _item(content):
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


def _pixel_data(frames):
    even = [frame + b"\0" * (len(frame) % 2) for frame in frames]
    offsets = np.cumsum([0, *(len(frame) + 8 for frame in even[:-1])]).astype("<u4").tobytes()
    parts = _item(offsets) + b"".join(map(_item, even)) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return struct.pack("<HH", 0x7FE0, 0x0010) + b"OB" + struct.pack("<HI", 0, 0xFFFFFFFF) + parts
