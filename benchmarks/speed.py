"""Processor time and memory of this package against release 0.1.0, on one core and with the same torch.

Both run in processes of their own, which take turns, so that other work on the machine meets both alike. A step of the
masked autoencoder draws a mask, and runs forward, backward, clipping and AdamW; here with the defaults of ``muvit
pretrain``, there with those of the release's ``fit``. Times are those of the processor (`time.process_time`).

Two floors stand beside them. Both are the operations in matrix products and attention alone, at the rates that these
reach by themselves in the sizes of the step.

    python benchmarks/speed.py                        # builds the release's environment in a temporary folder
    python benchmarks/speed.py --release-python PATH  # uses one that is there

Needs a package index for the release. About ten minutes on an idle machine.
"""

import argparse
import datetime
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from markdown_table import markdown_table
from release import RELEASE, build_environment
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

RESULT = Path(__file__).parent / "results" / "speed.md"
LEVELS, PATCH = (1, 8, 32), 8
STEP, ENCODER, MEMORY = "MAE step", "encoder, all levels", "memory"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release-python", type=Path, help="interpreter of an environment that has release 0.1.0")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of runs of each work")
    parser.add_argument("--crop", type=int, default=256, help="side of every view in pixels")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the encoder")
    parser.add_argument("--dim", type=int, default=512, help="token width of the encoder, twice that of the decoders")
    parser.add_argument(
        "--batch", type=int, default=2, help="samples of a step; twice as many where memory is measured"
    )
    parser.add_argument("--output", type=Path, default=RESULT, help="the table, in Markdown")
    parser.add_argument("--serve", choices=["here", "release"], help=argparse.SUPPRESS)  # how the script calls itself
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it."""
    options = parse(arguments)
    if options.serve is not None:
        serve(options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        torch_here = f"torch=={torch.__version__.partition('+')[0]}"
        built = options.release_python or build_environment(Path(scratch) / "release", torch_here)
        text = report(options, measure(options, built.absolute()), floors(options))
    options.output.write_text(text)
    print(text)


# -- one of the two packages, in a process of its own ------------------------------------------------------------------


def serve(options: argparse.Namespace) -> None:
    """Do what is asked for, line by line on the standard input, and answer with a number."""
    torch.set_num_threads(1)
    works = build_works(options)
    print(torch.__version__, flush=True)
    for line in sys.stdin:
        if line.strip() == MEMORY:
            works[STEP]()
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)
            continue
        start = time.process_time()
        works[line.strip()]()
        print(time.process_time() - start, flush=True)


def build_works(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The works of either package, by its names of release 0.1.0."""
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
    )
    img, bbox = scenes(options)
    optimizer = build_optimizer(model, options)

    def step() -> None:
        optimizer.zero_grad()
        model(img, bbox)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    return {STEP: step, ENCODER: torch.no_grad()(lambda: model.encoder(img, bbox))}


def build_optimizer(model: torch.nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """That of each package's pre-training."""
    if options.serve == "release":
        return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), lr=1e-4)
    from muvit.training.optim import PretrainOptimConfig, build_pretrain_optimizer

    return build_pretrain_optimizer(model, PretrainOptimConfig(), options.batch)


