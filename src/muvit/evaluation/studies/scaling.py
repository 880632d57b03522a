"""Run time and peak memory against the number of levels and the size of the crops (MuViT supplement, figure S4)."""

import ctypes
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch import Tensor

from muvit.errors import InputError
from muvit.evaluation.charts import Line, draw_lines, new_figure, to_image
from muvit.evaluation.results import Row
from muvit.geometry import naive_boxes
from muvit.inference.run.execution import resolve_device
from muvit.levels import Level, level_name
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.progress import Progress

_MIB = 2**20
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Measured sizes; the level sets are the paper's."""

    level_sets: tuple[tuple[float, ...], ...] = ((1,), (1, 8), (1, 8, 32))
    """Levels of each model."""
    sizes: tuple[int, ...] | None = None
    """Sides of the crops in pixels; unset, 128 to 1024 beside a GPU, and 64 to 256 on a CPU."""
    batch_size: int = 1
    """Samples per step."""
    repeats: int = 5
    """Steps whose median is told, after one that is not."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "level_sets", tuple(tuple(levels) for levels in self.level_sets))
        if not self.level_sets:
            raise InputError("level_sets", expected="at least one set of levels", got="none")
        if self.sizes is not None and (not self.sizes or min(self.sizes) < 1):
            raise InputError("sizes", expected="positive numbers of pixels", got=self.sizes)
        for name in ("batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(name, expected="a positive number", got=getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One model at one size."""

    levels: tuple[Level, ...]
    """Levels of the model."""
    size_px: int
    """Side of its crops."""
    num_tokens: int
    """Tokens of a sample."""
    is_training: bool
    """Forward and backward pass, instead of the forward pass alone."""
    seconds: float
    """Median time of a step; NaN if memory did not suffice."""
    peak_mib: float
    """Memory beyond what the model and its input hold: of the device, or of the process on a CPU; NaN if memory did not
    suffice, or the system does not tell (other systems than Linux, without a GPU)."""


def measure_scaling(
    model: SegmenterConfig,
    config: ScalingConfig | None = None,
    *,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Time segmenters with random weights on random images, forward alone, and forward and backward.

    Args:
        model: the segmenter; its levels are those of ``config`` in turn.
        config: level sets, sizes and repeats.
        device: where to compute; by default CUDA if there is any, else the CPU. On CUDA the passes run under bfloat16
            autocast, as in training.
        progress: called after each measurement.

    Raises:
        InputError: a size is no multiple of the patch, or a setting does not fit.
    """
    config, target = ScalingConfig() if config is None else config, resolve_device(device)
    sizes = config.sizes or ((128, 256, 512, 1024) if target.type == "cuda" else (64, 128, 256))
    for size in sizes:
        if any(size % p for p in model.encoder.patch):
            raise InputError("sizes", expected=f"multiples of the patch {model.encoder.patch}", got=size)
    measured: list[Measurement] = []
    for levels in config.level_sets:
        config_of_levels = replace(model, encoder=replace(model.encoder, levels=levels))
        segmenter = Segmenter(config_of_levels).to(target)
        for size in sizes:
            for is_training in (False, True):
                measured.append(_measure(segmenter, size, is_training, config))
                if progress is not None:
                    progress(len(measured), 2 * len(sizes) * len(config.level_sets))
        del segmenter
    return measured


def scaling_rows(measured: Sequence[Measurement]) -> list[Row]:
    """Lines of a table."""
    return [
        {
            "levels": ",".join(map(level_name, m.levels)),
            "size_px": m.size_px,
            "tokens": m.num_tokens,
            "pass": "forward and backward" if m.is_training else "forward",
            "seconds": m.seconds,
            "peak_mib": m.peak_mib,
        }
        for m in measured
    ]


def draw_scaling(measured: Sequence[Measurement]) -> Image.Image:
    """Four charts: time and memory, of the forward pass and of training, against the number of levels."""
    figure, axes = new_figure(10, 7.5, columns=2, rows=2)
    for row, (field, ylabel) in enumerate((("seconds", "median time of a step, s"), ("peak_mib", "peak memory, MiB"))):
        for column, is_training in enumerate((False, True)):
            lines = {}
            for size in sorted({m.size_px for m in measured}):
                chosen = [m for m in measured if m.size_px == size and m.is_training == is_training]
                values = [getattr(m, field) for m in chosen]
                lines[f"{size} px"] = Line([len(m.levels) for m in chosen], values)
            ax = axes[row, column]
            draw_lines(ax, lines, xlabel="number of levels", ylabel=ylabel)
            if any(y > 0 for line in lines.values() for y in line.y):
                ax.set_yscale("log")
            ax.set_xticks(sorted({len(m.levels) for m in measured}))
            ax.set_title("forward and backward" if is_training else "forward", fontsize="medium")
            if (row, column) == (0, 1):
                ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
            else:
                ax.get_legend().remove()
    return to_image(figure)


def _measure(model: Segmenter, size: int, is_training: bool, config: ScalingConfig) -> Measurement:
    encoder, device = model.config.encoder, next(model.parameters()).device
    space = (size,) * encoder.ndim
    seconds, peak = float("nan"), float("nan")
    try:
        img = torch.rand(config.batch_size, len(encoder.levels), encoder.channels, *space, device=device)
        bbox = naive_boxes(encoder.levels, space).expand(len(img), -1, -1, -1).to(device)
        model.train(is_training)
        _step(model, img, bbox, is_training)
        before = _reset_peak(device)
        times = [_timed_step(model, img, bbox, is_training) for _ in range(config.repeats)]
        seconds, peak = median(times), (_peak(device) - before) / _MIB
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    grid = 1
    for n, p in zip(space, encoder.patch, strict=True):
        grid *= n // p
    return Measurement(
        levels=encoder.levels,
        size_px=size,
        num_tokens=len(encoder.levels) * grid,
        is_training=is_training,
        seconds=seconds,
        peak_mib=peak,
    )


def _timed_step(model: Segmenter, img: Tensor, bbox: Tensor, is_training: bool) -> float:
    _wait(img.device)
    began = time.perf_counter()
    _step(model, img, bbox, is_training)
    _wait(img.device)
    return time.perf_counter() - began


def _step(model: Segmenter, img: Tensor, bbox: Tensor, is_training: bool) -> None:
    is_cuda = img.device.type == "cuda"
    with torch.set_grad_enabled(is_training), torch.autocast(img.device.type, torch.bfloat16, enabled=is_cuda):
        logits = model.label_logits(img, bbox)
    if is_training:
        logits.float().square().mean().backward()
        model.zero_grad(set_to_none=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> float:
    """Forget the peak so far; the bytes in use now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not sys.platform.startswith("linux"):
        return float("nan")
    # what was freed goes back to the system, or it would hide what the next step takes
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _RESET.write_text("5")  # man 5 proc: the high-water mark of the resident set starts anew
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    """Most bytes in use since `_reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if sys.platform.startswith("linux") else float("nan")


def _status(name: str) -> float:
    """A number of bytes that Linux tells of this process."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024.0 * int(line.split()[1])
