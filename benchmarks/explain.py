"""Do the maps of `muvit explain` tell which coarse tokens a label rests on?

For points on cells of the Synthetic test images, the tenth of the coarse tokens with the highest share in a map is
hidden from all other tokens, in all blocks, and the probability of the class that the model gives to the point is
compared with that before; random tenths, five for each point, are the reference. What is lost with all coarse tokens
hidden is the most that there is to lose. Every seed draws other points, crops and random tokens.

    muvit synthetic --kind scattered --size_px 512 --output data/scattered --train 1 --val 1 --test 16
    python benchmarks/explain.py src/muvit/models/packaged/muvit-synthetic-small --data data/scattered/test
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from markdown_table import markdown_table
from torch import Tensor

from muvit.data.crops.crops import NestedCrops
from muvit.data.folders import open_labelled_folder
from muvit.inference.explain import DELETED_SHARE
from muvit.models.attention_maps import attention_maps, gradient_rollout, hidden_tokens, rollout
from muvit.models.segmenter import Segmenter
from muvit.models.trained import TrainedModel, load_model

RANDOM_DRAWS, BATCH = 5, 25


@dataclass(frozen=True, kw_only=True)
class Points:
    """Views, and a pixel on a cell in the finest of each."""

    img: Tensor
    bbox: Tensor
    pixel: Tensor
    """``(n, 2)``."""

    def __len__(self) -> int:
        return len(self.img)


def draw_points(trained: TrainedModel[Segmenter], data: Path, count: int, seed: int) -> Points:
    """Points on cells, each in a crop of its own."""
    levels = trained.model.views.levels
    config = trained.preprocessing.crops(levels, num_classes=trained.model.num_classes)
    pairs = open_labelled_folder(data, levels, levels[:1], None, trained.preprocessing.pixels)
    crops = NestedCrops(
        pairs, config, samples_per_epoch=count, seed=seed, balance="foreground", foreground_fraction=1.0
    )
    rng, samples, pixels = np.random.default_rng(seed), [crops[i] for i in range(count)], []
    for sample in samples:
        cells = np.argwhere(sample["label"].numpy() > 0)
        pixels.append(cells[rng.integers(len(cells))])
    img, bbox = (torch.stack([sample[name] for sample in samples]) for name in ("img", "bbox"))
    return Points(img=img, bbox=bbox, pixel=torch.from_numpy(np.array(pixels)))


def logits_at(model: Segmenter, points: Points) -> Tensor:
    """Logits ``(n, K)`` of the points."""
    y, x = points.pixel.T
    return model.label_logits(points.img, points.bbox)[torch.arange(len(points)), :, y, x]


def scores_of(model: Segmenter, points: Points, predicted: Tensor) -> dict[str, Tensor]:
    """Shares ``(n, N)`` of all tokens in each map of the points, as `muvit.inference.explain` computes them."""
    patch, side = model.config.encoder.patch[0], points.img.shape[-1]
    token = points.pixel[:, 0] // patch * (side // patch) + points.pixel[:, 1] // patch
    each = torch.arange(len(points))
    with torch.no_grad(), attention_maps(model.encoder, average_heads=True) as averaged:
        logits_at(model, points)
    with attention_maps(model.encoder, differentiable=True) as maps:
        log_probability = logits_at(model, points).log_softmax(1)[each, predicted]
    return {
        "attention": averaged[-1][each, token],
        "rollout": rollout(averaged)[each, token],
        "relevance": gradient_rollout(maps, log_probability.sum()),
    }


def measure(model: Segmenter, points: Points, generator: torch.Generator) -> dict[str, Tensor]:
    """Loss of probability ``(n,)`` of each point without the coarse tokens that each map points out."""
    each, num_fine = torch.arange(len(points)), (points.img.shape[-1] // model.config.encoder.patch[0]) ** 2
    num_all = num_fine * len(model.views.levels)
    with torch.no_grad():
        before = logits_at(model, points).softmax(1)
    predicted = before.argmax(1)

    def lost(hidden: Tensor) -> Tensor:
        with torch.no_grad(), hidden_tokens(model, hidden):
            return (before - logits_at(model, points).softmax(1))[each, predicted]

    def lost_by(score: Tensor) -> Tensor:
        count = max(1, round(DELETED_SHARE * (num_all - num_fine)))
        top = score[:, num_fine:].topk(count, 1).indices + num_fine
        return lost(torch.zeros(len(points), num_all, dtype=torch.bool).scatter_(1, top, True))

    draw: Callable[[], Tensor] = lambda: torch.rand(len(points), num_all, generator=generator)  # noqa: E731
    found = {name: lost_by(score) for name, score in scores_of(model, points, predicted).items()}
    found["random"] = torch.stack([lost_by(draw()) for _ in range(RANDOM_DRAWS)]).mean(0)
    found["all coarse tokens"] = lost((torch.arange(num_all) >= num_fine)[None])
    return found


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/scattered/test"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--points", type=int, default=200)
    arguments = parser.parse_args()
    trained = load_model(arguments.model, kind=Segmenter)
    model = trained.model.eval().requires_grad_(False)
    rows, names = [], ("attention", "rollout", "relevance")
    for seed in range(arguments.seeds):
        points, generator = (
            draw_points(trained, arguments.data, arguments.points, seed),
            torch.Generator().manual_seed(seed),
        )
        parts = []
        for first in range(0, len(points), BATCH):
            part = slice(first, first + BATCH)
            chosen = Points(img=points.img[part], bbox=points.bbox[part], pixel=points.pixel[part])
            parts.append(measure(model, chosen, generator))
        means = {name: float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}
        ratios = [means[name] / means["random"] for name in names]
        rows.append([means["all coarse tokens"], means["random"], *(means[name] for name in names), *ratios])
        print(seed, *(f"{name} {value:.4f}" for name, value in means.items()), flush=True)
    shown = [
        [str(seed), *map("{:.4f}".format, row[:5]), *map("{:.1f}".format, row[5:])] for seed, row in enumerate(rows)
    ]
    mean = np.mean(rows, axis=0)
    # of the means, not the mean of ratios
    shown.append(["all", *map("{:.4f}".format, mean[:5]), *map("{:.1f}".format, mean[2:5] / mean[1])])
    head = ["seed", "all coarse", "random", *names, *(f"{name} / random" for name in names)]
    print(f"\n{markdown_table(head, shown)}")


if __name__ == "__main__":
    main()
