"""Blocks of labels: their computation, and the shards that they fill."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muvit.data.pyramids.convert import convert_image
from muvit.data.pyramids.spec import PyramidSpec
from muvit.data.pyramids.writer import Shard
from muvit.data.slides.derived import on_grid
from muvit.data.slides.formats import store_path
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.errors import ReadError
from muvit.geometry import box_center, flip_boxes
from muvit.inference.run.blocks import Compute, Setup, fill_blocks
from muvit.inference.run.canvas import BlockCanvas
from muvit.inference.run.context import ContextCaching, shares_contexts
from muvit.inference.run.plan import LabelPlan
from muvit.inference.run.reading import SlideTiles
from muvit.inference.run.refinement import TileCounts, add_counts
from muvit.inference.run.resume import PLAN, WORK, as_plan, is_abandoned, is_empty, read_plan, read_summary
from muvit.inference.run.store import BlockPixels, BlockStore
from muvit.inference.tiling.seams import Seams, add_seams
from muvit.levels import level_factors
from muvit.models.segmentation_model import SegmentationModel

_FURTHER_STORES = ("probabilities", "entropy")


@dataclass(frozen=True, kw_only=True)
class Status:
    """Progress of a prediction."""

    state: str
    """``missing``, ``unfinished``, ``complete``, or ``foreign``: something that is no prediction."""
    blocks: int = 0
    """Blocks that are done."""
    num_blocks: int = 0
    """All blocks."""
    shards: int = 0
    """Shards of coarser levels that are done."""
    num_shards: int = 0
    """All shards of coarser levels."""
    seams: Seams | None = None
    """Label changes across the seams of tiles, as far as blocks are done."""
    tiles: TileCounts | None = None
    """Tiles that were computed, as far as blocks are done; None where all are."""


class LabelStore(BlockStore[LabelPlan]):
    """The stores of a prediction; ``path`` is that of the labels."""

    plan_type = LabelPlan

    def status(self) -> Status:
        """Progress of the unfinished prediction."""
        done, num_blocks = self.done(), self.plan.num_blocks
        blocks = sum(key.startswith("block ") for key in done)
        return Status(
            state="unfinished",
            blocks=blocks,
            num_blocks=num_blocks,
            shards=len(done) - blocks,
            num_shards=self.num_shards,
            seams=_seams(done),
            tiles=self._tiles(done),
        )

    @property
    def num_shards(self) -> int:
        """Shards of the coarser levels of all stores."""
        return sum(writer.num_coarse_shards for writer in self.writers.values())

    def clean_up(self) -> None:
        """As `BlockStore.clean_up`; before, stores that shall have the slide's own pixels get them."""
        if self.plan.options.grid == "slide":
            # the labels last: their folder is what counts as unfinished until then
            for name in sorted(self.writers, key=lambda name: name == "labels"):
                self._put_on_slide(self.writers[name].path, self.plan.stores[name])
        super().clean_up()

    def empty_shards(self) -> dict[int, list[str]]:
        """As `BlockStore.empty_shards`; none where the stores have other pixels than the blocks."""
        is_moved = self.plan.options.grid == "slide" and self.plan.tiling.shape != tuple(self.plan.image["shape"])
        return {} if is_moved else super().empty_shards()

    def _put_on_slide(self, path: Path, spec: PyramidSpec) -> None:
        """Replace a complete store by one with the slide's own pixels, see `resample_window`."""
        stored, image = open_slide(path), self.plan.image
        shape, sizes = tuple(image["shape"]), image["pixel_size_um"]
        if sizes is None or spec.pixel_size_um is None:
            scale = [1 / factor for factor in level_factors(self.plan.tiling.levels[0], len(shape))]
        else:
            scale = [own / size for own, size in zip(sizes, spec.pixel_size_um, strict=True)]
        if stored.shape != spec.shape or spec.shape == shape:  # it has them
            return
        convert_image(
            on_grid(stored, scale, spec.kind, shape),
            path,
            kind=spec.kind,
            pixel_size_um=sizes,
            attributes={"muvit": {name: note for name, note in read_summary(path).items() if name != "manifest"}},
            overwrite=True,
        )

    def _specs(self) -> dict[str, tuple[Path, PyramidSpec]]:
        return {name: (store_path(self.path, name), spec) for name, spec in self.plan.stores.items()}

    def _shards(self, block: int) -> dict[str, Shard]:
        return dict.fromkeys(self.writers, Shard(0, *self.plan.tiling.block(block)))

    def _folders(self) -> Sequence[Path]:
        earlier: Mapping[str, Any] = {}
        with suppress(ReadError):  # a damaged plan can be replaced, too
            earlier = read_plan(self.path) or read_summary(self.path).get("plan", {})
        # also stores that only the earlier plan has
        names = [*self.plan.stores, *(name for name in _FURTHER_STORES if name in earlier.get("stores", ()))]
        return [store_path(self.path, name) for name in dict.fromkeys(names)]

    def _publish(self, done: Mapping[str, Any]) -> None:
        summary = {"plan": self.plan.to_json(), "seams": _seams(done).to_json()}
        tiles = self._tiles(done)
        summary |= {} if tiles is None else {"tiles": tiles.to_json()}
        # the labels last: once they can be read, the prediction counts as complete
        for name in sorted(self.writers, key=lambda name: name == "labels"):
            self.writers[name].publish({"muvit": summary} if name == "labels" else None)

    def _tiles(self, done: Mapping[str, Any]) -> TileCounts | None:
        counted = (entry for entry in done.values() if "tiles" in entry)
        return add_counts(entry["tiles"] for entry in counted) if self.plan.tiling.refines else None

    def _is_plausible(self, block: int, entry: Mapping[str, Any]) -> bool:
        seams, tiles, tiling = entry.get("seams"), entry.get("tiles", ()), self.plan.tiling
        if tiling.refines and not (_are_numbers(tiles, 2) and tiles[1] == tiling.num_computed(block)):
            return False
        # of so few classes, one has a probability that uint8 does not round to 0
        is_certain = "probabilities" in self.writers and len(self.plan.preprocessing.class_names) < 256
        return _are_numbers(seams, 4) and not (is_certain and entry["probabilities"][0] == 0)


def prediction_status(path: Path) -> Status:
    """Progress of the prediction at ``path``, which may be running; needs neither model nor image.

    Raises:
        ReadError: its plan is damaged, or a shard of the complete prediction is missing.
    """
    # in the order in which a run proceeds, so that no state of a running one is missed
    if not path.exists() or is_empty(path) or is_abandoned(path):
        return Status(state="missing")
    plan = read_plan(path)
    status = Status(state="foreign")
    if plan is not None:
        with as_plan(path / WORK / PLAN):
            status = LabelStore(path, LabelPlan.from_json(plan)).status()
    summary = read_summary(path)
    if not summary:
        return status
    with as_plan(path / "zarr.json"):
        store = LabelStore(path, LabelPlan.from_json(summary["plan"]))
        counts = {name: count for name, count in summary["seams"].items() if name != "ratio"}
        tiles = TileCounts(**summary["tiles"]) if "tiles" in summary else None
    store.verify()
    blocks, shards = store.plan.num_blocks, store.num_shards
    return Status(
        state="complete",
        blocks=blocks,
        num_blocks=blocks,
        shards=shards,
        num_shards=shards,
        seams=Seams(**counts),
        tiles=tiles,
    )


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(n) is int and n >= 0 for n in value)


def _seams(done: Mapping[str, Any]) -> Seams:
    # an empty block is recorded without counts
    return add_seams(entry.get("seams", [0] * 4) for key, entry in done.items() if key.startswith("block "))


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
