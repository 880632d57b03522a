"""How fast are annotations opened and read as labels? 100,000 polygons on a slide of 100,000 x 100,000 pixels.

    python benchmarks/annotations.py

Writes the table to the given file, or to ``benchmarks/results/annotations.md``, below what its head says of the run.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from markdown_table import markdown_table

from muvit.data.annotations.open import open_annotations
from muvit.data.crops.balance import locate_classes
from muvit.data.slides.slide import Slide

SIDE = 100_000
NUM_POLYGONS = 100_000
CORNERS = 40
LEVELS = (1, 4, 32)
WINDOW = 256


class EmptySlide(Slide):
    """An image that is nothing but its size."""

    def __init__(self) -> None:
        super().__init__(
            Path("empty"),
            level_shapes={level: (SIDE // level,) * 2 for level in LEVELS},
            num_channels=1,
            dtype=np.dtype(np.uint8),
            pixel_size_um=None,
            channel_names=("intensity",),
        )

    def _read_window(self, level: Any, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return np.zeros((1, *(b - a for a, b in zip(start, stop, strict=True))), np.uint8)


def write_polygons(file: Path) -> None:
    """Ragged discs of about 80 pixels in four classes, as QuPath writes them."""
    rng = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    features = []
    for i in range(NUM_POLYGONS):
        points = circle * (20 + 30 * rng.random((CORNERS, 1))) + SIDE * rng.random(2)
        points = np.round(np.vstack([points, points[:1]]), 2)
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [points.tolist()]},
                "properties": {"objectType": "annotation", "classification": {"name": f"class {i % 4}"}},
            }
        )
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def measure(folder: Path) -> list[tuple[str, float, float, float]]:
    """Median of the clock, its 95th percentile, and median of the processor, in milliseconds."""
    file, image, rng = folder / "a.geojson", EmptySlide(), np.random.default_rng(1)
    write_polygons(file)
    times = {
        f"open {file.stat().st_size / 1e6:.0f} MB": [timed(lambda: open_annotations(file, image)) for _ in range(3)]
    }
    labels = open_annotations(file, image)
    for level in LEVELS:
        starts = rng.integers(0, SIDE // level - WINDOW, (200 if level == 1 else 40, 2)).tolist()
        labels.read(level, (0, 0), (WINDOW, WINDOW))
        read = [timed(lambda s=start, v=level: labels.read(v, s, (WINDOW, WINDOW))) for start in starts]
        times[f"read {WINDOW} x {WINDOW} px of level {level}"] = read
    # a coarse level is remembered as a whole: as in training, soon after its start
    starts = rng.integers(0, SIDE // LEVELS[-1] - WINDOW, (1000, 2)).tolist()
    read = [timed(lambda s=start: labels.read(LEVELS[-1], s, (WINDOW, WINDOW))) for start in starts]
    times[f"1000 further windows of level {LEVELS[-1]}"] = read
    times["find the classes of the slide, for balanced crops"] = [timed(lambda: locate_classes(0, labels, 1))]
    rows = []
    for name, found in times.items():
        clock, processor = 1e3 * np.array(found).T
        rows.append((name, float(np.median(clock)), float(np.percentile(clock, 95)), float(np.median(processor))))
    return rows


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", type=Path, default=Path(__file__).parent / "results" / "annotations.md")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    header = ["task", "median [ms]", "95th percentile [ms]", "processor, median [ms]"]
    table = markdown_table(header, [[name, *(f"{value:.1f}" for value in values)] for name, *values in rows])
    before = arguments.table.read_text().partition("| task |")[0] if arguments.table.exists() else ""
    arguments.table.write_text(f"{before}{table}\n")
    print(table)


if __name__ == "__main__":
    main()
