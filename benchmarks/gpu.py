"""Training and prediction on one GPU: this package against release 0.1.0, in under eight minutes.

A step of the masked autoencoder (levels 1, 8 and 32, 256-px crops, 12 blocks of width 512, B=48) in bfloat16, each
variant in a process of its own: the release; this package; its blocks compiled; its activations computed again. Tokens
are those of all views, masked ones too. MFU is the share of the device's arithmetic (``--peak-tflops``) that the
operations in matrix products and attention of one step are, counted once for all variants, without recomputed ones.

Then the loader: samples per second of nested crops from a slide on the disk, against those that the fastest step takes.
And a slide, from the file to the labels, with coarse crops that are encoded once, in seconds per gigapixel.

    python benchmarks/gpu.py                        # builds the release's environment in a temporary folder
    python benchmarks/gpu.py --release-python PATH  # uses one that is there; --no-release leaves it out
    python benchmarks/gpu.py --no-release --device cpu --batch 1 --steps 1 --crop 64 --layers 2 --slide-px 512
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from markdown_table import markdown_table
from release import RELEASE, build_environment
from speed import LEVELS, PATCH, Operations, scenes

RESULT = Path(__file__).parent / "results" / "gpu.md"
VARIANTS = {"release": "release 0.1.0", "here": "here", "compiled": "here, compiled", "recomputed": "here, recomputed"}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16 arithmetic; 989: H100 SXM")
    parser.add_argument("--release-python", type=Path, help="interpreter of an environment that has release 0.1.0")
    parser.add_argument("--no-release", action="store_true", help="leave the release out")
    parser.add_argument("--batch", type=int, default=48, help="samples of a step")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after as many untimed ones up to five")
    parser.add_argument("--crop", type=int, default=256, help="side of every view in pixels")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the encoder")
    parser.add_argument("--dim", type=int, default=512, help="token width of the encoder, twice that of the decoders")
    parser.add_argument("--workers", type=int, default=8, help="processes of the loader")
    parser.add_argument("--loader-samples", type=int, default=2048, help="samples that the loader is timed on")
    parser.add_argument("--slide-px", type=int, default=16384, help="side of the slide")
    parser.add_argument("--output", type=Path, default=RESULT, help="the table, in Markdown")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # how the script calls itself
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it."""
    options = parse(arguments)
    if options.variant is not None:
        print(json.dumps(measure_step(options.variant, options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        release = (
            None
            if options.no_release
            else options.release_python or build_environment(folder / "release", same_torch())
        )
        steps = {
            name: in_process(name, sys.executable if name != "release" else release)
            for name in VARIANTS
            if name != "release" or release is not None
        }
        slide = write_slide(folder / "slides", options)
        text = report(options, steps, measure_loader(slide, options), measure_slide(slide, folder, options))
    options.output.write_text(text)
    print(text)


def same_torch() -> str:
    """The version of torch that is installed here, for the release's environment."""
    return f"torch=={torch.__version__.partition('+')[0]}"


def in_process(variant: str, python: object) -> dict[str, float]:
    """`measure_step` in a process of its own, whose memory is that of the variant alone."""
    environment = dict(os.environ)
    if variant == "release":  # this package must not be found in its place
        environment.pop("PYTHONPATH", None)
    command = [str(python), "-W", "ignore", __file__, *sys.argv[1:], "--variant", variant]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


# -- the step ----------------------------------------------------------------------------------------------------------


def measure_step(variant: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak memory (GiB) of a step, and here its operations."""
    from muvit.mae import MuViTMAE2d

    torch.manual_seed(0)
    model = MuViTMAE2d(
        in_channels=1,
        levels=LEVELS,
        patch_size=PATCH,
        num_layers=options.layers,
        dim=options.dim,
        dim_decoder=options.dim // 2,
        heads=8,
    ).to(options.device)
    optimizer = prepare(variant, model, options)
    img, bbox = (t.to(options.device) for t in scenes(options))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(options.device, torch.bfloat16):
            loss = model(img, bbox)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    for _ in range(min(5, options.steps)):
        step()
    seconds = timed(lambda: [step() for _ in range(options.steps)], options.device) / options.steps
    found = {"seconds": seconds, "memory": peak_memory(options.device)}
    if variant == "here":
        with Operations() as counted:
            step()
        found["operations"] = counted.products + counted.attention
    return found


def prepare(variant: str, model: torch.nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer of each package's pre-training; and here the model as its run would prepare it."""
    if variant == "release":
        return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), lr=1e-4)
    from muvit.training.optim import PretrainOptimConfig, build_pretrain_optimizer
    from muvit.training.run_config import RunConfig
    from muvit.training.runs import prepare_model

    prepare_model(model, RunConfig(compile=variant == "compiled", checkpoint_activations=variant == "recomputed"))
    return build_pretrain_optimizer(model, PretrainOptimConfig(), options.batch)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of a work, until the device has done it."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def peak_memory(device: str) -> float:
    """Largest memory so far, in GiB: tensors on the GPU, or all of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# -- the loader and the slide ------------------------------------------------------------------------------------------


def write_slide(folder: Path, options: argparse.Namespace) -> Path:
    """A slide of noise with all levels, which compresses as badly as any, in a folder to train on."""
    from muvit.data.pyramids.writer import PyramidWriter

    side, path = options.slide_px, folder / "images" / "noise.ome.zarr"
    path.parent.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    writer = PyramidWriter.create(path, shape=(side, side), num_channels=1, dtype="uint8", levels=LEVELS)
    for y in range(0, side, 4096):
        for x in range(0, side, 4096):
            shape = (1, min(4096, side - y), min(4096, side - x))
            writer.write((y, x), torch.randint(256, shape, dtype=torch.uint8, generator=generator).numpy())
    writer.finish()
    return path


def measure_loader(slide: Path, options: argparse.Namespace) -> float:
    """Samples per second of nested crops, with all worker processes."""
    from muvit.models.encoder import EncoderConfig
    from muvit.models.mae import MAEConfig
    from muvit.training.datamodules import PretrainData
    from muvit.training.recipes import PretrainDataConfig, PretrainRecipe

    batches = max(1, options.loader_samples // options.batch)
    recipe = PretrainRecipe(
        data=PretrainDataConfig(
            train=str(slide.parents[1]),
            crop_size=options.crop,
            normalization={"kind": "range", "low": 0, "high": 255},
            samples_per_epoch=batches * options.batch,
            batch_size=options.batch,
            num_workers=options.workers,
        ),
        model=MAEConfig(encoder=EncoderConfig(in_channels=1, levels=LEVELS)),
    )
    loader = PretrainData(recipe).train_dataloader()
    return batches * options.batch / timed(lambda: [None for _ in loader], "cpu")


def measure_slide(slide: Path, folder: Path, options: argparse.Namespace) -> float:
    """Seconds per gigapixel from the file to the labels, tiles without overlap."""
    from muvit.data.crops.normalize import Range
    from muvit.data.crops.preprocessing import Preprocessing
    from muvit.data.slides.open import open_slide
    from muvit.inference.predict import predict_slide
    from muvit.inference.run.plan import PredictOptions
    from muvit.models.encoder import EncoderConfig
    from muvit.models.segmenter import Segmenter, SegmenterConfig

    encoder = EncoderConfig(
        in_channels=1,
        levels=LEVELS,
        num_layers=max(3, options.layers),
        dim=options.dim,
        attention_mode="coarse_to_fine",
    )
    model = Segmenter(SegmenterConfig(encoder=encoder, num_classes=3, decoder_widths="slim"))
    preprocessing = Preprocessing(
        crop_size=(options.crop,) * 2,
        normalization=Range(high=255),
        class_names=("a", "b", "c"),
        class_colors=((0, 0, 0), (255, 0, 0), (0, 0, 255)),
    )
    seconds = timed(
        lambda: predict_slide(
            model,
            open_slide(slide),
            folder / "labels.ome.zarr",
            preprocessing,
            options=PredictOptions(overlap=0.0, precision="bfloat16"),
            batch_size=options.batch,
            device=options.device,
            num_workers=options.workers,
        ),
        options.device,
    )
    return seconds / (options.slide_px**2 / 1e9)


def report(options: argparse.Namespace, steps: dict[str, dict[str, float]], loader: float, gigapixel: float) -> str:
    """The result as a Markdown page."""
    tokens = options.batch * len(LEVELS) * (options.crop // PATCH) ** 2
    operations, rows = steps["here"]["operations"], []
    for name, found in steps.items():
        share = operations / found["seconds"] / (1e12 * options.peak_tflops)
        against = f"{steps['release']['seconds'] / found['seconds']:.2f}" if "release" in steps else "-"
        numbers = [
            f"{found['seconds']:.3f}",
            f"{tokens / found['seconds']:.0f}",
            f"{share:.1%}",
            f"{found['memory']:.2f}",
        ]
        rows.append([VARIANTS[name], *numbers, against])
    needed = options.batch / min(found["seconds"] for found in steps.values())
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    lines = [
        "# Training and prediction on one device",
        "",
        f"{datetime.date.today()}, `python benchmarks/gpu.py`, {name}, bfloat16, torch {torch.__version__}, against "
        f"{RELEASE.replace('==', ' ')}. B={options.batch}, {options.crop}-px crops, {options.layers} blocks of width "
        f"{options.dim}; {operations / 1e12:.3f} TFLOP a step, {options.peak_tflops:.0f} TFLOP/s at most.",
        "",
        markdown_table(["variant", "s per step", "tokens/s", "MFU", "memory, GiB", "release / this"], rows),
        "",
        f"Loader: {loader:.0f} samples/s with {options.workers} processes, {loader / needed:.2f} times the "
        f"{needed:.0f} that the fastest step takes.",
        "",
        f"Slide of {options.slide_px} px, with coarse crops encoded once: {gigapixel:.1f} s per gigapixel.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
