"""Processor time of `muvit predict` beyond the model, on one core: where it goes, and its share of the whole.

    python benchmarks/predict_overhead.py --model demo --size 4096 --output build/predict_overhead.md

Weights are random: time does not depend on them. Seconds are processor time of the process and all its threads, which
other work on the machine changes little. The model is everything inside ``label_logits``.
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from markdown_table import markdown_table

from muvit.data import PyramidWriter
from muvit.data.crops.normalize import Percentile, Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.open import open_slide
from muvit.inference.predict import plan_prediction, run_prediction
from muvit.inference.run.execution import Execution
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import TrainedModel

PARTS = {  # cumulative time of the function that does each part
    "choosing tiles": ("tiles.py", "computed_tiles"),
    "placing tiles": ("tiles.py", "tile"),
    "reading and decoding": ("slide.py", "read"),
    "normalising": ("normalize.py", "__call__"),
    "batching": ("reading.py", "_collate"),
    "blending": ("canvas.py", "add"),
    "outputs of a block": ("canvas.py", "finish"),
    "writing and hashing shards": ("store.py", "write_block"),
    "coarser levels and publishing": ("store.py", "finish"),
}


def build(kind: str) -> TrainedModel[Segmenter]:
    """The model of the demo, or the paper's encoder with its decoder of fewer channels."""
    torch.manual_seed(0)
    if kind == "demo":
        encoder = EncoderConfig(in_channels=1, levels=(1, 4), dim=128, num_layers=4, heads=4, rotary_base=100)
        config = SegmenterConfig(encoder=encoder, num_classes=3, decoder_widths=(32, 16, 16, 8), stem_width=8)
        crop, normalization = (64, 64), Range(high=255)
    else:
        encoder = EncoderConfig(in_channels=1, levels=(1, 8, 32))
        config = SegmenterConfig(encoder=encoder, num_classes=3, decoder_widths=(256, 128, 64, 64))
        crop, normalization = (256, 256), Percentile()
    preprocessing = Preprocessing(
        crop_size=crop,
        normalization=normalization,
        class_names=("background", "one", "two"),
        class_colors=((0, 0, 0), (255, 0, 0), (0, 255, 0)),
    )
    return TrainedModel(model=Segmenter(config), preprocessing=preprocessing)


@contextmanager
def timed_model(model: Segmenter) -> Iterator[list[float]]:
    """Seconds of each forward pass, of the thread that computes it."""
    forward, spent = model.label_logits, []

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.thread_time()
        logits = forward(*arguments, **options)
        spent.append(time.thread_time() - began)
        return logits

    model.label_logits = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        del model.label_logits


def measure(kind: str, size: int, folder: Path, profile: cProfile.Profile | None = None) -> dict[str, float]:
    """Seconds of planning, of the run, and of the model in it."""
    slide, trained = open_slide(folder / "slide.ome.zarr"), build(kind)
    output = folder / f"{kind}.ome.zarr"
    began = time.process_time()
    job = plan_prediction(
        trained.model, slide, output, trained.preprocessing, execution=Execution(device="cpu"), overwrite=True
    )
    planned = time.process_time()
    with timed_model(trained.model) as spent:
        if profile is not None:
            profile.enable()
        run_prediction(job, Execution(device="cpu"), overwrite=True)
        if profile is not None:
            profile.disable()
    total = time.process_time() - planned
    return {
        "plan": planned - began,
        "model": sum(spent),
        "beyond": total - sum(spent),
        "tiles": len(job.store.plan.tiling),
    }


def parts(profile: cProfile.Profile) -> dict[str, float]:
    """Cumulative seconds of each part in a profile (of the main thread)."""
    found = dict.fromkeys(PARTS, 0.0)
    for (file, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        for part, (name, wanted) in PARTS.items():
            if function == wanted and Path(file).name == name and "muvit" in file:
                found[part] += cumulative
    return found


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=["demo", "paper"], default=["demo"])
    parser.add_argument("--size", type=int, default=4096, help="edge of the slide in pixels")
    parser.add_argument("--profile", action="store_true", help="also where the time goes, in a run of its own")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, text = [], []
    with TemporaryDirectory() as name:
        folder, size = Path(name), arguments.size
        writer = PyramidWriter.create(
            folder / "slide.ome.zarr", shape=(size, size), num_channels=1, dtype=np.uint8, levels=(1, 4, 8, 32)
        )
        for start, extent in writer.shards():
            pixels = np.random.default_rng(start).normal(120, 30, (1, *extent)).clip(0, 255)
            writer.write(start, pixels.astype(np.uint8))
        writer.finish()
        for kind in arguments.model:
            found = measure(kind, size, folder)
            share = found["beyond"] / found["model"]
            rows.append(
                [kind, str(int(found["tiles"]))]
                + [f"{found[name]:.2f}" for name in ("plan", "model", "beyond")]
                + [f"{1e3 * found['beyond'] / found['tiles']:.2f}", f"{share:.0%}"]
            )
            if arguments.profile:
                profile = cProfile.Profile()
                measure(kind, size, folder, profile)
                listed = sorted(parts(profile).items(), key=lambda part: -part[1])
                text.append(f"\n{kind}, under the profiler, which slows Python code down:\n")
                text.append(markdown_table(["part", "s"], [[part, f"{seconds:.2f}"] for part, seconds in listed]))
    header = ["model", "tiles", "plan [s]", "model [s]", "beyond [s]", "beyond per tile [ms]", "beyond / model"]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join([markdown_table(header, rows), *text]) + "\n")
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()
