"""Peak memory of whole-slide prediction on virtual slides of growing size; it must not grow with the slide.

    python benchmarks/predict_memory.py --output benchmarks/results/predict_memory.md

Every measurement runs in a process of its own. The slide has no file: its pixels are computed where they are read. The
model is arithmetic on single pixels, so that what is measured is the path of the pixels: reading ahead, tiles, blocks,
blending, shards, pyramids.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.slide import Slide
from muvit.inference.predict import predict_slide
from muvit.inference.run.plan import PredictOptions
from muvit.levels import level_factors
from muvit.models.segmentation_model import SegmentationModel, Views

LEVELS = (1, 8, 32)
NUM_CLASSES = 5
CROP = 512
CASES = {
    "labels": PredictOptions(overlap=0.0),
    "labels and probabilities, overlap 0.25": PredictOptions(overlap=0.25, probabilities="uint8"),
}


class VirtualSlide(Slide):
    """A square RGB slide whose pixels are a function of their coordinates."""

    def __init__(self, edge: int) -> None:
        super().__init__(
            Path(f"virtual-{edge}"),
            level_shapes={level: (-(-edge // level),) * 2 for level in LEVELS},
            num_channels=3,
            dtype=np.dtype(np.uint8),
            pixel_size_um=None,
            channel_names=("red", "green", "blue"),
        )

    def _read_window(self, level, start, stop):
        (factor, _), (y, x) = level_factors(level, 2), (np.arange(a, b) for a, b in zip(start, stop, strict=True))
        waves = [(np.sin(y * factor / 97 + c)[:, None] + np.cos(x * factor / 53 + c)) * 63 + 127 for c in range(3)]
        return np.stack(waves).astype(np.uint8)


class Arithmetic(SegmentationModel):
    """Classes by brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = torch.nn.Parameter(torch.linspace(0, 1, NUM_CLASSES))

    @property
    def views(self) -> Views:
        """Three levels of any size."""
        return Views(levels=LEVELS, in_channels=3, ndim=2, multiple=(1, 1))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return NUM_CLASSES

    def label_logits(self, img: Tensor, bbox: Tensor | None = None) -> Tensor:
        """The nearer the brightness to that of a class, the higher."""
        return -50 * (img[:, 0].mean(1, keepdim=True) - self.centers[:, None, None]) ** 2


def measure(case: str, edge: int) -> dict[str, float]:
    """Peak memory in MiB and seconds of one prediction in this process."""
    preprocessing = Preprocessing(
        crop_size=(CROP, CROP),
        normalization=Range(high=255),
        class_names=tuple(f"class {i}" for i in range(NUM_CLASSES)),
        class_colors=((0, 0, 0),) * NUM_CLASSES,
    )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        output = Path(folder) / "labels.ome.zarr"
        predict_slide(
            Arithmetic(), VirtualSlide(edge), output, preprocessing, options=CASES[case], batch_size=4, device="cpu"
        )
        seconds = time.perf_counter() - began
    return {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "seconds": seconds}


def main() -> None:
    """Measure all cases, or, as the process of one, that case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edges", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    lines = [
        "# Peak memory of prediction",
        "",
        f"`python benchmarks/predict_memory.py`: a virtual RGB slide, levels {LEVELS}, {CROP}-px tiles, "
        f"{NUM_CLASSES} classes, batches of 4, one CPU thread; every number from a process of its own.",
        "",
        "| case | pixels | peak memory (MiB) | against the smallest |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        smallest = None
        for edge in arguments.edges:
            command = [sys.executable, __file__, "--one", case, str(edge)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            smallest = smallest or found["peak_mib"]
            growth = found["peak_mib"] / smallest - 1
            lines.append(f"| {case} | {edge} x {edge} | {found['peak_mib']:.0f} | {growth:+.1%} |")
            print(lines[-1], f"{found['seconds']:.0f} s", flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
