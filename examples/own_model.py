"""A network of one's own: trained by a plain PyTorch loop, then applied to whole slides and scored like any other.

It joins convolutions of the finest view with the mean of the coarse one. The slides are fractal noise, and the label
says where it is high.

    python examples/own_model.py --output own
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from muvit import (
    NestedCrops,
    Preprocessing,
    SegmentationLoss,
    SegmentationModel,
    Slide,
    TrainedModel,
    Views,
    evaluate_slides,
    load_model,
    open_slide,
    predict_slide,
)
from muvit.data import PyramidWriter, Range
from muvit.data.synthetic.images import fractal_noise

SIDE = 256


@dataclass(frozen=True, kw_only=True)
class TwoScalesConfig:
    """Sizes of `TwoScales`; a model folder keeps them, under the name of their kind."""

    kind: ClassVar[str] = "two_scales"

    num_classes: int
    """Classes, background included."""
    levels: tuple[int, int] = (1, 4)
    """Downsampling factors of the views, finest first."""
    width: int = 8
    """Channels inside."""


class TwoScales(SegmentationModel):
    """Convolutions of the finest view, shifted by the mean of the coarse view's features."""

    config: TwoScalesConfig

    def __init__(self, config: TwoScalesConfig) -> None:
        super().__init__(config)
        self.fine = nn.Conv2d(1, config.width, 3, padding=1)
        self.coarse = nn.Conv2d(1, config.width, 3, padding=1)
        self.head = nn.Conv2d(config.width, config.num_classes, 1)

    @property
    def views(self) -> Views:
        """Two views of one channel, of any size."""
        return Views(levels=tuple(self.config.levels), in_channels=1, ndim=2, multiple=(1, 1))

    @property
    def num_classes(self) -> int:
        """Classes, background included."""
        return self.config.num_classes

    def forward(self, img: Tensor, bbox: Tensor | None = None) -> Tensor:
        """Logits ``(B, K, y, x)`` of the finest view, of ``img`` ``(B, 2, 1, y, x)``."""
        around = self.coarse(img[:, 1]).relu().mean((-2, -1), keepdim=True)
        return self.head((self.fine(img[:, 0]) + around).relu())


def write_pair(folder: Path, seed: int) -> tuple[Slide, Slide]:
    """An image and its labels, as pyramids with levels 1 and 4."""
    noise = fractal_noise(SIDE, (64, 16), np.random.default_rng(seed))
    pixels = np.clip(noise * 64 + 128, 0, 255).astype(np.uint8)
    names = {0: "low", 1: "high"}
    for name, values, labels in (("image", pixels, None), ("truth", (pixels > 128).astype(np.uint8), names)):
        kind = "image" if labels is None else "label"
        writer = PyramidWriter.create(
            folder / f"{name}_{seed}.ome.zarr",
            shape=values.shape,
            num_channels=1,
            dtype=np.uint8,
            levels=(1, 4),
            kind=kind,
            label_names=labels,
        )
        writer.write((0, 0), values[None])
        writer.finish()
    return open_slide(folder / f"image_{seed}.ome.zarr"), open_slide(folder / f"truth_{seed}.ome.zarr")


def train(model: TwoScales, preprocessing: Preprocessing, pairs: list[tuple[Slide, Slide]]) -> None:
    """Train on random crops with Adam."""
    crops = NestedCrops(
        pairs, preprocessing.crops(model.views.levels, num_classes=model.num_classes), samples_per_epoch=320
    )
    criterion, optimizer = SegmentationLoss(), torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in DataLoader(crops, batch_size=8):
        loss, _ = model.training_loss(batch, criterion)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"last loss {loss.item():.3f}")


def main() -> None:
    """Train, save, load, predict and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for slides, model and labels")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    preprocessing = Preprocessing(
        crop_size=(64, 64),
        normalization=Range(low=0, high=255),
        class_names=("low", "high"),
        class_colors=((0, 0, 0), (255, 200, 0)),
    )
    model = TwoScales(TwoScalesConfig(num_classes=2))
    train(model, preprocessing, [write_pair(output, seed) for seed in (0, 1)])
    TrainedModel(model=model, preprocessing=preprocessing).save(output / "model")

    trained = load_model(output / "model", kind=TwoScales)
    image, truth = write_pair(output, 2)
    labels = predict_slide(trained, image, output / "labels_2.ome.zarr")
    scores = evaluate_slides([(open_slide(labels), truth)], num_classes=2, class_names=preprocessing.class_names)
    print(f"accuracy on a new slide: {scores.pooled.accuracy:.3f}")


if __name__ == "__main__":
    main()
