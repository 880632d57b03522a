"""A recipe for labelled slides, chosen by facts about them and the machine, with the reason beside each setting."""

import os
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import floor, log2, log10
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.autograd.graph import saved_tensors_hooks

from muvit.data.tables import is_table
from muvit.geometry import naive_boxes
from muvit.levels import level_name
from muvit.losses import SegmentationLoss
from muvit.models.encoder import EncoderConfig
from muvit.models.folder import plain
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.trained import build_model
from muvit.settings import make_settings
from muvit.training.recipes import Recipe
from muvit.training.slides import complete
from muvit.training.survey import Survey

OBJECT_PX = 8
"""Pixels across the objects of the smallest class at the finest level, at least."""
_MAX_RATIO = 64
_PATCH = 8
_TIMED_BATCH = 2
_STEPS, _MAX_EPOCHS = 128, 200
_MIN_SPLIT = 3


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that trains."""

    has_gpu: bool
    """Whether it has a GPU that torch can use."""
    memory_bytes: int
    """Memory of the GPU, or of the machine without one."""
    cores: int
    """Cores of the processor."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A setting of a recipe."""

    path: str
    """Path of the setting, as ``model.encoder.levels``."""
    value: Any
    """Its value."""
    reason: str = ""
    """The reason for it."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a step of training, measured on this machine."""

    seconds_per_sample: float
    """Time of forward and backward pass of one sample."""
    bytes_per_sample: int
    """Activations of one sample that are kept between forward and backward pass."""
    parameters: int
    """Weights."""

    def memory_bytes(self, batch_size: int) -> int:
        """Memory of a step: weights, gradients and both moments of AdamW in float32, and what is kept of a batch."""
        return 16 * self.parameters + batch_size * self.bytes_per_sample


def this_machine() -> Machine:
    """The machine that this process runs on."""
    has_gpu = torch.cuda.is_available()
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    memory = torch.cuda.get_device_properties(0).total_memory if has_gpu else pages
    return Machine(has_gpu=has_gpu, memory_bytes=memory, cores=len(os.sched_getaffinity(0)))


def propose(
    survey: Survey,
    extent_px: float,
    machine: Machine,
    *,
    train: Path,
    val: Path | None,
    encoder: tuple[str, EncoderConfig] | None,
    hours: float,
) -> list[Choice]:
    """Every setting of a recipe that is not at its default, in the order in which they are written.

    Args:
        survey: the slides.
        extent_px: longest side of the tissue, in world pixels.
        machine: the machine, on which a step is measured.
        train: folder to train on.
        val: folder to validate on.
        encoder: a pre-trained encoder: its folder and its settings; None trains from random weights.
        hours: time to train for.

    Raises:
        InputError: the settings do not fit the slides.
    """
    config = None if encoder is None else encoder[1]
    validation = Choice(path="data.val", value=None if val is None else str(val))
    if val is None and not is_table(train) and len(survey.slides) >= _MIN_SPLIT:
        reason = "whole slides, each part with about its share of every class; name a folder as val to choose yourself"
        validation = Choice(path="data.split", value={"val": 0.2}, reason=reason)
    crop, *levels = choose_views(survey, extent_px, machine, config)
    data = [
        Choice(path="data.train", value=str(train)),
        validation,
        crop,
        choose_normalization(survey),
        *choose_sampling(survey),
    ]
    model = [Choice(path="model.kind", value="muvit"), *levels, *choose_model(survey, machine, config)]
    if encoder is not None:
        model.append(Choice(path="init.encoder", value=encoder[0], reason="weights to start from"))
    chosen = [*data, *model, *choose_rate(config)]
    cost = measure_cost(make_settings(nested(chosen), Recipe, subject="recipe"), machine)
    chosen += choose_length(cost, machine, hours)
    make_settings(nested(chosen), Recipe, subject="recipe")
    return chosen


