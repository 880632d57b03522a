"""Outputs of a prediction, and placement and blending of its tiles."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml

from muvit.checks import Bounds, PositiveInt, check_fields
from muvit.data.crops.placement import Placement, upgrade_placement
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.pyramids.spec import PyramidSpec
from muvit.data.pyramids.writer import Shard
from muvit.errors import InputError
from muvit.inference.tiling.tiles import Blend, TilePlan
from muvit.levels import level_name
from muvit.version import __version__

if TYPE_CHECKING:
    from torch.nn import Module

Precision = Literal["auto", "float32", "bfloat16"]
Average = Literal["probabilities", "logits"]
TilePlacement = Literal["auto", Placement]
Tissue = Literal["all", "auto", "dark", "bright", "stained"]
OutputGrid = Literal["model", "slide"]
ProbabilityType = Literal["uint8", "float16"]


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Outputs of a prediction, and its tiles. The tables of the paper are without overlap: `AS_PUBLISHED`."""

    overlap: Annotated[float, Bounds(min=0)] = 0.5
    """Overlap of neighbouring tiles: below 1 a fraction of the crop, from 1 on pixels; 0 is the paper's and the
    fastest."""
    blend: Blend = "cosine"
    """Blending of overlapping tiles: averaged with a linear or cosine ramp or all alike (uniform, as the winner of the
    KPIs challenge), or each writes only its central part (center, as Relay Tokens do)."""
    refine: Annotated[float, Bounds(min=0, max=1)] | None = None
    """Compute first the tiles that lie side by side, and those that overlap them only where the mean entropy of the
    first, from 0 (certain) to 1 (all classes equally likely), is above this; unset, all are computed."""
    half_stride: bool = False
    """Begin the grid of tiles half a step before the first pixel, as Relay Tokens do, instead of at it. With half of
    the crop as overlap and blend center each tile then writes just its central quarter."""
    flips: tuple[int, ...] = ()
    """Test-time augmentation: axes to flip, counted from the last (-1). Predictions are averaged over all combinations
    of flips."""
    average: Average = "probabilities"
    """Quantity averaged over overlapping tiles and flips: probabilities or logits."""
    probabilities: ProbabilityType | None = None
    """Also write the probability of each class, as uint8 (255 is 1) or float16."""
    entropy: bool = False
    """Also write the entropy of the probabilities, from 0 (certain) to 1 (all classes equally likely)."""
    grid: OutputGrid = "model"
    """Pixels of the output: those of the model's finest level (model), or the finest ones of the slide as stored, each
    with the label at its centre (slide)."""
    tissue: Tissue = "all"
    """Computed tiles: all, or those with tissue, which is dark or bright against the background (auto: dark
    in RGB images of 8 bits, else bright), or stained: coloured, without grey, black and blue or green pen (for
    haematoxylin with eosin or DAB)."""
    region: str | None = None
    """Region of interest as well-known text, in pixels of the slide as stored, x before y; see
    `muvit.inference.tiling.region.read_region`."""
    placement: TilePlacement = "auto"
    """Placement of the coarse crops; auto takes that of training. After training with nested crops there is a choice:
    nested centres them on each tile, grid lets neighbouring tiles share them, which auto prefers for models that then
    encode each coarse crop once (``attention_mode: coarse_to_fine``)."""
    precision: Precision = "auto"
    """Arithmetic of the model: float32, or bfloat16 autocast; auto takes the latter on CUDA."""
    block_px: PositiveInt | None = None
    """Edge of the blocks that are computed, kept in memory and written at once; unset, 4096 in 2D, less where the
    scores of the classes would take more than 256 MiB."""

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "flips", tuple(sorted(set(self.flips))))
        if self.overlap >= 1 and self.overlap != int(self.overlap):
            raise InputError("overlap", expected="a fraction below 1 or whole pixels", got=self.overlap)
        if not all(isinstance(axis, int) and axis < 0 for axis in self.flips):
            raise InputError("flips", expected="negative numbers, counted from the last axis", got=self.flips)

    def overlap_px(self, crop_size: tuple[int, ...]) -> tuple[int, ...]:
        """Overlap of neighbouring tiles along each axis, in pixels."""
        return tuple(round(self.overlap * n) if self.overlap < 1 else int(self.overlap) for n in crop_size)

    @property
    def needs_scores(self) -> bool:
        """Whether probabilities are needed, not only the most likely class of each pixel."""
        return self.probabilities is not None or self.entropy


