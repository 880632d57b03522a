"""Steps until a model reads the one cell of a context view in which its fine view lies, by rotary start.

    python benchmarks/place_lookup.py --seeds 4

The context view shows 16 cells, each bright or dark at random; the fine view shows noise, and its class is the cell at
its place. Training ends when the mean loss of ten steps is below 0.2 (guessing has 0.69).
"""

import argparse
from statistics import mean

import torch
from markdown_table import markdown_table
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.training.optim import OptimConfig, build_optimizer, build_schedule

BATCH, SIDE, CELLS, LEVEL = 16, 16, 4, 4
STARTS = {"base 10000": 10000.0, "base 100": 100.0, "periods 8 to 128": (8.0, 128.0)}
THRESHOLD, WINDOW = 0.2, 10


def scenes(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Views ``(B, 2, 1, 16, 16)``, boxes ``(B, 2, 2, 2)`` and labels ``(B, 16, 16)``."""
    cells = torch.randint(2, (BATCH, CELLS, CELLS), generator=generator)
    where = torch.randint(CELLS, (BATCH, 2), generator=generator)
    img = torch.randn(BATCH, 2, 1, SIDE, SIDE, generator=generator)
    side = SIDE // CELLS
    img[:, 1, 0] += 2.0 * (2 * cells - 1).repeat_interleave(side, 1).repeat_interleave(side, 2)
    lower = torch.stack((1.0 * SIDE * where, torch.zeros(BATCH, 2)), 1)
    bbox = torch.stack((lower, lower + torch.tensor([[1.0 * SIDE], [1.0 * SIDE * LEVEL]])), 2)
    label = cells[torch.arange(BATCH), where[:, 0], where[:, 1]][:, None, None]
    return img, bbox, label.expand(-1, SIDE, SIDE).contiguous()


def steps_needed(start: float | tuple[float, float], optim: OptimConfig, seed: int, num_steps: int) -> int | None:
    """Steps until the loss is below the threshold; None if that takes more than ``num_steps``."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = EncoderConfig(
        in_channels=1,
        levels=(1, LEVEL),
        patch_size=4,
        dim=64,
        num_layers=2,
        heads=4,
        level_embed_std=0.02,
        rotary_base=start,
    )
    model = Segmenter(SegmenterConfig(encoder=encoder, num_classes=2, decoder_widths=(16, 8, 8), stem_width=4))
    optimizer = build_optimizer(model, model.encoder, optim)
    schedule = build_schedule(optimizer, num_steps, 0.05)
    losses: list[float] = []
    for step in range(num_steps):
        img, bbox, label = scenes(generator)
        loss = cross_entropy(model(img, bbox), label)
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step >= WINDOW and mean(losses[-WINDOW:]) < THRESHOLD:
            return step
    return None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="number of seeds")
    parser.add_argument("--steps", type=int, default=200, help="most steps of a training")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optim = OptimConfig(lr=arguments.lr, encoder_lr_factor=1.0)
    rows = []
    for name, start in STARTS.items():
        needed = [steps_needed(start, optim, seed, arguments.steps) for seed in range(arguments.seeds)]
        rows.append([name, *(f"more than {arguments.steps}" if n is None else str(n) for n in needed)])
    print(markdown_table(["start of the frequencies", *(f"seed {seed}" for seed in range(arguments.seeds))], rows))


if __name__ == "__main__":
    main()
