"""A job: all that a run needs, checked, with nothing written yet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from muvit.data.slides.slide import Slide
from muvit.inference.run.blocks import Setup
from muvit.inference.run.store import BlockPixels, BlockStore
from muvit.models.folder import FolderModel


class BlockMaker(Protocol):
    """Computation of blocks, each of which depends on nothing that was computed before it; picklable."""

    def __call__(
        self,
        model: Any,
        slide: Slide,
        plan: Any,
        blocks: Sequence[int],
        setup: Setup,
        /,
    ) -> Iterator[tuple[int, BlockPixels | None]]:
        """Number and pixels of each block, None where none of its tiles is computed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model, a slide, and the output that is made of them."""

    store: BlockStore[Any]
    """The output, with its plan."""
    model: FolderModel
    """In any state; a run leaves it as it was."""
    slide: Slide
    """The image, with all levels of the model."""
    make_blocks: BlockMaker
    """Computes blocks of the plan."""
