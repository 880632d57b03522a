"""Does the Synthetic data set hide the class of a cell from a small field of view, and show it to a large one?

A small U-Net is told which pixels are cells (as occupancy, downsampled eightfold) and asked only for their class. It is
trained and tested twice: on fine crops of 256 px and on coarse crops of 1024 px that hold those fine crops at a random
place. Both are scored on the cell pixels of the same fine crops. The small variant of the data set has all lengths
divided by four. The data set is good if mDSC is below 0.57 at 256 px and above 0.88 at 1024 px.

    python benchmarks/synthetic_leak_probe.py
    python benchmarks/synthetic_leak_probe.py --variants small --epochs 5 2 --train-crops 500 --output probe.md
"""

import argparse
import datetime
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from muvit.data.synthetic.images import SyntheticConfig, generate

FINE_CELLS = 32
"""Side of a fine crop in downsampled cells: 256 px / 8."""
COARSE_CELLS = 128
"""Side of a coarse crop in downsampled cells: 1024 px / 8."""
LEAST_SHARE = 0.02
"""Fine crops with a smaller share of cell pixels are not drawn."""
LIMITS = {"fine": "< 0.57", "coarse": "> 0.88"}


def count_classes(index: int, config: SyntheticConfig) -> np.ndarray:
    """Number of pixels of either class in each downsampled cell of image ``index``, uint8 (2, H / 8, W / 8)."""
    _, label = generate(index, config)
    block = config.size_px // 256
    blocks = label.reshape(256, block, 256, block)
    return np.stack([(blocks == value).sum((1, 3)) for value in (1, 2)]).astype(np.uint8)


@dataclass(frozen=True)
class Windows:
    """Nested crops as (image, y, x) of the fine crop and of the coarse crop around it, (N, 3) each."""

    fine: np.ndarray
    coarse: np.ndarray


def draw_windows(counts: np.ndarray, num: int, block: int, rng: np.random.Generator) -> Windows:
    """Fine crops uniform among those with enough cells, each in a coarse crop uniform among those that hold it."""
    side = counts.shape[-1]
    least = LEAST_SHARE * (FINE_CELLS * block) ** 2
    fine = []
    while len(fine) < num:
        image, (y, x) = rng.integers(len(counts)), rng.integers(0, side - FINE_CELLS, 2, endpoint=True)
        if counts[image, :, y : y + FINE_CELLS, x : x + FINE_CELLS].sum(dtype=np.int64) >= least:
            fine.append((image, y, x))
    windows = np.array(fine)
    start = windows[:, 1:]
    lowest = np.maximum(start + FINE_CELLS - COARSE_CELLS, 0)
    highest = np.minimum(start, side - COARSE_CELLS)
    return Windows(windows, np.column_stack([windows[:, 0], rng.integers(lowest, highest, endpoint=True)]))


def cut(counts: np.ndarray, windows: np.ndarray, side: int) -> Tensor:
    """Crops (N, 2, side, side) of the class counts, uint8."""
    return torch.from_numpy(np.stack([counts[i, :, y : y + side, x : x + side] for i, y, x in windows]))


class UNet(nn.Module):
    """Occupancy (B, 1, H, W) -> logit of the outer class (B, H, W); about 0.2M parameters, four poolings."""

    def __init__(self, widths: tuple[int, ...] = (12, 24, 32, 48, 56)) -> None:
        super().__init__()
        inputs = (1, *widths[:-1])
        self.down = nn.ModuleList(_double_conv(i, o) for i, o in zip(inputs, widths, strict=True))
        pairs = zip(widths[:0:-1], widths[-2::-1], strict=True)
        self.up = nn.ModuleList(_double_conv(deep + skip, skip) for deep, skip in pairs)
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, occupancy: Tensor) -> Tensor:
        """Logits of a batch of crops."""
        x, skips = self.down[0](occupancy), []
        for layer in self.down[1:]:
            skips.append(x)
            x = layer(functional.max_pool2d(x, 2))
        for layer, skip in zip(self.up, reversed(skips), strict=True):
            x = layer(torch.cat([functional.interpolate(x, scale_factor=2.0), skip], dim=1))
        return self.head(x)[:, 0]