AS_PUBLISHED = PredictOptions(overlap=0.0)
"""Tiles without overlap, as in the evaluation of the paper: for numbers that are compared with its tables."""


def upgrade_plan(content: Mapping[str, Any]) -> dict[str, Any]:
    """A plan as a JSON object, of a prediction or of features, in today's spelling.

    Earlier plans say ``context`` (centered, concentric or grid) for ``placement``, and have ``together``, whose
    results equal those of today only at 1. Those without ``grid`` are on the model's.
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
        upgraded["preprocessing"] = {"is_resampled": False} | upgrade_placement(upgraded["preprocessing"])
    if "options" in upgraded:
        upgraded["options"] = {"grid": "model", "half_stride": False} | upgraded["options"]
    return upgraded


def _upgrade_tiling(tiling: Mapping[str, Any]) -> dict[str, Any]:
    upgraded = {"refines": False, "half_stride": False} | dict(tiling)
    if "context" in upgraded:
        placement = {"centered": "nested"}.get(upgraded["context"], upgraded["context"])
        upgraded["placement"] = "free" if upgraded.get("free_views") is not None else placement
        del upgraded["context"]
    return upgraded


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """Everything that decides the bytes of an output; the base of `LabelPlan` and `FeaturePlan`.

    The blocks of all tilings are numbered through, tiling by tiling.
    """

    preprocessing: Preprocessing
    """Crop size, normalisation, padding, and for labels the classes."""
    model: dict[str, str]
    """Class of the model, and the hash of its configuration and weights."""
    image: dict[str, Any]
    """Path, size, type, levels and fingerprint of the image."""
    version: str = __version__
    """Version of this package."""

    @property
    @abstractmethod
    def tilings(self) -> tuple[TilePlan, ...]:
        """The tilings whose blocks are computed."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all tilings."""
        return sum(tiling.num_blocks for tiling in self.tilings)

    def locate(self, block: int) -> tuple[int, int]:
        """Index of the tiling that a block belongs to, and the number of the block in it.

        Raises:
            IndexError: there is no such block.
        """
        number = block
        for index, tiling in enumerate(self.tilings):
            if 0 <= number < tiling.num_blocks:
                return index, number
            number -= tiling.num_blocks
        raise IndexError(f"block {block} of {self.num_blocks}")

    def num_computed(self, block: int) -> int:
        """Number of tiles that are computed for a block; with refinement, at most."""
        index, number = self.locate(block)
        return self.tilings[index].num_computed(number)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        content = {
            "version": self.version,
            "model": self.model,
            "image": self.image,
            **self._settings(),
            "preprocessing": yaml.safe_load(self.preprocessing.to_yaml()),
            **self._tiles(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(content))
        return plain

    @classmethod
    @abstractmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; plans of earlier versions are upgraded."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Entries of `to_json` about what is computed."""

    @abstractmethod
    def _tiles(self) -> dict[str, Any]:
        """Entries of `to_json` about tiles and stores."""


@dataclass(frozen=True, kw_only=True)
class LabelPlan(Plan):
    """Everything that decides the bytes of a prediction."""

    tiling: TilePlan
    """Tiles, blocks, context, and which tiles are computed."""
    stores: dict[str, PyramidSpec]
    """Specification of each store: ``labels``, and as requested ``probabilities`` and ``entropy``."""
    options: PredictOptions
    """As given, with the chosen precision and placement of coarse crops."""
    tissue: dict[str, Any] | None = None
    """Separation of tissue from background; None where all tiles count."""

    @property
    def tilings(self) -> tuple[TilePlan, ...]:
        """The only tiling."""
        return (self.tiling,)

    @property
    def averages_probabilities(self) -> bool:
        """Whether the scores that are summed over tiles and flips are probabilities; else they are logits."""
        averages = self.tiling.is_blended or bool(self.options.flips)
        return averages and self.options.average == "probabilities"

    def _settings(self) -> dict[str, Any]:
        return {"options": asdict(self.options)}

    def _tiles(self) -> dict[str, Any]:
        tiling = {**asdict(self.tiling), "runs": " ".join(map(str, self.tiling.runs))}
        stores = {name: spec.to_json() for name, spec in self.stores.items()}
        return {"tissue": self.tissue, "tiling": tiling, "stores": stores}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; plans of earlier versions are upgraded."""
        content = upgrade_plan(content)
        # plans of earlier versions also say how many tiles went through the model together
        tiling = {name: value for name, value in content["tiling"].items() if name != "together"}
        options = {name: _tuples(value) for name, value in content["options"].items() if name != "together"}
        return cls(
            **_identity(content),
            tissue=content["tissue"],
            options=PredictOptions(**options),
            tiling=_tiling(tiling | {"runs": list(map(int, tiling["runs"].split()))}),
            stores={name: PyramidSpec.from_json(spec) for name, spec in content["stores"].items()},
        )


@dataclass(frozen=True, kw_only=True)
class LevelFeatures:
    """Tiles and store of the features of one level."""

    tiling: TilePlan
    """Tiles of this level, which ends with its last patch, in their context."""
    store: PyramidSpec
    """An image with a pixel for each patch and a channel for each feature."""

    @property
    def patch(self) -> tuple[int, ...]:
        """Pixels of the level along each axis of a patch."""
        return tuple(n // m for n, m in zip(self.tiling.shape, self.store.shape, strict=True))

    @property
    def folder(self) -> str:
        """Name of the store."""
        return f"level_{level_name(self.tiling.levels[0])}"

    def in_patches(self, pixels: Sequence[int]) -> tuple[int, ...]:
        """Pixels of the level, multiples of the patch, as numbers of patches."""
        return tuple(n // p for n, p in zip(pixels, self.patch, strict=True))

    def shard(self, block: int) -> Shard:
        """The shard that a block of the tiling fills."""
        start, size = self.tiling.block(block)
        return Shard(0, self.in_patches(start), self.in_patches(size))


@dataclass(frozen=True, kw_only=True)
class FeaturePlan(Plan):
    """Everything that decides the bytes of the features of a slide."""

    levels: tuple[LevelFeatures, ...]
    """Levels whose features are written, finest first."""
    precision: str
    """``float32``, or ``bfloat16`` for autocast."""

    @property
    def tilings(self) -> tuple[TilePlan, ...]:
        """The tiling of each level."""
        return tuple(features.tiling for features in self.levels)

    @property
    def shares_contexts(self) -> bool:
        """Whether coarse crops lie on a grid where many tiles share them."""
        return self.levels[0].tiling.placement == "grid"

    def _settings(self) -> dict[str, Any]:
        return {"precision": self.precision}

    def _tiles(self) -> dict[str, Any]:
        levels = {f.folder: {"tiling": asdict(f.tiling), "store": f.store.to_json()} for f in self.levels}
        return {"features": levels}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; plans of earlier versions are upgraded."""
        content = upgrade_plan(content)
        levels = tuple(
            LevelFeatures(tiling=_tiling(level["tiling"]), store=PyramidSpec.from_json(level["store"]))
            for level in content["features"].values()
        )
        return cls(**_identity(content), levels=levels, precision=content["precision"])


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Differences between two plans as JSON objects, one line each; the path of the image is ignored."""
    before, after = _flat(old), _flat(new)
    names = [name for name in dict.fromkeys((*before, *after)) if name != "image.path"]
    return [
        f"{name} {_short(before.get(name))} then, {_short(after.get(name))} now"
        for name in names
        if before.get(name) != after.get(name)
    ]


def hash_plan(plan: Mapping[str, Any]) -> str:
    """SHA-256 of a plan as a JSON object, but for the path of the image."""
    image = {name: value for name, value in plan["image"].items() if name != "path"}
    return hashlib.sha256(json.dumps({**plan, "image": image}, sort_keys=True).encode()).hexdigest()


def hash_model(model: "Module") -> dict[str, str]:
    """Class and `fingerprint` of a model."""
    from muvit.models.folder import fingerprint

    return {"class": type(model).__name__, "sha256": fingerprint(model)}


def _identity(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that all plans have, from an upgraded JSON object."""
    return {
        "version": content["version"],
        "model": dict(content["model"]),
        "image": dict(content["image"]),
        "preprocessing": Preprocessing.from_plain(content["preprocessing"]),
    }


def _tiling(content: Mapping[str, Any]) -> TilePlan:
    return TilePlan(**{name: _tuples(value) for name, value in content.items()})


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
