"""``muvit doctor``."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from packaging.requirements import Requirement

from muvit.errors import MuViTError
from muvit.levels import level_factors, level_name
from muvit.version import __version__

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Finding:
    """A result of a check."""

    text: str
    """The fact."""
    remedy: str | None = None
    """Action against a fault; None: nothing is wrong."""


class UnhealthyError(MuViTError):
    """Something is wrong; the findings, already printed, say what."""


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "path", nargs="*", type=Path, help="images, model folders, runs or predictions to check as well"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every byte of stores that muvit wrote, and compare checksums"
    )


def run(arguments: Namespace) -> None:
    """Check installation, devices and paths, and print the findings."""
    sections = {"Installation": check_installation(), "Devices": check_devices()}
    sections |= {str(path): check_path(path, verify=arguments.verify) for path in arguments.path}
    faults = sum([_report(title, findings) for title, findings in sections.items()])
    if faults:
        raise UnhealthyError(f"{faults} {'thing is' if faults == 1 else 'things are'} wrong: see the lines with !!")
    print("Nothing is wrong.")


def _report(title: str, findings: Iterable[Finding]) -> int:
    """Print a section, and count its faults."""
    print(title)
    faults = 0
    for finding in findings:
        print(f"  {'!!' if finding.remedy else 'ok'}  {finding.text}")
        if finding.remedy:
            faults += 1
            print(f"      {finding.remedy}")
    return faults


def check_installation() -> Iterator[Finding]:
    """Versions of Python and of every package that muvit needs; extras that are there."""
    system = f"{platform.system()} {platform.machine()}"
    yield Finding(f"muvit {__version__}, Python {platform.python_version()}, {system}")
    needed, extras = _requirements()
    wrong = [finding for requirement in needed for finding in _check_package(requirement)]
    yield from wrong or [Finding(f"{len(needed)} required packages in suitable versions")]
    for extra, requirements in extras.items():
        missing = [r.name for r in requirements if _installed(r.name) is None]
        if missing:
            yield Finding(f"extra {extra}: without {', '.join(missing)} (pip install 'muvit[{extra}]')")
            continue
        faults = [finding for requirement in requirements for finding in _check_package(requirement)]
        yield from faults or [Finding(f"extra {extra}: installed")]


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """Requirements of muvit itself, and of each extra that names packages of others."""
    needed: list[Requirement] = []
    extras: dict[str, list[Requirement]] = {}
    for line in requires("muvit") or ():
        requirement = Requirement(line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if extra is None:
            needed.append(requirement)
        elif extra[1] != "all":  # the sum of the others
            extras.setdefault(extra[1], []).append(requirement)
    return needed, extras


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _check_package(requirement: Requirement) -> Iterator[Finding]:
    found = _installed(requirement.name)
    if found is None or not requirement.specifier.contains(found, prereleases=True):
        wanted = f"{requirement.name}{requirement.specifier}"
        state = "is not installed" if found is None else f"{found} is installed, {wanted} needed"
        yield Finding(f"{requirement.name} {state}", f"Run: {sys.executable} -m pip install '{wanted}'")


def check_devices() -> Iterator[Finding]:
    """CPU, memory and GPUs; each device computes a product that is compared with the true one."""
    import torch

    yield Finding(f"torch {torch.__version__}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
            yield Finding(f"cuda:{index}: {torch.cuda.get_device_name(index)}, {memory:.0f} GiB, {bf16}")
            yield from _check_product(torch.device("cuda", index))
    elif _has_nvidia_driver():
        build = "CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        yield Finding(
            f"there is an NVIDIA driver, but torch cannot use it ({build})",
            "Install a build of torch for your driver, as with: make setup TORCH=auto, or see pytorch.org.",
        )
    if torch.backends.mps.is_available():
        yield Finding("mps: Apple GPU")
        yield from _check_product(torch.device("mps"))
    yield from _check_product(torch.device("cpu"))


def _has_nvidia_driver() -> bool:
    program = shutil.which("nvidia-smi")
    return program is not None and subprocess.run([program], capture_output=True, check=False).returncode == 0


def _check_product(device: "torch.device") -> Iterator[Finding]:
    import torch

    remedy = "Reinstall torch, and update the driver of the device."
    values = torch.arange(64 * 64).reshape(64, 64).remainder(7)
    try:
        product_ = (values.float().to(device) @ values.float().to(device)).cpu().long()
    except RuntimeError as error:
        yield Finding(f"{device} cannot compute: {str(error).splitlines()[0]}", remedy)
        return
    if not torch.equal(product_, values @ values):
        yield Finding(f"{device} computes wrong results", remedy)


def check_path(path: Path, *, verify: bool = False) -> Iterator[Finding]:
    """Findings on an image, a model folder, a run or a prediction; with ``verify`` every byte of a store is read."""
    from muvit.data.pyramids.manifest import check_store
    from muvit.inference.run.resume import WORK
    from muvit.models.folder import CONFIG, model_folder

    is_model, is_unfinished = (model_folder(path) / CONFIG).is_file(), (path / WORK).is_dir()
    check = check_model if is_model else check_unfinished if is_unfinished else check_slide
    try:
        yield from check(path)
        if verify and path.is_dir() and check is check_slide:
            recorded = check_store(path, checksums=True)
            yield Finding(
                "every byte is as it was written" if recorded else "no checksums: not written by this version"
            )
    except MuViTError as error:
        yield Finding(str(error), "Mend what this sentence names, or take another copy.")


def check_model(path: Path) -> Iterator[Finding]:
    """Findings on a model folder or a run: weights that load and are finite, and outputs that are."""
    import torch

    from muvit.models.folder import load_settings, model_folder
    from muvit.models.segmentation_model import SegmentationModel
    from muvit.models.trained import load_model

    trained = load_model(path)
    model, preprocessing = trained.model, trained.preprocessing
    kind, _ = load_settings(model_folder(path))
    number = sum(p.numel() for p in model.parameters())
    yield Finding(f"model of kind {kind}, {number / 1e6:.2f} M parameters")
    shown = ", ".join(preprocessing.class_names) or "none"
    yield Finding(f"crops of {preprocessing.crop_size} px, classes: {shown}")
    broken = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        retrain = "Its training diverged: train it again with a lower optim.lr, or take an earlier checkpoint."
        yield Finding(f"weights that are not finite: {', '.join(broken[:3])}", retrain)
    elif isinstance(model, SegmentationModel):
        views, size = model.views, preprocessing.crop_size
        factors = torch.tensor([level_factors(level, views.ndim) for level in views.levels])
        bbox = torch.stack([torch.zeros_like(factors), factors * torch.tensor(size)], dim=1)[None]
        with torch.inference_mode():
            logits = model.label_logits(torch.zeros(1, len(views.levels), views.in_channels, *size), bbox.float())
        if not torch.isfinite(logits).all():
            yield Finding("its outputs on an empty image are not finite", "Train it again.")


def check_unfinished(path: Path) -> Iterator[Finding]:
    """Findings on a prediction that was stopped."""
    from muvit.inference.run.label_blocks import prediction_status

    status = prediction_status(path)
    yield Finding(
        f"unfinished prediction: {status.blocks} of {status.num_blocks} blocks are done",
        "Resume it with the command that began it.",
    )


def check_slide(path: Path) -> Iterator[Finding]:
    """Findings on an image or a label image: facts, and windows at the corners and in the middle of every level."""
    from muvit.data.slides.open import open_slide

    slide = open_slide(path)
    shape, levels = " x ".join(map(str, slide.shape)), ", ".join(map(level_name, slide.levels))
    yield Finding(f"{shape} px, {slide.num_channels} channels, {slide.dtype}, levels {levels}")
    if slide.pixel_size_um is None:
        yield Finding(
            "the pixel size is unknown: micrometers cannot be computed",
            "Convert it with --pixel_size_um, if you know its size.",
        )
    else:
        yield Finding(f"pixel size {' x '.join(f'{size:g}' for size in slide.pixel_size_um)} um")
    unread = []
    for level in slide.levels:
        extent = slide.level_shape(level)
        for place in product((0.0, 0.5, 1.0), repeat=len(extent)):
            size = tuple(min(256 if axis >= len(extent) - 2 else 1, n) for axis, n in enumerate(extent))
            start = tuple(int(f * (n - s)) for f, n, s in zip(place, extent, size, strict=True))
            try:
                slide.read(level, start, size)
            except MuViTError as error:
                unread.append(str(error))
    if unread:
        yield Finding(f"{len(unread)} windows cannot be read: {unread[0]}", "Copy or convert the file anew.")
    else:
        yield Finding("windows of every level can be read")