def scenes(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Views ``(B, L, 1, side, side)`` with one common centre, and their boxes."""
    img = torch.rand(options.batch, len(LEVELS), 1, options.crop, options.crop)
    half = options.crop / 2 * torch.tensor(LEVELS)[:, None]
    centre = 10_000 + 1000 * torch.rand(options.batch, 1, 2).round(decimals=2)
    return img, torch.stack([centre - half, centre + half], dim=2)


# -- both, in turns ----------------------------------------------------------------------------------------------------


class Package:
    """One of the two packages, in a process of its own.

    Args:
        python: interpreter.
        name: ``here`` or ``release``.
        options: sizes.
    """

    def __init__(self, python: Path, name: str, options: argparse.Namespace) -> None:
        sizes = [f"--{key}={getattr(options, key)}" for key in ("crop", "layers", "dim", "batch")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if name == "release":  # this package must not be found in its place
            environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python, "-W", "ignore", __file__, "--serve", name, *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.torch = self.answer()

    def __enter__(self) -> "Package":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, work: str) -> float:
        """Do a work; its seconds, or the largest memory so far in MiB."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{work}\n")
        self.process.stdin.flush()
        return float(self.answer())

    def answer(self) -> str:
        """The next line that the process says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            sys.exit(f"{self.process.args} ended")
        return line


def measure(options: argparse.Namespace, release: Path) -> dict[str, list[tuple[float, float]]]:
    """Pairs (release, here) of the numbers of each work."""
    pythons = {"release": release, "here": Path(sys.executable)}
    found: dict[str, list[tuple[float, float]]] = {}
    with Package(release, "release", options) as theirs, Package(pythons["here"], "here", options) as ours:
        if theirs.torch.partition("+")[0] != ours.torch.partition("+")[0]:
            sys.exit(f"expected the same torch in both environments, got {theirs.torch} and {ours.torch}")
        for work in (STEP, ENCODER):
            theirs.ask(work), ours.ask(work)  # to warm up
            found[work] = [(theirs.ask(work), ours.ask(work)) for _ in range(options.rounds)]
    larger = argparse.Namespace(**vars(options) | {"batch": 2 * options.batch})
    peaks = []
    for name, python in pythons.items():
        with Package(python, name, larger) as package:
            peaks.append([package.ask(MEMORY) for _ in range(2)][-1])
    return found | {MEMORY: [(peaks[0], peaks[1])]}


# -- the floor ---------------------------------------------------------------------------------------------------------


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations of matrix products and of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attention = 0.0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.products += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        elif name.startswith("_scaled_dot_product"):
            is_backward = name.endswith("backward")
            query, key = args[1:3] if is_backward else args[:2]
            # two products forward, and five backward: the scores once more, and four gradients
            self.attention += (5 if is_backward else 2) * 2 * query.numel() * key.shape[2]
        return operation(*args, **kwargs or {})


def floors(options: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """Operations in matrix products and in attention of this package's works, and the seconds that these alone take."""
    torch.set_num_threads(1)
    works = build_works(argparse.Namespace(**vars(options) | {"serve": "here"}))
    tokens, found = len(LEVELS) * (options.crop // PATCH) ** 2, {}
    for work, count, is_trained in ((STEP, tokens // 4, True), (ENCODER, tokens, False)):
        with Operations() as counted:
            works[work]()
        seconds = counted.products / product_rate(options, count)
        seconds += counted.attention / attention_rate(options, count, is_trained=is_trained)
        found[work] = (counted.products, counted.attention, seconds)
    return found


def product_rate(options: argparse.Namespace, tokens: int) -> float:
    """Operations per second of the products of tokens and the weights of a feed-forward network."""
    x, weight = torch.rand(options.batch * tokens, options.dim), torch.rand(2 * options.dim, options.dim)
    return 2 * x.shape[0] * weight.numel() / fastest(lambda: torch.nn.functional.linear(x, weight))


def attention_rate(options: argparse.Namespace, tokens: int, *, is_trained: bool) -> float:
    """Operations per second of the encoder's attention, with its backward pass if it is trained."""
    shape = (options.batch, 8, tokens, options.dim // 8)
    q, k, v = (torch.rand(shape, requires_grad=is_trained) for _ in range(3))
    upstream = torch.rand(shape)

    def run() -> None:
        out = scaled_dot_product_attention(q, k, v)
        if is_trained:
            torch.autograd.grad(out, (q, k, v), upstream)

    with Operations() as counted:
        run()
    return counted.attention / fastest(run)


def fastest(work: Callable[[], Any]) -> float:
    """Least processor time of a few runs, in seconds."""
    seconds = []
    for _ in range(6):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def report(
    options: argparse.Namespace,
    found: dict[str, list[tuple[float, float]]],
    floor: dict[str, tuple[float, float, float]],
) -> str:
    """The result as a Markdown page."""
    rows = []
    for work in (STEP, ENCODER):
        theirs, ours = zip(*found[work], strict=True)
        ratios = [a / b for a, b in found[work]]
        rows.append([f"{work}, s", *map(spread, (theirs, ours, ratios)), f"{floor[work][2]:.2f}"])
    [(theirs, ours)] = found[MEMORY]
    rows.append(
        [
            f"peak memory of a step, MiB (B={2 * options.batch})",
            f"{theirs:.0f}",
            f"{ours:.0f}",
            f"{theirs / ours:.2f}",
            "",
        ]
    )
    counts = [[work, *(f"{number / 1e9:.0f}" for number in floor[work][:2])] for work in floor]
    lines = [
        "# Speed against release 0.1.0",
        "",
        f"{datetime.date.today()}, `python benchmarks/speed.py --rounds {options.rounds}`, {platform.machine()} CPU, "
        f"one core, float32. muvit {version('muvit')} against {RELEASE.replace('==', ' ')}, torch {torch.__version__}.",
        "",
        f"Levels {', '.join(map(str, LEVELS))}, {options.crop}-px crops, patches of {PATCH}, {options.layers} blocks "
        f"of width {options.dim} with 8 heads, decoders of 2 blocks of width {options.dim // 2}, B={options.batch}. "
        f"Medians (and ranges) of {options.rounds} pairs of runs that take turns.",
        "",
        markdown_table(["work", "release", "here", "release / here", "floor"], rows),
        "",
        "The floor is the time of the operations in matrix products and attention alone:",
        "",
        markdown_table(["work", "GFLOP in products", "GFLOP in attention"], counts),
        "",
    ]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
