"""Augmentation of all views of a sample: pixels, labels and boxes together, so that positions stay true."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from muvit.checks import Bounds, NonNegative, check_fields
from muvit.data.crops.affine import Similarity
from muvit.data.crops.appearance import Appearance, Probability
from muvit.data.crops.stored import Look, Stored, finish
from muvit.errors import InputError
from muvit.geometry import box_center, flip_boxes, scale_boxes, shift_boxes, transpose_boxes

Sample = dict[str, Any]

_PIXELS = (
    "img",
    "label",
    "labels",
    "inside",
)  # entries of a sample that move with the pixels: their last axes are those of space


@dataclass(frozen=True, kw_only=True)
class Augmentation(Appearance):
    """Random flips, optional quarter turns, intensity jitter and box perturbation of a sample (the paper's set).

    The paper names the kinds but not the magnitudes; the defaults are ours. Called as ``augmentation(sample, rng)``
    with a sample dict (``img``: ``(L, C, *space)``, ``bbox``: ``(L, 2, ndim)``, optionally ``label``: ``(*space)`` and
    ``labels``: ``(L, *space)``), it returns a new sample. Pixels that ``inside``, bool ``(L, *space)``, says lie beyond
    the image are 0, as in prediction. Colours, scale and rotation change as the data set reads the pixels, not by this
    call. ``Augmentation.geometric()`` moves pixels only and keeps every box true.
    """

    flip_axes: tuple[int, ...] = (-2, -1)
    """Spatial axes that are mirrored with probability 1/2 each, counted from the end: -1 is x, -2 is y."""
    quarter_turns: bool = False
    """Also swap y and x with probability 1/2; with both flips this gives all eight symmetries of a square."""
    gain: tuple[float, float] = (0.8, 1.2)
    """Range of the factor on all pixels of a sample."""
    offset: tuple[float, float] = (-0.1, 0.1)
    """Range of the offset that is then added to all pixels of a sample; zero padding stays 0."""
    box_scale: tuple[float, float] = (0.9, 1.1)
    """Range of the factor on all boxes of a sample, about the centre of the finest."""
    box_shift_px: NonNegative = 8.0
    """Standard deviation, in world pixels, of the shift of each box, drawn per level: a common one has no effect."""
    scale: tuple[float, float] = (1, 1)
    """Range of the factor on the side of what all views show, about their common centre (needs placement concentric): 2
    shows twice as much at half the detail, and boxes grow with it (Relay Tokens: 0.5 to 2). Above 2, pixels are left
    out."""
    scale_probability: Probability = 0.5
    """Fraction of the samples that are scaled."""
    rotation_degrees: Annotated[float, Bounds(min=0, max=180)] = 0
    """Largest rotation of all views about their common centre, either way (needs placement concentric; Relay Tokens:
    90). Boxes stay: the frame that they are in is rotated with the content."""
    rotation_probability: Probability = 0.5
    """Fraction of the samples that are rotated."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("gain", "offset", "box_scale", "scale", "gamma"):
            low, high = getattr(self, name)
            if not -math.inf < low <= high < math.inf or (name != "offset" and low <= 0):
                expected = "a finite range low <= high" + ("" if name == "offset" else " above 0")
                raise InputError(name, expected=expected, got=(low, high))
        if not all(axis < 0 for axis in self.flip_axes):
            raise InputError("flip_axes", expected="negative numbers, counted from the last axis", got=self.flip_axes)

    @classmethod
    def geometric(cls, *, quarter_turns: bool = False) -> "Augmentation":
        """Flips (and quarter turns) only: intensities stay, and boxes stay true."""
        return cls(quarter_turns=quarter_turns, gain=(1, 1), offset=(0, 0), box_scale=(1, 1), box_shift_px=0)

    @property
    def has_similarity(self) -> bool:
        """Whether views are scaled or rotated, which happens when they are read."""
        scales = tuple(self.scale) != (1, 1) and self.scale_probability > 0
        return scales or (self.rotation_degrees > 0 and self.rotation_probability > 0)

    def draw_similarity(self, rng: np.random.Generator) -> Similarity:
        """Draw the scale and rotation with which the views of a sample are read."""
        if not self.has_similarity:
            return Similarity()
        is_scaled, is_turned = rng.random() < self.scale_probability, rng.random() < self.rotation_probability
        scale, degrees = rng.uniform(*self.scale), rng.uniform(-self.rotation_degrees, self.rotation_degrees)
        return Similarity(scale if is_scaled else 1.0, degrees if is_turned else 0.0)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """A new, augmented sample."""
        shape = sample["img"].shape[:2]
        return finish(self.draw({"look": Look(torch.zeros(shape), torch.ones(shape)), **sample}, rng))

    def draw(self, sample: Stored, rng: np.random.Generator) -> Stored:
        """A new sample whose pixels and boxes are moved, and whose look says how intensities change."""
        axes = [axis for axis in self.flip_axes if rng.random() < 0.5]
        sample = flip_sample(sample, axes)
        if self.quarter_turns and rng.random() < 0.5:
            sample = transpose_sample(sample)
        views, channels = sample["img"].shape[:2]
        gain, offset = (torch.full((views,), rng.uniform(*limits)) for limits in (self.gain, self.offset))
        # a generator of its own, so that all else is drawn as without
        defects = self.draw_defects(rng.spawn(1)[0], views, channels) if self.has_defects else None
        look = sample["look"]._replace(gain=gain, offset=offset, defects=defects)
        return sample | {"look": look, "bbox": self._perturb(sample["bbox"], rng)}

    def _perturb(self, bbox: Tensor, rng: np.random.Generator) -> Tensor:
        boxes = bbox.double()
        boxes = scale_boxes(boxes, rng.uniform(*self.box_scale), box_center(boxes[0]))
        shifts = rng.normal(0, self.box_shift_px, size=(boxes.shape[0], boxes.shape[-1]))
        return shift_boxes(boxes, torch.from_numpy(shifts)).to(bbox.dtype)


def flip_sample(sample: Sample, axes: list[int]) -> Sample:
    """Mirror a sample about the centre of its finest view.

    Args:
        sample: ``img``, ``bbox`` and optionally ``label``, ``labels`` and ``inside``.
        axes: spatial axes to mirror, counted from the end (negative).

    Returns:
        A new sample; every pixel stands at its mirrored place in the world. Without axes, the pixels are not copied.
    """
    if not axes:
        return sample
    boxes = sample["bbox"].double()  # the centre may lie on half a pixel, which float32 loses far from the origin
    flipped = {"bbox": flip_boxes(boxes, axes, box_center(boxes[0])).to(sample["bbox"].dtype)}
    return sample | flipped | {key: sample[key].flip(axes) for key in _PIXELS if key in sample}


def transpose_sample(sample: Sample) -> Sample:
    """Swap y and x of a sample, mirroring it across the diagonal through the centre of its finest view.

    Raises:
        InputError: the views are not square, so that they would not fit into one batch with others.
    """
    height, width = sample["img"].shape[-2:]
    if height != width:
        raise InputError("quarter_turns", expected="square views", got=f"{height} x {width} pixels")
    boxes = sample["bbox"].double()
    turned = {"bbox": transpose_boxes(boxes, (-2, -1), box_center(boxes[0])).to(sample["bbox"].dtype)}
    return sample | turned | {key: sample[key].transpose(-2, -1) for key in _PIXELS if key in sample}
