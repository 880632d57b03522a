"""A block of a prediction on the device: tiles are painted onto it, and the outputs are made from it."""

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from muvit.errors import InputError
from muvit.inference.run.plan import LabelPlan
from muvit.inference.run.refinement import Refinement, entropy
from muvit.inference.run.store import BlockPixels
from muvit.inference.tiling.seams import count_seams
from muvit.inference.tiling.tiles import Tile


class BlockCanvas:
    """Tiles of one block, joined.

    Where tiles write disjoint parts, the outputs of each tile are final and are copied to their place. Where they are
    blended, scores are summed with their weights, and outputs are made from the sums. The weights of tiles that are not
    computed are missing, so sums are divided by the sum of the weights; pixels that no tile writes are background, with
    probability 0 for every class.

    Args:
        plan: tiles and outputs.
        number: of the block.
        device: where to join them.
    """

    def __init__(self, plan: LabelPlan, number: int, device: torch.device) -> None:
        self.plan = plan
        self.number = number
        self._refinement = Refinement(plan, number, device) if plan.tiling.refines else None
        self._num_computed = 0
        self._block = plan.tiling.block(number)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        size = self._block.size
        self._weight = _zeros(size, torch.float32, device) if plan.tiling.is_blended else None
        self._seen = _zeros(size, torch.bool, device)
        num_classes = len(plan.preprocessing.class_names)
        self._scores = _zeros((num_classes, *size), torch.float32, device) if plan.tiling.is_blended else None
        self._along: dict[tuple[int, int], Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def add(self, tile: Tile, scores: Tensor) -> None:
        """Paint one tile.

        Args:
            tile: a tile of this block, or one that decides about tiles of this block.
            scores: ``(K, *crop_size)``: probabilities or logits, as `LabelPlan.averages_probabilities` says.
        """
        scores = scores.float()
        self._num_computed += 1
        if self._refinement is not None:
            self._refinement.add(tile, self._probabilities(scores))
        if not self.plan.tiling.writes(tile, self.number):
            return
        part, place = (slice(None), *tile.source), tile.target(self._block)
        scores = scores[part]
        self._finite &= torch.isfinite(scores).all()
        if self._scores is not None and self._weight is not None:
            weight = torch.ones((), device=scores.device)
            for axis, (index, written) in enumerate(zip(tile.place, tile.source, strict=True)):
                weight = weight[..., None] * self._weights_along(axis, index)[written]
            self._scores[(slice(None), *place)] += weight * scores
            self._weight[place] += weight
            return
        self._seen[place] = True
        for name, pixels in self._outputs_of(scores).items():
            if name not in self._outputs:
                self._outputs[name] = _zeros((len(pixels), *self._block.size), pixels.dtype, pixels.device)
            self._outputs[name][(slice(None), *place)] = pixels

    def choose_tiles(self) -> list[int]:
        """Numbers of the tiles of the second pass, those of the first having been added."""
        return [] if self._refinement is None else self._refinement.choose()

    def finish(self) -> BlockPixels:
        """The finished block.

        Raises:
            InputError: the output of the model is not finite somewhere.
        """
        if not self._finite:
            raise InputError(
                f"output of the model in block {self.number} at {self._block.start}",
                expected="finite numbers",
                got="NaN or infinity",
                hint="Check the pixels there, or predict in float32 (--precision float32).",
            )
        if self._scores is not None and self._weight is not None:
            self._seen = self._weight > 0
            self._scores /= self._weight.clamp(min=torch.finfo(torch.float32).tiny)
            self._outputs = {name: pixels.mul_(self._seen) for name, pixels in self._outputs_of(self._scores).items()}
        stores = {name: pixels.cpu().numpy() for name, pixels in self._outputs.items()}
        stores["labels"] = stores["labels"].astype(self.plan.stores["labels"].dtype, copy=False)
        tiling, counts = self.plan.tiling, {}
        if self._refinement is not None:
            counts["tiles"] = [self._num_computed, tiling.num_computed(self.number)]
            tiling = self._refinement.passes.side_by_side
        counts["seams"] = count_seams(tiling, self._block, stores["labels"][0], self._seen.cpu().numpy())
        return BlockPixels(stores=stores, notes=counts)

    def _weights_along(self, axis: int, index: int) -> Tensor:
        """Weights of a row of tiles, on the device; remembered."""
        if (axis, index) not in self._along:
            weights = self.plan.tiling.weights_along(axis, index).astype(np.float32)
            self._along[axis, index] = torch.from_numpy(weights).to(self._seen.device)
        return self._along[axis, index]

    def _outputs_of(self, scores: Tensor) -> dict[str, Tensor]:
        """The pixels ``(C, *size)`` of every store from final scores ``(K, *size)``."""
        options, num_classes = self.plan.options, len(scores)
        dtype = torch.uint8 if num_classes <= 256 else torch.int32
        outputs = {"labels": scores.argmax(dim=0, keepdim=True).to(dtype)}
        if not options.needs_scores:
            return outputs
        probabilities = self._probabilities(scores)
        if options.probabilities == "uint8":
            outputs["probabilities"] = (probabilities * 255).round().to(torch.uint8)
        elif options.probabilities == "float16":
            outputs["probabilities"] = probabilities.half()
        if options.entropy:
            outputs["entropy"] = entropy(probabilities)[None].half()
        return outputs

    def _probabilities(self, scores: Tensor) -> Tensor:
        return scores if self.plan.averages_probabilities else scores.softmax(dim=0)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory is returned to the system as soon as they are freed.

    On the heap of the CPU, blocks between the short-lived tensors of a model would fragment it, and it would grow.
    """
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)
