"""Who makes the blocks of an output: this process, or one process for each device."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from muvit.data.slides import Slide
from muvit.inference.blocks import predict_blocks, ready
from muvit.inference.ledger import Ledger
from muvit.inference.output import Output
from muvit.segmentation import SegmentationModel

Progress = Callable[[int, int], None]
"""Called with the number of tiles done and of all tiles."""


def run_here(
    output: Output,
    ledger: Ledger,
    model: SegmentationModel,
    slide: Slide,
    blocks: Sequence[int],
    *,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Make blocks in this process; a thread writes each while the next is computed.

    Args:
        output: where they go.
        ledger: where they are noted.
        model: in any state; it comes back as it was.
        slide: the image.
        blocks: numbers of the blocks.
        device: where to run.
        batch_size: tiles per forward pass.
        num_workers: processes that read ahead.
        progress: called with the number of tiles of each batch.
    """
    with ready(model, device), ThreadPoolExecutor(max_workers=1) as writer:
        pending: Future[None] | None = None
        made = predict_blocks(
            model,
            slide,
            output.plan,
            blocks,
            device=device,
            batch_size=batch_size,
            num_workers=num_workers,
            progress=progress,
        )
        for number, pixels in made:
            if pending is not None:
                pending.result()
            pending = writer.submit(lambda n, p: ledger.record(*output.write_block(n, p)), number, pixels)
        if pending is not None:
            pending.result()
