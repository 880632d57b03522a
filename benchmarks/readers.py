"""How many crops per second do the readers of each format give? The same picture in all of them.

    python benchmarks/readers.py slide.svs

The finest level of the given slide is repeated until it is 8,000 pixels wide, more than readers keep in memory.

Replaces the table in the file given by ``--output``, or in ``benchmarks/results/readers.md``.
"""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tifffile
from markdown_table import markdown_table

from muvit.data.pyramids.convert import convert_image
from muvit.data.slides.derived import complete_slide
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide

ROOT = Path(__file__).parents[1]
CROP, NUM_CROPS, COARSE, RATIO = 256, 200, 4, 1.4
SIDE, SIZE_UM = 8000, 0.5


class Mosaic(Slide):
    """A picture repeated until it is larger than what readers keep in memory."""

    def __init__(self, picture: np.ndarray[Any, Any], times: int) -> None:
        self.picture = picture
        super().__init__(
            Path("mosaic"),
            level_shapes={1.0: (picture.shape[1] * times, picture.shape[2] * times)},
            num_channels=3,
            dtype=picture.dtype,
            pixel_size_um=(SIZE_UM, SIZE_UM),
            channel_names=("red", "green", "blue"),
        )

    def _read_window(self, level: Any, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        rows, columns = (np.arange(a, b) % n for a, b, n in zip(start, stop, self.picture.shape[1:], strict=True))
        return self.picture[:, rows[:, None], columns]


def copies(source: Path, folder: Path) -> dict[str, Path]:
    """The picture in each format; SVS and DICOM with JPEG tiles of quality 90 and 100."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from dicom_files import write_dicom

    picture = open_slide(source)
    pixels = picture.read(1, (0, 0), picture.shape)
    slide = Mosaic(pixels, -(-SIDE // min(picture.shape)))
    levels = (1, 2, 4)
    whole = slide.read(1, (0, 0), slide.shape)
    described = f"Aperio Image Library v1\n{slide.shape[1]}x{slide.shape[0]}|AppMag = 20|MPP = {SIZE_UM}"
    with tifffile.TiffWriter(folder / "a.svs") as tif:
        tif.write(
            np.moveaxis(whole, 0, -1),
            tile=(256, 256),
            photometric="rgb",
            compression="jpeg",
            compressionargs={"level": 90},
            description=described,
            metadata=None,
        )
    return {
        "SVS (OpenSlide)": folder / "a.svs",
        "DICOM (OpenSlide)": write_dicom(folder / "a.dcm", whole, size_mm=SIZE_UM / 1000, tile=256),
        "OME-TIFF, zlib": convert_image(slide, folder / "a.ome.tif", format="ome-tiff", levels=levels),
        "OME-Zarr 0.5, zstd": convert_image(slide, folder / "a.ome.zarr", levels=levels),
        "OME-Zarr 0.4, blosc (tensorstore)": convert_image(
            slide, folder / "b.ome.zarr", format="ome-zarr-0.4", levels=levels
        ),
    }


def crops_per_second(slide: Slide, level: float) -> tuple[float, float]:
    """Crops anywhere in a level per second of the clock, and of the processor."""
    rng = np.random.default_rng(0)
    upper = [n - CROP for n in slide.level_shape(level)]
    starts = [tuple(int(rng.integers(0, max(n, 0) + 1)) for n in upper) for _ in range(NUM_CROPS)]
    slide.read(level, starts[0], (CROP, CROP))
    clock, processor = time.perf_counter(), time.process_time()
    for start in starts:
        slide.read(level, start, (CROP, CROP))
    return NUM_CROPS / (time.perf_counter() - clock), NUM_CROPS / (time.process_time() - processor)


def num_bytes(path: Path) -> int:
    """Size of a file, or of all files of a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="an RGB image")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "readers.md")
    arguments = parser.parse_args()
    rows = []
    with TemporaryDirectory() as folder:
        for name, path in copies(arguments.source, Path(folder)).items():
            stored = open_slide(path)
            resampled = complete_slide(open_slide(path), (1,), pixel_size_um=RATIO * SIZE_UM)
            measured = [
                crops_per_second(stored, 1),
                crops_per_second(complete_slide(open_slide(path), (1, COARSE)), COARSE),
                crops_per_second(resampled, 1),
            ]
            rows.append(
                [name, f"{num_bytes(path) / 1e6:.1f}", *(f"{clock:.0f} ({cpu:.0f})" for clock, cpu in measured)]
            )
            print(rows[-1], flush=True)
    head = ["format", "size [MB]", "level 1", f"level {COARSE}", f"level 1 at {RATIO} x the pixel size"]
    before, _, after = (
        arguments.output.read_text().partition("| format |") if arguments.output.exists() else ("", "", "")
    )
    below = after.partition("\n\n")[2]
    arguments.output.write_text(f"{before}{markdown_table(head, rows)}\n" + (f"\n{below}" if below else ""))


if __name__ == "__main__":
    main()
