"""From tiles to blocks: reading ahead, the model, and putting together; one block never depends on another."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations

import torch
from torch import Tensor

from muvit.data.slides.slide import Slide
from muvit.geometry import box_center, flip_boxes
from muvit.inference.run.canvas import BlockCanvas, BlockPixels
from muvit.inference.run.context import ContextCaching, shares_contexts
from muvit.inference.run.plan import Plan
from muvit.inference.run.reading import SlideTiles, read_tiles
from muvit.models.segmentation_model import SegmentationModel

Forward = Callable[[Tensor, Tensor, Sequence[int], tuple[int, ...]], Tensor]
"""From images, boxes, tile numbers, and the axes that are flipped, to logits."""

_REMEMBERED_VIEWS = 16


def predict_blocks(
    model: SegmentationModel,
    slide: Slide,
    plan: Plan,
    blocks: Iterable[int],
    *,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    count: Callable[[int], None],
) -> Iterator[tuple[int, BlockPixels | None]]:
    """Number and pixels of each block, None where none of its tiles is computed.

    No batch holds tiles of two blocks, and nothing is remembered from one block to the next: a block comes out the
    same, to the bit, whichever blocks were made before it.

    Args:
        model: on ``device`` and in evaluation mode (see `ready`).
        slide: the image.
        plan: what to predict.
        blocks: numbers of the blocks to make.
        device: where to run.
        batch_size: tiles per forward pass.
        num_workers: processes that read ahead.
        count: called with the number of tiles of each batch.

    Raises:
        MuViTError: pixels could not be read, or the model's answer is not finite.
    """
    blocks = list(blocks)
    tiles = SlideTiles(slide, plan.tiling, plan.preprocessing)
    batches = read_tiles(tiles, _batches(plan, blocks, batch_size), device=device, num_workers=num_workers)
    for number in blocks:
        canvas = BlockCanvas(plan, number, device)
        if not canvas.missing:
            yield number, None
            continue
        forward = _forward(model, plan)
        while canvas.missing:
            batch = next(batches)
            img, bbox = (batch[name].to(device, non_blocking=True) for name in ("img", "bbox"))
            numbers = batch["tile"].tolist()
            for tile, scores in zip(numbers, _scores(forward, plan, img, bbox, numbers), strict=True):
                canvas.add(plan.tiling.tile(tile), scores)
            count(len(numbers))
        pixels = canvas.finish()
        del canvas  # whoever takes the pixels decides how long they stay in memory
        yield number, pixels
        del pixels


@contextmanager
def ready(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Put a model on a device and into evaluation; as it was, afterwards."""
    modes = {module: module.training for module in model.modules()}
    home = next(model.parameters()).device
    try:
        model.to(device).eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        model.to(home)


def _batches(plan: Plan, blocks: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Tile numbers, batch by batch, block by block."""
    for block in blocks:
        tiles = plan.tiling.computed_tiles(block)
        yield from (tiles[first : first + batch_size] for first in range(0, len(tiles), batch_size))


def _forward(model: SegmentationModel, plan: Plan) -> Forward:
    """Logits of a batch; where tiles share coarse crops, these are computed once for each block and flip."""
    if plan.tiling.placement != "grid" or not shares_contexts(model, plan.preprocessing):
        return lambda img, bbox, *_: model.label_logits(img, bbox)
    capacity = max(_REMEMBERED_VIEWS >> len(plan.options.flips), 2 * len(plan.tiling.levels))
    caching = {axes: ContextCaching(model, capacity) for axes in _looks(plan)}

    def forward(img: Tensor, bbox: Tensor, tiles: Sequence[int], axes: tuple[int, ...]) -> Tensor:
        return caching[axes].label_logits(img, bbox, [plan.tiling.tile(n).windows for n in tiles])

    return forward


def _looks(plan: Plan) -> list[tuple[int, ...]]:
    """The axes to flip at each look at a tile."""
    flips = plan.options.flips
    return [axes for n in range(len(flips) + 1) for axes in combinations(flips, n)]


@torch.inference_mode()
def _scores(forward: Forward, plan: Plan, img: Tensor, bbox: Tensor, tiles: Sequence[int]) -> Tensor:
    """Scores ``(B, K, *space)``, averaged over flips: probabilities or logits, as the plan says."""
    options = plan.options
    looks = _looks(plan)
    total = torch.zeros((), device=img.device)
    for axes in looks:
        boxes = bbox.double()
        # about the centre of the coarsest crop: it stays the same for all tiles that share it
        flipped = flip_boxes(boxes, axes, box_center(boxes[:, -1:])).to(bbox.dtype)
        with torch.autocast(img.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            logits = forward(img.flip(axes), flipped, tiles, axes).flip(axes)
        total = total + (logits.float().softmax(dim=1) if plan.averages_probabilities else logits.float())
    return total / len(looks) if len(looks) > 1 else total