def _double_conv(num_in: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(num_out),
        nn.ReLU(inplace=True),
        nn.Conv2d(num_out, num_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(num_out),
        nn.ReLU(inplace=True),
    )


def train(crops: Tensor, block: int, epochs: int, args: argparse.Namespace, name: str) -> UNet:
    """Fit a U-Net to class counts (N, 2, side, side): cross-entropy over all cell pixels, random flips and turns."""
    torch.manual_seed(args.seed)
    model = UNet()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    steps = epochs * (len(crops) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(crops)).split(args.batch_size)[: len(crops) // args.batch_size]:
            counts = _turn(crops[batch].float())
            logits = model(_occupancy(counts, block))
            loss = _cross_entropy(logits, counts)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        minutes = (time.perf_counter() - start) / 60
        mean = total / (len(crops) // args.batch_size)
        print(f"  {name}: epoch {epoch + 1}/{epochs}, loss {mean:.4f}, {minutes:.1f} min", flush=True)
    return model.eval()


def _turn(counts: Tensor) -> Tensor:
    counts = torch.rot90(counts, int(torch.randint(4, ())), (-2, -1))
    return counts.flip(-1) if torch.rand(()) < 0.5 else counts


def _occupancy(counts: Tensor, block: int) -> Tensor:
    return (counts.sum(1, keepdim=True) / block**2).contiguous(memory_format=torch.channels_last)


def _cross_entropy(logits: Tensor, counts: Tensor) -> Tensor:
    per_class = functional.logsigmoid(torch.stack([logits, -logits], dim=1))
    return -(counts * per_class).sum() / counts.sum().clamp(min=1)


@torch.inference_mode()
def score(model: UNet, crops: Tensor, inner: np.ndarray, block: int) -> dict[str, float]:
    """Accuracy and Dice over the cell pixels of the fine windows that start at ``inner`` (N, 2) inside the crops."""
    table = np.zeros((2, 2))  # truth, prediction
    for batch in torch.arange(len(crops)).split(32):
        counts = crops[batch].float()
        is_outer = model(_occupancy(counts, block)) > 0
        for n, (y, x) in enumerate(inner[batch.numpy()]):
            fine = (slice(y, y + FINE_CELLS), slice(x, x + FINE_CELLS))
            chosen, pixels = is_outer[n][fine], counts[n][:, *fine]
            table += np.array([[(p * chosen).sum().item(), (p * ~chosen).sum().item()] for p in pixels])
    dice = 2 * np.diag(table) / (table.sum(0) + table.sum(1))
    return {
        "accuracy": float(np.trace(table) / table.sum()),
        "dice_outer": float(dice[0]),
        "dice_inner": float(dice[1]),
        "mdsc": float(dice.mean()),
        "outer_share": float(table[0].sum() / table.sum()),
    }


def probe(variant: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Train and test at both fields of view on one variant of the data set; one row of results for each."""
    config = SyntheticConfig.small() if variant == "small" else SyntheticConfig()
    if args.warp_scale != 1:
        config = replace(config, warp_amplitude_px=config.warp_amplitude_px * args.warp_scale)
    block = config.size_px // 256
    start = time.perf_counter()
    counts = np.stack([count_classes(i, config) for i in range(args.train_images + args.test_images)])
    print(f"{variant}: {len(counts)} images in {time.perf_counter() - start:.0f} s", flush=True)
    rng = np.random.default_rng(args.seed)
    fit_counts, test_counts = counts[: args.train_images], counts[args.train_images :]
    fit_windows = draw_windows(fit_counts, args.train_crops, block, rng)
    test_windows = draw_windows(test_counts, args.test_crops, block, rng)
    rows: list[dict[str, object]] = []
    for name, side, epochs in zip(("fine", "coarse"), (FINE_CELLS, COARSE_CELLS), args.epochs, strict=True):
        if name not in args.fields:
            continue
        start = time.perf_counter()
        view = f"{variant} {side * block} px"
        model = train(cut(fit_counts, getattr(fit_windows, name), side), block, epochs, args, view)
        outer = getattr(test_windows, name)
        result = score(model, cut(test_counts, outer, side), (test_windows.fine - outer)[:, 1:], block)
        minutes = (time.perf_counter() - start) / 60
        rows.append({"variant": variant, "field": name, "field_px": side * block, **result, "minutes": minutes})
        print(f"{view}: accuracy {result['accuracy']:.3f}, mDSC {result['mdsc']:.3f}", flush=True)
    return rows


def report(rows: list[dict[str, object]], args: argparse.Namespace) -> str:
    """The results as a Markdown page."""
    num_parameters = sum(p.numel() for p in UNet().parameters())
    lines = [
        "# Leak probe of the Synthetic data set",
        "",
        f"- date: {datetime.date.today().isoformat()}",
        f"- command: `{' '.join(['python benchmarks/synthetic_leak_probe.py', *sys.argv[1:]])}`",
        f"- hardware: {torch.get_num_threads()} of {os.cpu_count()} CPU cores",
        f"- seeds: data set 0, crops and network {args.seed}",
        f"- U-Net of {num_parameters:,} parameters, AdamW {args.learning_rate:g}, batch {args.batch_size}, "
        f"random flips, {args.epochs[0]} epochs (small field of view) and {args.epochs[1]} (large)",
        f"- {args.train_crops} crops of {args.train_images} images for training, {args.test_crops} crops of "
        f"{args.test_images} other images for testing",
        "",
        "The network is told which pixels are cells and asked only for their class; scores are over the cell pixels",
        "of the same fine crops. Required at full size: mDSC < 0.57 with the small field of view, > 0.88 with the",
        "large one.",
        "",
        "| variant | field of view | accuracy | Dice outer | Dice inner | mDSC | required | outer share | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        required = LIMITS[str(row["field"])] if row["variant"] == "full" else ""
        lines.append(
            "| {variant} | {field_px} px | {accuracy:.3f} | {dice_outer:.3f} | {dice_inner:.3f} | {mdsc:.3f} | ".format(
                **row
            )
            + "{required} | {outer_share:.3f} | {minutes:.1f} |".format(required=required, **row)
        )
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=("full", "small"), default=["full", "small"])
    parser.add_argument("--fields", nargs="+", choices=("fine", "coarse"), default=["fine", "coarse"])
    parser.add_argument("--train-images", type=int, default=250)
    parser.add_argument("--test-images", type=int, default=60)
    parser.add_argument("--train-crops", type=int, default=3000)
    parser.add_argument("--test-crops", type=int, default=720)
    parser.add_argument(
        "--epochs", type=int, nargs=2, default=[20, 8], help="of the fine and of the coarse field of view"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--warp-scale", type=float, default=1.0, help="multiply the warp's amplitude, to see the effect"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "synthetic_leak_probe.md")
    return parser.parse_args()


def main() -> None:
    """Run the probe and write its page, and beside it the rows as JSON."""
    args = parse_arguments()
    rows = [row for variant in args.variants for row in probe(variant, args)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(report(rows, args))
    args.output.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    print(report(rows, args))


if __name__ == "__main__":
    main()
