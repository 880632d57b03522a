"""The memory of a prediction does not grow with its slide."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.slide import Slide
from muvit.inference.run.plan import PredictOptions
from muvit.inference.predict import predict_slide
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.segmentation_model import Views


class Lazy(Slide):
    def __init__(self, edge):
        super().__init__(
            Path("lazy"), level_shapes={level: (edge // level,) * 2 for level in (1, 8)}, num_channels=1,
            dtype=np.dtype(np.uint8), pixel_size_um=None, channel_names=("grey",),
        )

    def _read_window(self, level, start, stop):
        y, x = (np.arange(a, b) * int(level) for a, b in zip(start, stop))
        return ((y[:, None] >> 6) + (x >> 7)).astype(np.uint8)[None]


class Halves(SegmentationModel):
    def __init__(self):
        super().__init__()
        self.middle = torch.nn.Parameter(torch.tensor(0.5))

    views = Views(levels=(1, 8), in_channels=1, ndim=2, multiple=(1, 1))
    num_classes = 2

    def label_logits(self, img, bbox=None):
        return torch.cat([self.middle - img[:, 0], img[:, 0] - self.middle], 1)


def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])


torch.set_num_threads(1)
settings = Preprocessing(
    crop_size=(256, 256), normalization=Range(high=255), class_names=("a", "b"), class_colors=((0, 0, 0),) * 2
)
options = PredictOptions(block_px=512, overlap=0.0)
with tempfile.TemporaryDirectory() as folder:
    output = Path(folder) / "labels.ome.zarr"
    predict_slide(Halves(), Lazy(int(sys.argv[1])), output, settings, options=options, device="cpu")
print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak of a process")
@pytest.mark.long
def test_the_peak_of_memory_is_the_same_for_a_slide_of_16_times_the_pixels():
    """In processes of their own; the larger slide has 64 million pixels, which nothing may hold at once."""
    command = [sys.executable, "-c", SCRIPT]
    small, large = (
        int(subprocess.run([*command, str(edge)], check=True, capture_output=True, text=True).stdout)
        for edge in (2048, 8192)
    )
    assert large <= 1.1 * small
    assert large - small < 48 << 10  # KiB
