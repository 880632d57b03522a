"""Whole-slide prediction: tiles with their context in, an OME-Zarr label pyramid out; killed, it goes on."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from muvit.data.preprocessing import Preprocessing
from muvit.data.slides import Slide
from muvit.errors import InputError
from muvit.inference.blocks import SlideTiles
from muvit.inference.engine import run_here
from muvit.inference.lock import OutputLock
from muvit.inference.output import Output
from muvit.inference.plan import Plan, PredictOptions
from muvit.inference.prepare import make_plan
from muvit.segmentation import SegmentationModel

_LOG = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the number of tiles done and of all tiles."""


def predict_slide(
    model: SegmentationModel,
    slide: Slide,
    output: Path | str,
    preprocessing: Preprocessing,
    *,
    options: PredictOptions | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Label every pixel of a slide and write the labels as an OME-Zarr pyramid.

    The labels have the pixels of the model's finest level, the class names and colours of ``preprocessing``, and the
    pixel size of the slide. They depend neither on ``batch_size`` nor on ``num_workers`` (but for the rounding of the
    model's arithmetic). The store is readable when it is complete. A run that is killed or fails leaves an unfinished
    one: the same call goes on from there and makes the same bytes as if nothing had happened.

    Args:
        model: takes the slide's channels and levels; it is moved to ``device``, and back when done.
        slide: the image; it must store every level of the model.
        output: folder of the label image to create, by custom named ``*.ome.zarr``; inside the ``labels`` folder of an
            OME-Zarr image it becomes one of that image's labels. Probabilities and entropy lie beside it:
            ``one.ome.zarr``, ``one.probabilities.ome.zarr``.
        preprocessing: how the model saw crops in training, and what its classes are.
        options: what is predicted, and how tiles are laid and joined; by default as in the paper.
        batch_size: tiles per forward pass.
        device: where to run; by default CUDA if there is any, else the CPU.
        num_workers: processes that read tiles ahead of the device; 0 reads in between. They are spawned, so a script
            must guard its own start by ``if __name__ == "__main__"``.
        overwrite: replace a store at ``output``, complete or not.
        progress: called after each batch.

    Returns:
        ``output``.

    Raises:
        InputError: model, slide, preprocessing and options do not fit each other, or a weight is NaN or infinite, or
            another plan was begun at ``output``, or somebody else is writing it. All of this is found before anything
            is written.
        ExistsError: ``output`` is complete, or something else, and ``overwrite`` is false.
        ReadError: pixels of the slide are corrupt; names file, level and window.
    """
    output, target = Path(output), resolve_device(device)
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise InputError(name, expected=f"at least {least}", got=value)
    if slide.path.resolve().is_relative_to(output.resolve()):
        raise InputError("output", expected="a folder that does not hold the image", got=output)
    plan = make_plan(model, slide, preprocessing, options or PredictOptions(), target)
    SlideTiles(slide, plan).check()
    with OutputLock(output).require():
        begun = Output.begin(output, plan, overwrite=overwrite)
        with begun.ledger() as ledger, _tell_how_to_go_on(output):
            blocks = begun.missing_blocks()
            run_here(
                begun,
                ledger,
                model,
                slide,
                blocks,
                device=target,
                batch_size=batch_size,
                num_workers=num_workers,
                progress=_count(plan, blocks, progress),
            )
            begun.finish(ledger)
    _LOG.info("labelled %s on %s, written to %s", slide.path, target, output)
    return output


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device of this name, or by default CUDA if there is any, else the CPU.

    Raises:
        InputError: this machine has no such device, or torch knows none of this name.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InputError("device", expected="a device of this machine", got=f"{device!r} ({reason})") from error


def _count(plan: Plan, blocks: Sequence[int], progress: Progress | None) -> Callable[[int], None] | None:
    """What to call with the number of tiles just done, ``blocks`` being those that are not done yet."""
    if progress is None:
        return None
    total = sum(map(plan.tiling.num_computed, range(plan.tiling.num_blocks)))
    done = total - sum(map(plan.tiling.num_computed, blocks))

    def count(tiles: int) -> None:
        nonlocal done
        done += tiles
        progress(done, total)

    return count


@contextmanager
def _tell_how_to_go_on(output: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(f"The unfinished output {output} is kept: the same call goes on from there.")
        raise
