"""What a prediction is to be, as plain data: everything that decides the bytes of its output, written before any work.

A run that finds a plan beside an unfinished output goes on only if it would have made the same one.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import yaml

from muvit.data.crops.placement import Placement, upgrade_placement
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.pyramids.spec import PyramidSpec
from muvit.errors import InputError
from muvit.inference.tiling.tiles import Blend, TilePlan
from muvit.models.folder import fingerprint
from muvit.version import __version__

Precision = Literal["auto", "float32", "bfloat16"]
Average = Literal["probabilities", "logits"]
TilePlacement = Literal["auto", Placement]
Tissue = Literal["all", "auto", "dark", "bright"]
ProbabilityType = Literal["uint8", "float16"]


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
    """Region of interest as well-known text, in world pixels, x before y; see
    `muvit.inference.tiling.region.read_region`."""
    placement: TilePlacement = "auto"
    """Where coarse crops lie; auto takes the placement of training. After training with nested crops there is a choice:
    nested centres them on each tile, grid lets neighbouring tiles share them, which auto prefers for models that then
    encode each coarse crop once (``attention_mode: coarse_to_fine``)."""
    precision: Precision = "auto"
    """Numbers of the model: float32, or bfloat16 autocast; auto takes the latter on CUDA."""
    block_px: int | None = None
    """Edge of the blocks that are computed, kept in memory and written at once; unset, 4096 in 2D, less where the
    classes' scores would take more than 256 MiB."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "flips", tuple(sorted(set(self.flips))))
        choices = {
            "blend": Blend,
            "average": Average,
            "tissue": Tissue,
            "placement": TilePlacement,
            "precision": Precision,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise InputError(name, expected=f"one of {', '.join(get_args(kind))}", got=repr(getattr(self, name)))
        if self.probabilities not in (None, *get_args(ProbabilityType)):
            raise InputError("probabilities", expected="uint8 or float16", got=repr(self.probabilities))
        if not 0 <= self.overlap < math.inf or (self.overlap >= 1 and self.overlap != int(self.overlap)):
            raise InputError("overlap", expected="a fraction below 1 or whole pixels", got=self.overlap)
        if not all(isinstance(axis, int) and axis < 0 for axis in self.flips):
            raise InputError("flips", expected="negative numbers, counted from the last axis", got=self.flips)
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
        content = upgrade_plan(content)
        # plans of earlier versions also say how many tiles went through the model together
        tiling = {name: _tuples(value) for name, value in content["tiling"].items() if name != "together"}
        tiling["runs"] = tuple(map(int, content["tiling"]["runs"].split()))
        options = {name: _tuples(value) for name, value in content["options"].items() if name != "together"}
        return cls(
            version=content["version"],
            model=dict(content["model"]),
            image=dict(content["image"]),
            tissue=content["tissue"],
            options=PredictOptions(**options),
            preprocessing=Preprocessing.from_plain(content["preprocessing"]),
            tiling=TilePlan(**tiling),
            stores={name: PyramidSpec.from_json(spec) for name, spec in content["stores"].items()},
        )


def upgrade_plan(content: Mapping[str, Any]) -> dict[str, Any]:
    """A plan as a JSON object, of a prediction or of features, in today's spelling.

    Earlier plans say ``context`` (centered, concentric or grid) for ``placement``, and have ``together``, whose
    results were those of today only at 1.
    """
    upgraded = dict(content)
    for part in ("tiling", "options"):
        if upgraded.get(part, {}).get("together") == 1:
            upgraded[part] = {name: value for name, value in upgraded[part].items() if name != "together"}
    if "tiling" in upgraded:
        upgraded["tiling"] = _upgrade_tiling(upgraded["tiling"])
    if "options" in upgraded and "context" in upgraded["options"]:
        options = {name: value for name, value in upgraded["options"].items() if name != "context"}
        upgraded["options"] = options | {"placement": upgraded["tiling"]["placement"]}
    if "features" in upgraded:
        upgraded["features"] = {
            name: {**level, "tiling": _upgrade_tiling(level["tiling"])} for name, level in upgraded["features"].items()
        }
    if "preprocessing" in upgraded:
        upgraded["preprocessing"] = upgrade_placement(upgraded["preprocessing"])
    return upgraded


def _upgrade_tiling(tiling: Mapping[str, Any]) -> dict[str, Any]:
    upgraded = dict(tiling)
    if "context" in upgraded:
        placement = {"centered": "nested"}.get(upgraded["context"], upgraded["context"])
        upgraded["placement"] = "free" if upgraded.get("free_views") is not None else placement
        del upgraded["context"]
    return upgraded


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
    """Class and `fingerprint` of a model."""
    return {"class": type(model).__name__, "sha256": fingerprint(model)}


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
