"""Compare this package with release 0.1.0, which has the same import name and therefore lives in its own environment.

Builds that environment, runs the release's own test suite, unmodified, against this package, saves models of every kind
there, loads them here, and prints the largest differences of encoder features, loss and reconstruction.

    python benchmarks/parity_with_release.py                        # builds the environment in a temporary folder
    python benchmarks/parity_with_release.py --release-python PATH  # uses one that is there

Needs a package index for the release and its source archive. Minutes on two cores.
"""

import argparse
import datetime
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from release import RELEASE, build_environment, call

REPOSITORY = Path(__file__).parents[1]
RESULT = REPOSITORY / "benchmarks" / "results" / "parity_with_release.md"
TOLERANCE = 1e-4

SPACE = {2: (32, 32), 3: (8, 16, 16), 4: (4, 8, 8, 8)}
ROTARY_MODES = ("none", "fixed", "shared", "per_layer")
DECODER_MODES = ("multi", "multi_iso", "single")
CASES = list(itertools.product(SPACE, ROTARY_MODES, DECODER_MODES))
QUANTITIES = ("features", "loss", "output", "reconstruction")


def main() -> int:
    """Run everything; 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release-python", type=Path, help="interpreter of an environment that has release 0.1.0")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # how the script calls itself over there
    arguments = parser.parse_args()
    if arguments.record is not None:
        record(arguments.record)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        python = (arguments.release_python or build_environment(folder / "release")).absolute()
        tests = run_release_tests(folder)
        versions = call(python, __file__, "--record", folder / "models").splitlines()[-1].split()
        rows = [(*case, *compare(folder / "models", *case)) for case in CASES]
    text = report(tests, versions, rows)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text)
    print(text)
    return int(max(max(row[3:]) for row in rows) > TOLERANCE or "failed" in tests)


def run_release_tests(folder: Path) -> str:
    """Run the tests of the release's source archive against this package; pytest's summary line."""
    pip = folder / "pip"
    call(sys.executable, "-m", "venv", pip)
    call(
        pip / "bin" / "python",
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--dest",
        folder,
        RELEASE,
    )
    with tarfile.open(next(folder.glob("muvit-*.tar.gz"))) as archive:
        archive.extractall(folder / "source", filter="data")
    # away from the release's code, which stands beside them
    tests = Path(shutil.copytree(next((folder / "source").glob("*/tests")), folder / "tests"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        os.devnull,
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tests,
        tests,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return re.sub(r" in .*", "", done.stdout.strip().splitlines()[-1])


def record(folder: Path) -> None:
    """In the release's environment: save models, inputs and outputs."""
    import muvit.mae

    folder.mkdir()
    for ndim, rotary, decoder in CASES:
        torch.manual_seed(0)
        model = getattr(muvit.mae, f"MuViTMAE{ndim}d")(
            in_channels=2,
            levels=(1, 4),
            patch_size=4,
            num_layers=3,
            dim=128,
            heads=2,
            dim_decoder=128,
            rotary_mode=rotary,
            decoder_mode=decoder,
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # so that no two blocks rotate alike, as after training
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
        case = folder / f"{ndim}_{rotary}_{decoder}"
        model.save(case)
        img = torch.rand(2, 2, 2, *SPACE[ndim])
        lower = 50 * torch.rand(2, 2, 1, ndim)
        extent = torch.tensor(SPACE[ndim]) * torch.tensor([1.0, 4.0])[None, :, None, None]
        content = {"img": img, "bbox": torch.cat([lower, lower + extent], 2)}
        for name, bbox in (("without boxes", None), ("with boxes", content["bbox"])):
            with torch.no_grad():
                content[f"features {name}"] = model.encoder.compute_features(img, bbox)
                torch.manual_seed(3)
                *_, visible, masked = model.encoder.forward_masked(img, bbox)
                torch.manual_seed(3)  # so that the same mask is drawn again
                result = model(img, bbox, return_all=True)
            content[f"order {name}"] = torch.cat([visible, masked], 1)
            content[f"visible {name}"] = torch.tensor(visible.shape[1])
            for quantity, key in (("loss", "loss"), ("output", "output"), ("reconstruction", "reco")):
                content[f"{quantity} {name}"] = result[key]
        torch.save(content, case / "outputs.pt")
    print(version("muvit"), torch.__version__)


def compare(folder: Path, ndim: int, rotary: str, decoder: str) -> tuple[float, ...]:
    """Here: load a model of the release; the largest relative difference of each quantity, with and without boxes."""
    import muvit.mae
    from muvit.models.masking import TokenMask

    case = folder / f"{ndim}_{rotary}_{decoder}"
    model = getattr(muvit.mae, f"MuViTMAE{ndim}d").from_folder(case).eval()
    content = torch.load(case / "outputs.pt", weights_only=True)
    worst = dict.fromkeys(QUANTITIES, 0.0)
    for name, bbox in (("without boxes", None), ("with boxes", content["bbox"])):
        with torch.no_grad():
            mask = TokenMask(content[f"order {name}"], int(content[f"visible {name}"]))
            result = model(content["img"], bbox, return_all=True, mask=mask)
            ours = {"features": model.encoder.compute_features(content["img"], bbox), "loss": result["loss"]}
        ours |= {"output": result["output"], "reconstruction": result["reco"]}
        for quantity in QUANTITIES:
            theirs = content[f"{quantity} {name}"]
            difference = ((ours[quantity] - theirs).abs().max() / theirs.abs().max()).item()
            worst[quantity] = max(worst[quantity], difference)
    return tuple(worst[quantity] for quantity in QUANTITIES)


def report(tests: str, versions: list[str], rows: list[tuple]) -> str:
    """The result as a Markdown page."""
    lines = [
        "# Parity with release 0.1.0",
        "",
        f"{datetime.date.today()}, `python benchmarks/parity_with_release.py`, {platform.machine()} CPU, fp32.",
        f"Here: muvit {version('muvit')}, torch {torch.__version__}, Python {platform.python_version()}. "
        f"Release: muvit {versions[0]}, torch {versions[1]}.",
        "",
        f"The release's own test suite, unmodified, against this package: **{tests}**.",
        "",
        "Models saved by the release and loaded here (3 blocks, dim 128, levels 1 and 4, two channels), each with and "
        "without boxes, under the release's masks. Largest differences relative to the largest value:",
        "",
        f"| axes | rotary mode | decoder mode | {' | '.join(QUANTITIES)} |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(map(str, row[:3]))} | {' | '.join(f'{value:.1e}' for value in row[3:])} |" for row in rows),
        "",
        f"Largest of all: {max(max(row[3:]) for row in rows):.1e}; allowed: {TOLERANCE:.0e}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
