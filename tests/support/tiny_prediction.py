"""A model and an image so small that the command `muvit predict` takes a moment."""

import hashlib

import numpy as np
import torch

from muvit.cli import main
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.pyramids.writer import PyramidWriter
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig

PREPROCESSING = Preprocessing(
    crop_size=(16, 16),
    normalization=Range(high=255),
    class_names=("background", "one", "two"),
    class_colors=((0, 0, 0), (255, 0, 0), (0, 255, 0)),
)
OPTIONS = ["--block_px", "32", "--overlap", "0.25", "--probabilities", "uint8", "--batch_size", "4", "--device", "cpu"]


def make_model_and_image(folder):
    """``model`` and ``image.ome.zarr`` in a folder."""
    torch.manual_seed(0)
    encoder = EncoderConfig(in_channels=1, levels=(1, 4), num_layers=4, dim=16, heads=1)
    model = Segmenter(SegmenterConfig(encoder=encoder, num_classes=3, decoder_widths=(4, 4, 4, 4), stem_width=4))
    model.save(folder / "model", extra_files={"preprocessing.yaml": PREPROCESSING.to_yaml()})
    pixels = np.random.default_rng(0).integers(0, 256, (1, 90, 70), dtype=np.uint8)
    writer = PyramidWriter.create(
        folder / "image.ome.zarr", shape=(90, 70), num_channels=1, dtype=np.uint8, levels=(1, 4), chunk=16, shard=64
    )
    writer.write((0, 0), pixels)
    writer.finish()


def predict(folder, output, *more):
    """Run the command on them; its exit code."""
    return main(["predict", f"{folder}/model", f"{folder}/image.ome.zarr", "--output", f"{output}", *OPTIONS, *more])


def hashes(output):
    """Hash of every file of an output, by its path, but for the page, which states how long it took."""
    files = (path for path in output.rglob("*") if path.is_file() and path.name != "index.html")
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
