"""A data set of one's own: views that come from anywhere, as long as each says which box of the world it covers.

Here the world is a fractal noise field, a view of level l is sampled at every l-th point, and the label says where the
field is high. The loop at the end is plain PyTorch: models need nothing but tensors.

    python examples/own_dataset.py --output own
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from muvit import EncoderConfig, MuViTDataset, SegmentationLoss, Segmenter, SegmenterConfig
from muvit.data.synthetic.images import fractal_noise

WORLD, CROP = 512, 32


class NoiseViews(MuViTDataset):
    """Two views of a random place: level 1, and level 4 around the same centre."""

    def __init__(self, length: int) -> None:
        noise = fractal_noise(WORLD, (64, 16), np.random.default_rng(0))
        self.field = torch.from_numpy(noise)
        self.length = length

    levels = (1, 4)
    n_channels = 1
    ndim = 2

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(index)
        center = torch.randint(2 * CROP, WORLD - 2 * CROP, (2,), generator=rng)
        views, boxes = [], []
        for level in self.levels:
            half = level * CROP // 2
            (y0, x0), (y1, x1) = center - half, center + half
            views.append(self.field[None, y0:y1:level, x0:x1:level])
            boxes.append(torch.stack([center - half, center + half]))
        label = (views[0][0] > self.field.median()).long()
        return {"img": torch.stack(views), "bbox": torch.stack(boxes).float(), "label": label}


def main() -> None:
    """Train for a few steps and keep the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    output = parser.parse_args().output
    torch.manual_seed(0)
    data = NoiseViews(160)
    model = Segmenter(
        SegmenterConfig(
            encoder=EncoderConfig(in_channels=1, levels=data.levels, dim=64, num_layers=3, heads=2, rotary_base=100),
            num_classes=2,
            decoder_widths=(16, 16, 8, 8),
            stem_width=8,
        )
    )
    loss = SegmentationLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step, batch in enumerate(DataLoader(data, batch_size=8)):
        value = loss(model(batch["img"], batch["bbox"]), batch["label"])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step:2}  loss {value.item():.3f}")
    model.save(output / "model")
    again = Segmenter.from_folder(output / "model")
    print(f"{sum(p.numel() for p in again.parameters()):,} parameters in {output / 'model'}")


if __name__ == "__main__":
    main()
