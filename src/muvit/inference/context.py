"""Prediction that encodes each coarse view once and reuses it for every tile inside it."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from muvit.data.sampling import Window
from muvit.encoders import EncodedContext
from muvit.geometry import naive_boxes
from muvit.segmentation import SegmentationModel, Segmenter
from muvit.segmentation.segmenter import Encoded


class ContextCaching:
    """Logits of the tiles of one slide, with a memory of the coarse views that they share.

    A segmenter whose encoder attends ``coarse_to_fine`` gives the same logits (but for rounding) as without the memory,
    and for tiles in the same coarse views computes the finest view alone. Every other model goes its ordinary way.

    The memory holds for one slide, one set of weights, one device and one precision: make a new one for each. What it
    keeps of a coarse view of the paper's encoder (256 px, 12 blocks of width 512) is 50 MB in float32.

    Args:
        model: in evaluation mode.
        capacity: coarse views, of all levels together, that are remembered; the least recently used is forgotten.
    """

    def __init__(self, model: SegmentationModel, capacity: int = 16) -> None:
        self.model = model
        self.capacity = capacity
        self._contexts: OrderedDict[tuple[Window, ...], EncodedContext] = OrderedDict()

    @property
    def is_caching(self) -> bool:
        """Whether the model's coarse views can be encoded by themselves."""
        if not isinstance(self.model, Segmenter):
            return False
        encoder = self.model.encoder
        return encoder.config.attention_mode == "coarse_to_fine" and len(encoder.levels) > 1

    def label_logits(self, img: Tensor, bbox: Tensor, windows: Sequence[Sequence[Window]]) -> Tensor:
        """Logits ``(B, K, *space)`` of the finest views.

        Args:
            img: ``(B, L, C, *space)``.
            bbox: ``(B, L, 2, ndim)``, world pixels, (t)(z)yx.
            windows: of each sample its ``L`` crops, finest first; equal crops are taken for equal pixels.
        """
        if not self.is_caching:
            return self.model.label_logits(img, bbox)
        groups: dict[tuple[Window, ...], list[int]] = {}
        for number, crops in enumerate(windows):
            groups.setdefault(tuple(crops[1:]), []).append(number)
        logits = [self._in_context(img[chosen], bbox[chosen], coarse) for coarse, chosen in groups.items()]
        order = torch.tensor([number for chosen in groups.values() for number in chosen])
        return torch.cat(logits)[order.argsort().to(img.device)]

    def _in_context(self, img: Tensor, bbox: Tensor, coarse: tuple[Window, ...]) -> Tensor:
        """Logits of tiles that share all coarse views."""
        model = self.model
        assert isinstance(model, Segmenter)
        encoder = model.encoder
        if model.config.boxes == "naive":
            boxes = naive_boxes(encoder.levels, img.shape[3:], encoder.config.patch_spacing)
            bbox = boxes.to(bbox).expand(bbox.shape)
        context = self._context(img[:1], bbox[:1], coarse)
        _, coords, kept = encoder.forward_in_context(img[:, :1], bbox[:, :1], context, model.skips)
        last, *others = reversed(kept)
        if model.query_decoder is not None:  # which looks at the tokens of all levels
            levels = context.expand(len(img)).levels
            last = torch.cat([last, *(level.tokens for level in levels)], dim=1)
            coords = torch.cat([coords, *(level.coords for level in levels)], dim=1)
        maps = [encoder.to_maps(tokens, img.shape[3:]) for tokens in (last, *others)]
        return model.decode(Encoded(maps, (coords - context.origin[:, None]).float()), img, 0)

    def _context(self, img: Tensor, bbox: Tensor, coarse: tuple[Window, ...]) -> EncodedContext:
        """Context of one sample ``(1, L, C, *space)``, from the coarsest level on; made where it is not remembered."""
        assert isinstance(self.model, Segmenter)
        context: EncodedContext | None = None
        for level in reversed(range(len(coarse))):
            key, view = coarse[level:], slice(level + 1, level + 2)
            if key not in self._contexts:
                self._contexts[key] = self.model.encoder.encode_context(img[:, view], bbox[:, view], context)
            self._contexts.move_to_end(key)
            context = self._contexts[key]
        while len(self._contexts) > self.capacity:
            self._contexts.popitem(last=False)
        assert context is not None
        return context
