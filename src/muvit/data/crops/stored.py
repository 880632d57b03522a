"""Samples whose pixels are as their slide stores them, and the numbers that finish them on any device.

Reading, in worker processes, leaves pixels in few bytes and finds out what is to be done to them: their `Look`. Pixels
become floating-point numbers in one place, `finish`, for a single sample as for a batch on a GPU, with the same result.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from muvit.data.crops.defects import Defects, degrade

Stored = dict[str, Any]
"""A sample or a batch as models take it, but ``img`` is in one of `DTYPES` and has its `Look` as ``look``. ``inside``,
bool ``(..., L, *space)``, is False outside the image, where that may be and is to stay 0."""

DTYPES = (torch.uint8, torch.uint16, torch.float32)
"""Types of stored pixels, each of which holds the values of those before it."""


class Look(NamedTuple):
    """Numbers that turn stored pixels into those that a model sees: ``(x - low) / spread * gain + offset``."""

    low: Tensor
    """Native value that becomes 0, of each view and channel: float32 ``(..., L, C)``."""
    spread: Tensor
    """Native units that become 1, likewise; infinity turns all pixels into 0."""
    gain: Tensor | None = None
    """Factor of the normalised pixels of each view, float32 ``(..., L)``; None: they are not augmented."""
    offset: Tensor | None = None
    """Values that are then added, likewise; pixels outside the image stay 0."""
    defects: Defects | None = None
    """Changes of the pixels after that."""


def finish(stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """A sample or a batch as models take it, computed on its device without waiting for it.

    Args:
        stored: ``img`` ``(..., L, C, *space)`` with its look, and other entries; what has no look is finished.

    Returns:
        The entries without look and mask, ``img`` float32. Pixels that are NaN or infinite, before the gain, are 0.
    """
    if "look" not in stored:
        return dict(stored)
    look, img, axes = stored["look"], stored["img"], stored["look"].low.ndim - 1
    result = _empty(img.shape, torch.float32, img.device)
    views, pixels = result.flatten(0, axes - 1), img.flatten(0, axes - 1)
    numbers = _each(lambda entry: entry.flatten(0, axes - 1), (look, stored.get("inside")))
    # a view stays in the processor's cache from the first step to the last; a device takes all of them at once
    count = 1 if img.device.type == "cpu" else len(views)
    for first in range(0, len(views), count):
        part = slice(first, first + count)
        _finish_views(views[part], pixels[part], *_each(itemgetter(part), numbers))
    return {name: entry for name, entry in stored.items() if name not in ("look", "inside")} | {"img": result}


def _finish_views(views: Tensor, pixels: Tensor, look: Look, inside: Tensor | None) -> None:
    """Write ``(n, C, *space)`` finished views, in float32 and in this order, to the same bits everywhere."""
    space = (1,) * (views.ndim - 2)
    views.copy_(pixels)
    views.sub_(look.low.unflatten(-1, (-1, *space))).div_(look.spread.unflatten(-1, (-1, *space)))
    if pixels.is_floating_point():
        views.nan_to_num_(0.0, 0.0, 0.0)
    if look.gain is not None and look.offset is not None:
        views.mul_(look.gain.reshape(-1, 1, *space)).add_(look.offset.reshape(-1, 1, *space))
    if inside is not None:
        views.masked_fill_(~inside[:, None], 0.0)
    if look.defects is not None:
        degrade(views, look.defects, inside)


def _each(change: Callable[..., Tensor], entries: Any) -> Any:
    """Tensors of nested tuples, changed; None stays."""
    if not isinstance(entries, tuple):
        return None if entries is None else change(entries)
    found = [_each(change, entry) for entry in entries]
    return type(entries)(*found) if hasattr(entries, "_fields") else tuple(found)


def collate(samples: Sequence[Stored]) -> Stored:
    """A batch of samples, each entry stacked along a new first axis; pixels in the widest of their types.

    As torch's own, but in the main process in memory that numpy asks for in huge pages: for large batches, the system
    takes longer to hand out small ones than torch takes to copy the pixels.
    """
    stack = _stacked if get_worker_info() is None else default_collate
    batch: Stored = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        entries = [sample[name] if name in sample else _all_inside(sample["img"]) for sample in samples]
        if name == "look":
            batch[name] = _stacked_looks(stack, entries)
        else:
            batch[name] = stack(_widest(entries) if name == "img" else entries)
    return batch


def _stacked_looks(stack: Callable[[list[Tensor]], Tensor], entries: Sequence[Any]) -> Any:
    if not isinstance(entries[0], tuple):
        return None if entries[0] is None else stack(list(entries))
    return type(entries[0])(*(_stacked_looks(stack, field) for field in zip(*entries, strict=True)))


def _all_inside(img: Tensor) -> Tensor:
    """The mask of a sample whose views all lie in the image."""
    return torch.ones(len(img), *img.shape[2:], dtype=torch.bool)


def _widest(pixels: list[Tensor]) -> list[Tensor]:
    types = {entry.dtype for entry in pixels}
    return pixels if len(types) == 1 else [entry.to(max(types, key=DTYPES.index)) for entry in pixels]


def _stacked(entries: list[Tensor]) -> Tensor:
    return torch.stack(entries, out=_empty((len(entries), *entries[0].shape), entries[0].dtype, entries[0].device))


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(shape, torch.empty(0, dtype=dtype).numpy().dtype))
