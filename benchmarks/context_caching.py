"""What it costs to encode one tile of a slide with all its context, and what is left when the context is cached.

The paper's encoder (12 blocks of width 512), 256-px crops of levels 1, 8 and 32, on a virtual slide of random pixels of
32768 x 32768 px, in five ways:

- ``full``: full attention.
- ``full, finest``: full attention; the last block computes only the tokens that the decoder reads.
- ``coarse to fine``: a token attends to its own and coarser levels; everything is computed for each tile.
- ``cached``: the same, with the coarse crops on a grid of half-crop steps, each encoded once and then reused.
- ``cached, copies``: the same, with copies of the coarse tokens under the tile, which see its tokens.

A round encodes the same tile in every way, in an order that changes from round to round; the table has medians over the
rounds. Seconds are those of the processor, summed over its cores, which other work does not change; on a GPU, those of
the clock. The cached way adds to the time of a tile its share of the coarse crops, as many as the plan of the slide has
(those that two blocks of the output share are counted twice, as they are encoded twice).

    python benchmarks/context_caching.py
    python benchmarks/context_caching.py --device cuda --precision bfloat16 --batch 16
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from muvit.inference.tiling.tiles import TilePlan
from muvit.models.context import encode_context, encode_in_context
from muvit.models.encoder import EncoderConfig, MuViTEncoder

LEVELS, CROP, SIDE, BLOCK = (1, 8, 32), 256, 32768, 4096
TILES_PER_GIGAPIXEL = 1e9 / CROP**2
FULL, FINEST, SLICED, CACHED, COPIES = "full", "full, finest", "coarse to fine", "cached", "cached, copies"


def contexts_per_tile() -> list[float]:
    """How many crops of each coarse level are encoded for each tile of the slide, finest of them first."""
    shapes = tuple((SIDE // level,) * 2 for level in LEVELS)
    plan = TilePlan(shapes=shapes, levels=LEVELS, crop_size=(CROP,) * 2, block_size=(BLOCK,) * 2, placement="grid")
    counts = [0] * (len(LEVELS) - 1)
    for block in range(plan.num_blocks):
        windows = [plan.tile(number).windows for number in plan.computed_tiles(block)]
        for level in range(1, len(LEVELS)):
            counts[level - 1] += len({crops[level:] for crops in windows})
    return [count / len(plan) for count in counts]


def scenes(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Views ``(B, L, 3, 256, 256)`` and boxes of tiles of the slide that share their coarse crops."""
    img = torch.randn(1, len(LEVELS), 3, CROP, CROP, generator=generator).repeat(batch, 1, 1, 1, 1)
    img[:, 0] = torch.randn(batch, 3, CROP, CROP, generator=generator)
    lower = torch.tensor([[16384.0, 16384], [15360, 15360], [12288, 12288]]).repeat(batch, 1, 1)
    lower[:, 0] += CROP * torch.randint(4, (batch, 2), generator=generator)
    return img, torch.stack([lower, lower + CROP * torch.tensor(LEVELS)[:, None]], dim=2)


def ways(
    full: MuViTEncoder, sliced: MuViTEncoder, copying: MuViTEncoder, img: Tensor, bbox: Tensor
) -> dict[str, Callable[[], object]]:
    """Everything that is timed, by name; each call encodes the views, or for ``level 8`` and ``32`` one coarse crop."""
    one = slice(1)
    coarsest = encode_context(sliced, img[one, 2:], bbox[one, 2:])
    context = encode_context(sliced, img[one, 1:2], bbox[one, 1:2], coarsest)
    return {
        FULL: lambda: full(img, bbox),
        FINEST: lambda: full.encode(img, bbox, only_finest=True),
        SLICED: lambda: sliced(img, bbox),
        CACHED: lambda: encode_in_context(sliced, img[:, :1], bbox[:, :1], context),
        COPIES: lambda: encode_in_context(copying, img[:, :1], bbox[:, :1], context),
        "level 8": lambda: encode_context(sliced, img[one, 1:2], bbox[one, 1:2], coarsest),
        "level 32": lambda: encode_context(sliced, img[one, 2:], bbox[one, 2:]),
    }


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of a call: by the clock on a GPU, of the processor on a CPU."""
    if device.type == "cpu":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize()
    clock = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - clock


def gflop(run: Callable[[], object]) -> float:
    """Floating-point operations of a call; a multiply and an add are two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def with_context(cost: dict[str, float], batch: int, shares: list[float]) -> dict[str, float]:
    """Cost per tile of each way; for the cached ones also with their share of the coarse crops."""
    tile = {name: cost[name] / batch for name in (FULL, FINEST, SLICED, CACHED, COPIES)}
    coarse = shares[0] * cost["level 8"] + shares[1] * cost["level 32"]
    return tile | {f"{name}, all told": tile[name] + coarse for name in (CACHED, COPIES)}


@torch.inference_mode()
def main() -> None:
    """Time, count, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1, help="tiles per call, which share their coarse crops")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    device, batch = arguments.device, arguments.batch
    torch.manual_seed(0)
    config = EncoderConfig(in_channels=3, levels=LEVELS)
    full = MuViTEncoder(config).to(device).eval()
    sliced = MuViTEncoder(replace(config, attention_mode="coarse_to_fine")).to(device).eval()
    copying = MuViTEncoder(replace(config, attention_mode="coarse_to_fine", coarse_copies="under")).to(device).eval()
    for other in (sliced, copying):
        other.load_state_dict(full.state_dict(), strict=False)  # copies have a vector of their own
    generator, times = torch.Generator().manual_seed(0), []
    half = torch.autocast(device.type, torch.bfloat16) if arguments.precision == "bfloat16" else nullcontext()
    with half:
        for number in range(arguments.rounds + 1):
            runs = ways(full, sliced, copying, *(t.to(device) for t in scenes(batch, generator)))
            names = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]
            times.append({name: seconds(runs[name], device) for name in names})
        work = {name: gflop(run) for name, run in runs.items()}
        whole, alone = runs[SLICED](), runs[CACHED]()
    difference = (whole[0][:, : alone[0].shape[1]] - alone[0]).abs().max().item()  # type: ignore[index]
    median = {name: statistics.median(row[name] for row in times[1:]) for name in times[0]}  # the first warms up
    paired = statistics.median(row[FULL] / row[CACHED] for row in times[1:])
    shares = contexts_per_tile()
    took, flop = with_context(median, batch, shares), with_context(work, batch, shares)
    print(
        f"{arguments.rounds} rounds, {batch} tiles per call, {device}, {arguments.precision}, torch {torch.__version__}"
    )
    print(
        f"{torch.get_num_threads()} threads; coarse crops per tile: {', '.join(f'{share:.4f}' for share in shares)}\n"
    )
    print("| attention | seconds per tile | full / this | GFLOP per tile | full / this | PFLOP per gigapixel |")
    print("|---|---|---|---|---|---|")
    for name in took:
        cells = f"{took[name]:.3f} | {took[FULL] / took[name]:.2f} | {flop[name]:.1f} | {flop[FULL] / flop[name]:.2f}"
        print(f"| {name} | {cells} | {flop[name] * TILES_PER_GIGAPIXEL / 1e6:.2f} |")
    print(f"\nMedian over the rounds of full / cached, seconds of the same round: {paired:.2f}")
    print(f"Largest difference between tokens that were cached and uncached: {difference:.1e}")


if __name__ == "__main__":
    main()
