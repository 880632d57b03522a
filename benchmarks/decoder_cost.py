"""What the segmentation decoders cost: parameters, and floating-point operations for one 256-px crop.

    python benchmarks/decoder_cost.py

Nothing is computed: the operations are counted on tensors without content. Seconds on one core.
"""

from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig

CROP, CLASSES, LEVELS = 256, 12, (1, 8, 32)
DECODERS: tuple[Literal["unetr", "mask2former"], ...] = ("unetr", "mask2former")
WIDTHS: tuple[Literal["paper", "slim"] | tuple[int, ...], ...] = (
    "paper",
    "slim",
    (256, 128, 64, 64),
    (256, 128, 64, 32),
)


def gflop(model: Segmenter) -> dict[str, float]:
    """GFLOP of each module of a segmenter and of all (``Global``), for one crop; a multiply and an add are two."""
    model.to("meta").eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, len(model.encoder.levels), 1, CROP, CROP, device="meta"))
    return {name: sum(counts.values()) / 1e9 for name, counts in counter.get_flop_counts().items()}


def size(module: torch.nn.Module) -> float:
    """Millions of parameters."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def main() -> None:
    """Print the table, and the encoder's share."""
    print("| decoder | widths | stem | decoder, M parameters | model, M parameters | decoder, GFLOP | queries, GFLOP |")
    print("|---|---|---|---|---|---|---|")
    for decoder in DECODERS:
        for widths in WIDTHS:
            encoder = EncoderConfig(in_channels=1, levels=LEVELS)
            stem = 64 if widths == "paper" else 32
            model = Segmenter(
                SegmenterConfig(
                    encoder=encoder, num_classes=CLASSES, decoder=decoder, decoder_widths=widths, stem_width=stem
                )
            )
            cost = gflop(model)
            name = f"{widths}: " if isinstance(widths, str) else ""
            sizes = [f"{size(model) - size(model.encoder):.2f}", f"{size(model):.2f}"]
            costs = [
                f"{cost['Global'] - cost['Segmenter.encoder']:.1f}",
                f"{cost.get('Segmenter.query_decoder', 0):.1f}",
            ]
            print(f"| {decoder} | {name}{', '.join(map(str, model.config.widths))} | {stem} | ", end="")
            print(" | ".join(sizes + costs), "|")
    print()
    for levels in ((1,), LEVELS):
        model = Segmenter(SegmenterConfig(encoder=EncoderConfig(in_channels=1, levels=levels), num_classes=CLASSES))
        cost = gflop(model)["Segmenter.encoder"]
        print(f"- encoder of levels {levels}: {size(model.encoder):.2f} M parameters, {cost:.1f} GFLOP.")


if __name__ == "__main__":
    main()
