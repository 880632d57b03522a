"""Outputs of a prediction, and placement and blending of its tiles."""

from dataclasses import dataclass
from typing import Annotated, Literal

from muvit.checks import Bounds, PositiveInt, check_fields
from muvit.data.crops.placement import Placement
from muvit.errors import InputError
from muvit.inference.tiling.tiles import Blend

Precision = Literal["auto", "float32", "bfloat16"]
Average = Literal["probabilities", "logits"]
TilePlacement = Literal["auto", Placement]
Tissue = Literal["all", "auto", "dark", "bright"]
ProbabilityType = Literal["uint8", "float16"]


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Outputs of a prediction, and its tiles. The tables of the paper are without overlap: `AS_PUBLISHED`."""

    overlap: Annotated[float, Bounds(min=0)] = 0.5
    """Overlap of neighbouring tiles: below 1 a fraction of the crop, from 1 on pixels; 0 is the paper's and the
    fastest."""
    blend: Blend = "cosine"
    """Blending of overlapping tiles: averaged with a linear or cosine ramp, or each writes only its central part
    (center, as Relay Tokens do)."""
    flips: tuple[int, ...] = ()
    """Test-time augmentation: axes to flip, counted from the last (-1). Predictions are averaged over all combinations
    of flips."""
    average: Average = "probabilities"
    """Quantity averaged over overlapping tiles and flips: probabilities or logits."""
    probabilities: ProbabilityType | None = None
    """Also write the probability of each class, as uint8 (255 is 1) or float16."""
    entropy: bool = False
    """Also write the entropy of the probabilities, from 0 (certain) to 1 (all classes equally likely)."""
    tissue: Tissue = "all"
    """Computed tiles: all, or those with tissue, which is dark or bright against the background (auto: dark
    in RGB images of 8 bits, else bright)."""
    region: str | None = None
    """Region of interest as well-known text, in world pixels, x before y; see
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
