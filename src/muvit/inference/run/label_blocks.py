"""Blocks of a prediction: test-time augmentations of each tile; coarse crops that tiles share are encoded once."""

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from muvit.data.slides.slide import Slide
from muvit.geometry import box_center, flip_boxes
from muvit.inference.run.blocks import Compute, Setup, fill_blocks
from muvit.inference.run.canvas import BlockCanvas
from muvit.inference.run.context import ContextCaching, shares_contexts
from muvit.inference.run.plan import LabelPlan
from muvit.inference.run.reading import SlideTiles
from muvit.inference.run.store import BlockPixels
from muvit.models.segmentation_model import SegmentationModel

_REMEMBERED_VIEWS = 16


def predict_blocks(
    model: SegmentationModel,
    slide: Slide,
    plan: LabelPlan,
    blocks: Sequence[int],
    setup: Setup,
) -> Iterator[tuple[int, BlockPixels | None]]:
    """Number and pixels of each block, None where none of its tiles is computed; see `fill_blocks`.

    Args:
        model: on the device of ``setup`` and in evaluation mode (see `muvit.inference.run.blocks.ready`).
        slide: the image, with all levels of the model.
        plan: tiles and outputs.
        blocks: numbers of the blocks to compute.
        setup: device, batches and processes.

    Raises:
        MuViTError: pixels could not be read, or results are not finite.
    """
    return fill_blocks(
        SlideTiles(slide, plan.tiling, plan.preprocessing),
        blocks,
        lambda number: BlockCanvas(plan, number, setup.device),
        lambda: _compute(model, plan),
        setup,
    )


def _compute(model: SegmentationModel, plan: LabelPlan) -> Compute:
    """Scores of tiles: probabilities or logits, as `LabelPlan.averages_probabilities` says, averaged over flips.

    Where tiles share coarse crops, those are encoded once for each combination of flips.
    """
    flips = plan.options.flips
    augmentations = [axes for n in range(len(flips) + 1) for axes in combinations(flips, n)]
    caching: dict[tuple[int, ...], ContextCaching] = {}
    if plan.tiling.placement == "grid" and shares_contexts(model, plan.preprocessing):
        capacity = max(_REMEMBERED_VIEWS >> len(flips), 2 * len(plan.tiling.levels))
        caching = {axes: ContextCaching(model, capacity) for axes in augmentations}

    def logits_of(img: Tensor, bbox: Tensor, tiles: Sequence[int], axes: tuple[int, ...]) -> Tensor:
        if not caching:
            return model.label_logits(img, bbox)
        return caching[axes].label_logits(img, bbox, [plan.tiling.tile(n).windows for n in tiles])

    @torch.inference_mode()
    def compute(img: Tensor, bbox: Tensor, tiles: Sequence[int]) -> Tensor:
        total = torch.zeros((), device=img.device)
        for axes in augmentations:
            boxes = bbox.double()
            # about the centre of the coarsest crop: it stays the same for all tiles that share it
            flipped = flip_boxes(boxes, axes, box_center(boxes[:, -1:])).to(bbox.dtype)
            with torch.autocast(img.device.type, torch.bfloat16, enabled=plan.options.precision == "bfloat16"):
                logits = logits_of(img.flip(axes), flipped, tiles, axes).flip(axes)
            total = total + (logits.float().softmax(dim=1) if plan.averages_probabilities else logits.float())
        return total / len(augmentations) if len(augmentations) > 1 else total

    return compute