def choose_views(survey: Survey, extent_px: float, machine: Machine, encoder: EncoderConfig | None) -> list[Choice]:
    """Levels of the views and their size in pixels.

    Args:
        survey: the slides.
        extent_px: longest side of the tissue, in world pixels.
        machine: the machine.
        encoder: a pre-trained encoder, whose levels are taken; None starts from scratch.
    """
    smallest = min(survey.foreground, key=lambda one: one.width_px)
    if encoder is None:
        finest = min(2 ** max(0, floor(log2(max(smallest.width_px, 1) / OBJECT_PX))), _MAX_RATIO)
    else:
        finest = int(min(level for level in encoder.levels if isinstance(level, int | float)))
    wanted = 256 if machine.has_gpu else 64
    crop = min(wanted, max(_PATCH, survey.shortest_side // finest // _PATCH * _PATCH))
    size = f"a multiple of the patch size {_PATCH}" + (
        f", at most the slides' {survey.shortest_side} px" if crop < wanted else ""
    )
    chosen = [
        Choice(
            path="data.crop_size",
            value=crop,
            reason=f"pixels of every view: {wanted} suits {'a GPU' if machine.has_gpu else 'a CPU'}; {size}",
        )
    ]
    if encoder is not None:
        return [*chosen, Choice(path="model.encoder.levels", value=list(encoder.levels), reason="the encoder's")]
    ratio = 2 ** max(0, floor(log2(max(extent_px / (crop * finest), 1))))
    ratio = min(ratio, _MAX_RATIO)
    middle = 2 ** round(log2(ratio) / 2)
    levels = sorted({finest, *([finest * middle] if ratio > 4 else []), finest * ratio})
    reason = (
        f"finest: objects of the smallest class, {smallest.name}, are {smallest.width_px:.0f} px wide, "
        f"{smallest.width_px / finest:.0f} at level {finest} ({OBJECT_PX} or more where possible); coarsest: a "
        f"view shows {crop * levels[-1]} px of the tissue's {extent_px:.0f}"
    )
    if ratio == _MAX_RATIO:
        reason += f" (levels differ by {_MAX_RATIO} times at most)"
    return [*chosen, Choice(path="model.encoder.levels", value=levels, reason=reason)]


def choose_normalization(survey: Survey) -> Choice:
    """Normalisation of the pixels."""
    path, dtype = "data.normalization", survey.slides[0].dtype
    low, high = zip(*survey.brightness, strict=True)
    if dtype.kind == "u" and dtype.itemsize == 1:
        top = 255 if max(high) > 192 or survey.slides[0].num_channels == 3 else max(16, 16 * -(-int(max(high)) // 16))
        reason = f"8 bits, of which the slides use {min(low):.0f} to {max(high):.0f}; the same for all slides"
        return Choice(path=path, value={"kind": "range", "low": 0, "high": top}, reason=reason)
    said = f"{dtype} from {min(low):g} to {max(high):g}"
    if (min(high) > 0 and max(high) > 2 * min(high)) or max(high) <= min(low):
        reason = f"{said}, but the brightest pixels of slides differ by {max(high) / max(min(high), 1e-12):.1f} times"
        return Choice(path=path, value={"kind": "percentile"}, reason=f"{reason}: each view is stretched by its own")
    value = {"kind": "range", "low": float(min(low)), "high": float(max(high))}
    return Choice(path=path, value=value, reason=f"{said} on all slides alike: one range keeps them comparable")


def choose_model(survey: Survey, machine: Machine, encoder: EncoderConfig | None) -> list[Choice]:
    """Sizes of the model."""
    side = survey.longest_side
    base = 10.0 ** min(4, max(2, round(log10(side / 10))))
    if encoder is not None:
        found = {
            field.name: getattr(encoder, field.name)
            for field in fields(encoder)
            if field.name not in ("levels", "in_channels") and getattr(encoder, field.name) != field.default
        }
        chosen = [
            Choice(path=f"model.encoder.{name}", value=plain(v), reason="the encoder's") for name, v in found.items()
        ]
    else:
        dim, layers, heads = (512, 12, 8) if machine.has_gpu else (128, 6, 4)
        size = "the paper's, for a GPU" if machine.has_gpu else "small, for a CPU"
        chosen = [
            Choice(path="model.encoder.dim", value=dim, reason=size),
            Choice(path="model.encoder.num_layers", value=layers),
            Choice(path="model.encoder.heads", value=heads),
            Choice(path="model.encoder.rotary_base", value=base, reason=f"about a tenth of the slides' {side} px"),
            Choice(
                path="model.encoder.level_embed_std", value=0.02, reason="from random weights, learns faster than 1"
            ),
        ]
    if machine.has_gpu:
        slim = "a sixth of the cost of the paper's decoder"
        return [*chosen, Choice(path="model.decoder_widths", value="slim", reason=slim)]
    patch = encoder.patch[0] if encoder is not None else _PATCH
    widths = [64, 32, 16, 16, 8, 8][: patch.bit_length()]
    return [
        *chosen,
        Choice(path="model.decoder_widths", value=widths, reason="narrow near the pixels, where a CPU spends its time"),
        Choice(path="model.stem_width", value=16),
    ]


def choose_sampling(survey: Survey) -> list[Choice]:
    """Balance of classes, and ignored labels."""
    rarest = min(survey.foreground, key=lambda one: one.share)
    share = sum(one.share for one in survey.foreground)
    chosen = []
    if survey.ignored:
        reason = "label values beyond the classes; they count in neither loss nor scores"
        chosen.append(Choice(path="data.ignore_labels", value=list(survey.ignored), reason=reason))
    if rarest.share < 0.02 and len(survey.foreground) > 1:
        reason = f"{rarest.name} is {rarest.share:.2%} of the pixels: half of the crops show a class drawn first"
        chosen.append(Choice(path="data.balance", value="classes", reason=reason))
    elif share < 0.2:
        reason = f"{share:.1%} of the pixels are no background: half of the crops show some that are not"
        chosen.append(Choice(path="data.balance", value="foreground", reason=reason))
    return chosen


def choose_rate(encoder: EncoderConfig | None) -> list[Choice]:
    """Learning rates."""
    if encoder is None:
        return [
            Choice(path="optim.lr", value=1e-3, reason="from random weights; 1e-4 is for a pre-trained encoder"),
            Choice(path="optim.encoder_lr_factor", value=1.0, reason="the encoder learns from the start, too"),
        ]
    return [
        Choice(path="optim.lr", value=3e-4, reason="of the decoder, which starts from random weights"),
        Choice(path="optim.encoder_lr_factor", value=0.1, reason="the encoder is trained already"),
    ]


def measure_cost(recipe: Recipe, machine: Machine) -> Cost:
    """Cost of the model of a recipe, from a few steps on random pixels on this machine."""
    recipe = complete(recipe)
    model = build_model(recipe.model)
    device = torch.device("cuda" if machine.has_gpu else "cpu")
    model.to(device).train()
    size = recipe.data.crop_size
    space = (size,) * model.views.ndim if isinstance(size, int) else size
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        _step(model, space, 1, device)
    own = {weights.untyped_storage().data_ptr() for weights in model.parameters()}
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        _step(model, space, _TIMED_BATCH, device)
        seconds.append(time.perf_counter() - start)
    return Cost(
        seconds_per_sample=min(seconds) / _TIMED_BATCH,
        bytes_per_sample=sum(size for place, size in kept.items() if place not in own),
        parameters=sum(weights.numel() for weights in model.parameters()),
    )


def _step(model: SegmentationModel, space: Sequence[int], count: int, device: torch.device) -> None:
    views = model.views
    batch = {
        "img": torch.rand(count, len(views.levels), views.in_channels, *space, device=device),
        "bbox": naive_boxes(views.levels, tuple(space)).expand(count, -1, -1, -1).to(device),
        "label": torch.randint(model.num_classes, (count, *space), device=device),
    }
    loss, _ = model.training_loss(batch, SegmentationLoss())
    loss.backward()
    model.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()


def choose_length(cost: Cost, machine: Machine, hours: float) -> list[Choice]:
    """Samples per step, processes and epochs."""
    batch = 32 if machine.has_gpu else 16
    while batch > 1 and cost.memory_bytes(batch) > machine.memory_bytes / 2:
        batch //= 2
    need, have = cost.memory_bytes(batch) / 2**30, machine.memory_bytes / 2**30
    minutes = _STEPS * batch * cost.seconds_per_sample / 60
    epochs = min(max(round(hours * 60 / minutes), 2), _MAX_EPOCHS)
    told = (
        f"{minutes:.1f} min each: {batch * cost.seconds_per_sample:.2f} s a step, measured on random pixels, without "
    )
    told += f"reading them and validation; {epochs * minutes:.0f} min in all"
    readers = "processes that read ahead of the GPU" if machine.has_gpu else "on a CPU, readers would take its cores"
    return [
        Choice(path="data.samples_per_epoch", value=_STEPS * batch, reason=f"{_STEPS} steps"),
        Choice(path="data.batch_size", value=batch, reason=f"a step keeps {need:.1f} GiB (float32) of {have:.0f}"),
        Choice(path="data.num_workers", value=min(8, machine.cores) if machine.has_gpu else 0, reason=readers),
        Choice(path="run.epochs", value=epochs, reason=told),
    ]


def render(choices: Sequence[Choice], head: Sequence[str]) -> str:
    """The text of a recipe: comments, then settings in sections, each after its reason."""
    lines = [*(f"# {line}".rstrip() for line in head)]
    done: set[tuple[str, ...]] = set()
    for choice in sorted(choices, key=lambda one: _section_order(one.path, choices)):
        *sections, name = choice.path.split(".")
        for depth in range(1, len(sections) + 1):
            section = tuple(sections[:depth])
            if section not in done:
                done.add(section)
                lines.append(f"{'  ' * (depth - 1)}{section[-1]}:")
        indent = "  " * len(sections)
        lines += textwrap.wrap(choice.reason, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        value = (
            yaml.safe_dump(choice.value, default_flow_style=True, width=200).removesuffix("\n").removesuffix("\n...")
        )
        lines.append(f"{indent}{name}: {value}")
    return "\n".join(lines) + "\n"


def nested(choices: Sequence[Choice]) -> dict[str, Any]:
    """The settings as mappings in mappings."""
    values: dict[str, Any] = {}
    for choice in choices:
        *sections, name = choice.path.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = choice.value
    return values


def _section_order(path: str, choices: Sequence[Choice]) -> list[int]:
    """Sorts settings into sections that are in the order of their first setting; of a section, its own go first."""
    *sections, _ = path.split(".")
    paths = [choice.path for choice in choices]
    prefixes = [".".join(sections[:depth]) + "." for depth in range(1, len(sections) + 1)]
    return [next(i for i, other in enumerate(paths) if other.startswith(prefix)) for prefix in prefixes]


def describe(survey: Survey, extent_px: float) -> list[str]:
    """The facts in lines."""
    slides, first = survey.slides, survey.slides[0]
    sizes = sorted({slide.shape for slide in slides}, key=lambda shape: shape[0] * shape[1])
    sized = " x ".join(map(str, sizes[0])) + ("" if len(sizes) == 1 else f" to {' x '.join(map(str, sizes[-1]))}")
    pixel = sorted({slide.pixel_size_um for slide in slides if slide.pixel_size_um is not None})
    units = "pixel size " + " x ".join(f"{size:g}" for size in pixel[0]) + " um" if pixel else "no pixel size"
    formats = ", ".join(sorted({"".join(slide.path.suffixes[-2:]) or slide.path.name for slide in slides}))
    levels = ", ".join(map(level_name, first.stored_levels))
    return [
        f"{len(slides)} slides ({formats}) of {sized} px, {first.num_channels} channel(s) of {first.dtype},",
        f"levels {levels}, {units}{' and others' if len(pixel) > 1 else ''}, tissue up to {extent_px:.0f} px",
        *(
            f"  {one.value} {one.name}: {one.share:.2%} of the pixels, objects about {one.width_px:.0f} px wide"
            for one in survey.classes
        ),
    ]
