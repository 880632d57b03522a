"""Inference that shares coarse views: each is encoded once for everything inside it."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from muvit.data.crops.placement import Window, tile_placements
from muvit.data.crops.preprocessing import Preprocessing
from muvit.geometry import naive_boxes
from muvit.models.context import EncodedContext, encode_context, encode_in_context, is_cachable
from muvit.models.encoder import MuViTEncoder
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.segmenter import Encoded, Segmenter

Key = TypeVar("Key", bound=Hashable)


class ContextMemory:
    """Coarse views that an encoder has encoded under ``coarse_to_fine``, the least recently used forgotten.

    It holds for one slide, one set of weights, one device and one precision: make a new one for each. What it keeps of
    a coarse view of the paper's encoder (256 px, 12 blocks of width 512) is 50 MB in float32.

    Args:
        encoder: in evaluation mode.
        capacity: coarse views, of all levels together, that are remembered.
    """

    def __init__(self, encoder: MuViTEncoder, capacity: int = 16) -> None:
        self.encoder = encoder
        self.capacity = capacity
        self._contexts: OrderedDict[tuple[Window, ...], EncodedContext] = OrderedDict()

    def context(self, img: Tensor, bbox: Tensor, windows: tuple[Window, ...]) -> EncodedContext | None:
        """Context of one sample, encoded where it is not remembered, from the coarsest level on.

        Args:
            img: ``(1, l, C, *space)``, the coarsest ``l`` levels.
            bbox: ``(1, l, 2, ndim)``, world pixels, (t)(z)yx.
            windows: the ``l`` crops, finest first; equal crops are taken for equal pixels.

        Returns:
            What the next finer level needs; None if ``l`` is 0.
        """
        context: EncodedContext | None = None
        for level in reversed(range(len(windows))):
            key, view = windows[level:], slice(level, level + 1)
            if key not in self._contexts:
                self._contexts[key] = encode_context(self.encoder, img[:, view], bbox[:, view], context)
            self._contexts.move_to_end(key)
            context = self._contexts[key]
        while len(self._contexts) > self.capacity:
            self._contexts.popitem(last=False)
        return context


class ContextCaching:
    """Logits of the tiles of one slide, with a `ContextMemory` of the coarse views that they share.

    A segmenter whose encoder attends ``coarse_to_fine`` gives the same logits (but for rounding) as without the memory,
    and for tiles in the same coarse views computes the finest view alone. Every other model goes its ordinary way.

    Args:
        model: in evaluation mode.
        capacity: as of `ContextMemory`.
    """

    def __init__(self, model: SegmentationModel, capacity: int = 16) -> None:
        self.model = model
        self._memory: ContextMemory | None = None
        if isinstance(model, Segmenter) and is_cachable(model.encoder) and len(model.encoder.levels) > 1:
            self._memory = ContextMemory(model.encoder, capacity)

    @property
    def is_caching(self) -> bool:
        """Whether the model's coarse views can be encoded by themselves."""
        return self._memory is not None

    def label_logits(self, img: Tensor, bbox: Tensor, windows: Sequence[Sequence[Window]]) -> Tensor:
        """Logits ``(B, K, *space)`` of the finest views.

        Args:
            img: ``(B, L, C, *space)``.
            bbox: ``(B, L, 2, ndim)``, world pixels, (t)(z)yx.
            windows: of each sample its ``L`` crops, finest first; equal crops are taken for equal pixels.
        """
        if self._memory is None:
            return self.model.label_logits(img, bbox)
        groups = grouped(tuple(crops[1:]) for crops in windows)
        logits = [
            self._in_context(self._memory, _rows(img, of), _rows(bbox, of), coarse) for coarse, of in groups.items()
        ]
        return ungrouped(logits, groups.values())

    def _in_context(self, memory: ContextMemory, img: Tensor, bbox: Tensor, coarse: tuple[Window, ...]) -> Tensor:
        """Logits of tiles that share all coarse views."""
        model, encoder = self.model, memory.encoder
        assert isinstance(model, Segmenter)
        if model.config.boxes == "naive":
            boxes = naive_boxes(encoder.levels, img.shape[3:], encoder.config.patch_spacing)
            bbox = boxes.to(bbox, non_blocking=True).expand(bbox.shape)
        context = memory.context(img[:1, 1:], bbox[:1, 1:], coarse)
        assert context is not None
        _, coords, kept = encode_in_context(encoder, img[:, :1], bbox[:, :1], context, model.skips)
        last, *others = reversed(kept)
        if model.query_decoder is not None:  # which looks at the tokens of all levels
            levels = context.expand(len(img)).levels
            last = torch.cat([last, *(level.tokens for level in levels)], dim=1)
            coords = torch.cat([coords, *(level.coords for level in levels)], dim=1)
        maps = [encoder.to_maps(tokens, img.shape[3:]) for tokens in (last, *others)]
        return model.decode(Encoded(maps, (coords - context.origin[:, None]).float()), img, 0)


def shares_contexts(model: nn.Module, preprocessing: Preprocessing) -> bool:
    """Whether a coarse view of a slide can be encoded once for all tiles inside it.

    It takes an encoder that attends ``coarse_to_fine``, coarse views that need not be centred on a tile, and pixels of
    theirs that do not depend on it either.

    Args:
        model: an encoder, or a model that has one.
        preprocessing: how it sees crops.
    """
    encoder = model.backbone if isinstance(model, SegmentationModel) else model
    if not isinstance(encoder, MuViTEncoder) or not is_cachable(encoder) or len(encoder.levels) == 1:
        return False
    return preprocessing.normalizes_by_view and "grid" in tile_placements(preprocessing.placement)


def grouped(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """Places of equal keys."""
    groups: dict[Key, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return groups


def ungrouped(parts: Sequence[Tensor], places: Iterable[Sequence[int]]) -> Tensor:
    """The rows of all parts, each at its place."""
    order = torch.tensor([place for group in places for place in group]).argsort()
    return _rows(torch.cat(list(parts)), order)


def _rows(x: Tensor, places: Sequence[int] | Tensor) -> Tensor:
    """Rows of a tensor, without waiting for its device."""
    return x[torch.as_tensor(places).to(x.device, non_blocking=True)]
