"""What a prediction is to be, as plain data: everything that decides the bytes of its output, written before any work.

A run that finds a plan beside an unfinished output goes on only if it would have made the same one.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import yaml

from muvit import __version__
from muvit.checkpoints import plain
from muvit.data.normalize import normalization_from_dict
from muvit.data.preprocessing import Preprocessing
from muvit.data.pyramid_spec import PyramidSpec
from muvit.data.slides import Slide
from muvit.errors import InputError
from muvit.geometry import Level, level_name
from muvit.inference.tiling import Blend, TilePlan

Precision = Literal["auto", "float32", "bfloat16"]
Average = Literal["probabilities", "logits"]
ContextGrid = Literal["auto", "centered", "grid"]
Tissue = Literal["all", "auto", "dark", "bright"]
ProbabilityType = Literal["uint8", "float16"]

_FINGERPRINT_PX = 1 << 20
_WINDOWS = 4
_WINDOW_PX = 64


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What is predicted and how tiles are laid and joined. The paper's tables are without overlap: `AS_PUBLISHED`."""

    overlap: float = 0.5
    """How much neighbouring tiles share: below 1 a fraction of the crop, from 1 on pixels; 0 is the paper's and the
    fastest."""
    blend: Blend = "cosine"
    """How overlapping tiles are joined: averaged with a linear or cosine ramp, or each writes only its central part
    (center, as Relay Tokens do)."""
    flips: tuple[int, ...] = ()
    """Axes to flip, counted from the last (-1): the predictions of all flipped looks at a tile are averaged."""
    average: Average = "probabilities"
    """What is averaged over overlapping tiles and flips: probabilities or logits."""
    probabilities: ProbabilityType | None = None
    """Also write the probability of each class, as uint8 (255 is 1) or float16."""
    entropy: bool = False
    """Also write how undecided the model is: the entropy of the probabilities, from 0 to 1 (all classes alike)."""
    tissue: Tissue = "all"
    """Which tiles are computed: all, or those that show tissue, which is dark or bright against the background (auto:
    dark in RGB images of 8 bits, else bright)."""
    region: str | None = None
    """Region of interest as well-known text, in world pixels, x before y; see `muvit.inference.region.read_region`."""
    context: ContextGrid = "auto"
    """Where coarse crops lie: centred on each tile, or on a grid where many tiles share them; auto takes the latter for
    models that then encode each coarse crop once (``attention_mode: coarse_to_fine``)."""
    together: int = 1
    """Neighbouring tiles along each axis that share one forward pass with their coarse crops, for less work: 2 takes 2
    x 2. The coarse crops then see all of them, so scores differ a little from those of single tiles."""
    precision: Precision = "auto"
    """Numbers of the model: float32, or bfloat16 autocast; auto takes the latter on CUDA."""
    block_px: int | None = None
    """Edge of the blocks that are computed, kept in memory and written at once; unset, 4096 in 2D, less where the
    classes' scores would take more than 256 MiB."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "flips", tuple(sorted(set(self.flips))))
        choices = {"blend": Blend, "average": Average, "tissue": Tissue, "context": ContextGrid, "precision": Precision}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise InputError(name, expected=f"one of {', '.join(get_args(kind))}", got=repr(getattr(self, name)))
        if self.probabilities not in (None, *get_args(ProbabilityType)):
            raise InputError("probabilities", expected="uint8 or float16", got=repr(self.probabilities))
        if not 0 <= self.overlap < math.inf or (self.overlap >= 1 and self.overlap != int(self.overlap)):
            raise InputError("overlap", expected="a fraction below 1 or whole pixels", got=self.overlap)
        if not all(isinstance(axis, int) and axis < 0 for axis in self.flips):
            raise InputError("flips", expected="negative numbers, counted from the last axis", got=self.flips)
        if self.together < 1:
            raise InputError("together", expected="at least 1", got=self.together)
        if self.block_px is not None and self.block_px < 1:
            raise InputError("block_px", expected="at least 1", got=self.block_px)

    def overlap_px(self, crop_size: tuple[int, ...]) -> tuple[int, ...]:
        """Pixels that neighbouring tiles share along each axis."""
        return tuple(round(self.overlap * n) if self.overlap < 1 else int(self.overlap) for n in crop_size)

    @property
    def needs_scores(self) -> bool:
        """Whether more than the most likely class of each pixel is written."""
        return self.probabilities is not None or self.entropy


AS_PUBLISHED = PredictOptions(overlap=0.0)
"""Tiles without overlap, as MuViT is evaluated in its paper: for numbers that are compared with those of its tables."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the bytes of a prediction."""

    tiling: TilePlan
    """Tiles, blocks, context, and which tiles are computed."""
    stores: dict[str, PyramidSpec]
    """How each output is stored: ``labels``, and as asked for ``probabilities`` and ``entropy``."""
    preprocessing: Preprocessing
    """Normalisation, padding, classes."""
    options: PredictOptions
    """As given, with the precision and the place of coarse crops that were chosen."""
    model: dict[str, str]
    """Class of the model, and the hash of its configuration and weights."""
    image: dict[str, Any]
    """Path, size, type, levels and fingerprint of the image."""
    tissue: dict[str, Any] | None = None
    """How tissue was told from background; None where all tiles count."""
    version: str = __version__
    """Version of this package."""

    @property
    def averages_probabilities(self) -> bool:
        """Whether scores, as they are summed over tiles and flips, are probabilities; else they are logits."""
        averages = self.tiling.is_blended or bool(self.options.flips)
        return averages and self.options.average == "probabilities"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        tiling = {**asdict(self.tiling), "runs": " ".join(map(str, self.tiling.runs))}
        content: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "version": self.version,
                    "model": self.model,
                    "image": self.image,
                    "options": asdict(self.options),
                    "preprocessing": yaml.safe_load(self.preprocessing.to_yaml()),
                    "tissue": self.tissue,
                    "tiling": tiling,
                    "stores": {name: spec.to_json() for name, spec in self.stores.items()},
                }
            )
        )
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Plan":
        """The inverse of `to_json`."""
        tiling = {name: _tuples(value) for name, value in content["tiling"].items()}
        tiling["runs"] = tuple(map(int, content["tiling"]["runs"].split()))
        options = {name: _tuples(value) for name, value in content["options"].items()}
        preprocessing = {name: _tuples(value) for name, value in content["preprocessing"].items()}
        preprocessing["normalization"] = normalization_from_dict(content["preprocessing"]["normalization"])
        return cls(
            version=content["version"],
            model=dict(content["model"]),
            image=dict(content["image"]),
            tissue=content["tissue"],
            options=PredictOptions(**options),
            preprocessing=Preprocessing(**preprocessing),
            tiling=TilePlan(**tiling),
            stores={name: PyramidSpec.from_json(spec) for name, spec in content["stores"].items()},
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two plans as JSON objects, one line each; where the image lies does not count."""
    before, after = _flat(old), _flat(new)
    names = [name for name in dict.fromkeys((*before, *after)) if name != "image.path"]
    return [
        f"{name} {_short(before.get(name))} then, {_short(after.get(name))} now"
        for name in names
        if before.get(name) != after.get(name)
    ]


def hash_model(model: torch.nn.Module) -> dict[str, str]:
    """Class of a model, and SHA-256 of its class, configuration and weights."""
    config = getattr(model, "config", None)
    settings = plain(asdict(config)) if is_dataclass(config) and not isinstance(config, type) else {}
    digest = hashlib.sha256(json.dumps([type(model).__name__, settings], sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return {"class": type(model).__name__, "sha256": digest.hexdigest()}


def identify_slide(slide: Slide) -> dict[str, Any]:
    """What tells one image from another: its size, type and levels, and a fingerprint of its pixels.

    The fingerprint takes in the whole of the coarsest stored level, to which every pixel of a pyramid contributes (if
    it has at most a million pixels), and some windows that are spread over the finest level.
    """
    digest = hashlib.sha256()
    coarsest = slide.levels[-1]
    if math.prod(slide.level_shape(coarsest)) <= _FINGERPRINT_PX:
        digest.update(_bytes(slide, coarsest, (0,) * slide.ndim, slide.level_shape(coarsest)))
    size = tuple(min(_WINDOW_PX, n) for n in slide.shape)
    for index in np.ndindex(*(_WINDOWS,) * slide.ndim):
        places = zip(index, slide.shape, size, strict=True)
        digest.update(_bytes(slide, 1, tuple(i * (n - m) // (_WINDOWS - 1) for i, n, m in places), size))
    return {
        "path": str(slide.path.resolve()),
        "shape": list(slide.shape),
        "channels": list(slide.channel_names),
        "dtype": str(slide.dtype),
        "levels": [level_name(level) for level in slide.levels],
        "pixel_size_um": None if slide.pixel_size_um is None else list(slide.pixel_size_um),
        "sha256": digest.hexdigest(),
    }


def _bytes(slide: Slide, level: Level, start: tuple[int, ...], size: tuple[int, ...]) -> bytes:
    return np.ascontiguousarray(slide.read(level, start, size)).tobytes()


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def _short(value: object) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
