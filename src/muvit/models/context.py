"""Coarse views encoded once for everything inside them, under the attention pattern ``coarse_to_fine``.

There no coarse token depends on a finer one. So the coarse views of a scene are encoded by themselves, and views inside
them against their keys and values, with the outputs that all views together would give. Copies of coarse tokens
(``coarse_copies``) do depend on the finest view, and are made anew for each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from muvit.errors import InputError, ShapeError
from muvit.models.encoder import MuViTEncoder
from muvit.models.layers.attention import KeysValues
from muvit.models.layers.patch import patchify


@dataclass(frozen=True, kw_only=True)
class EncodedContext:
    """The coarse views of a scene, encoded for the finer ones."""

    keys_values: tuple[KeysValues, ...]
    """Of every block: rotated keys and values ``(B, heads, n, head_dim)`` of one coarse level's tokens."""
    tokens: Tensor
    """These tokens after the last block, ``(B, n, D)``."""
    coords: Tensor
    """World coordinates ``(B, n, ndim)`` of their patch centres."""
    embedded: Tensor
    """These tokens before the first block, ``(B, n, D)``."""
    bbox: Tensor
    """Box of the view ``(B, 2, ndim)``, world pixels, (t)(z)yx."""
    origin: Tensor
    """World coordinates ``(B, ndim)`` that rotations count from: the lower corner of the coarsest view."""
    outer: Self | None = None
    """The context of the still coarser levels."""

    @property
    def levels(self) -> tuple[Self, ...]:
        """This and all outer contexts, one for each coarse level, finest first."""
        return (self,) if self.outer is None else (self, *self.outer.levels)

    def expand(self, batch: int) -> "EncodedContext":
        """The context of one sample for a batch of samples that share it, without a copy.

        Raises:
            ShapeError: it is one of several samples, and not of so many.
        """
        if self.tokens.shape[0] not in (1, batch):
            raise ShapeError("context", expected=f"1 sample or {batch}", got=self.tokens.shape[0])
        return EncodedContext(
            keys_values=tuple((k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in self.keys_values),
            tokens=self.tokens.expand(batch, -1, -1),
            coords=self.coords.expand(batch, -1, -1),
            embedded=self.embedded.expand(batch, -1, -1),
            bbox=self.bbox.expand(batch, -1, -1),
            origin=self.origin.expand(batch, -1),
            outer=None if self.outer is None else self.outer.expand(batch),
        )


def is_cachable(encoder: MuViTEncoder) -> bool:
    """Whether coarse views can be encoded without the finer ones."""
    return encoder.config.attention_mode == "coarse_to_fine"


def encode_context(
    encoder: MuViTEncoder, x: Tensor, bbox: Tensor, context: EncodedContext | None = None
) -> EncodedContext:
    """Encode the coarse views of scenes once for all finer views.

    Views may come all at once, or level by level, from the coarsest: crops of level 8 that share one crop of level 32
    are encoded one by one in its context.

    Args:
        encoder: attends ``coarse_to_fine``.
        x: ``(B, l, C, *space)``, the coarsest ``l`` levels; with ``context``, the ``l`` levels before its own.
        bbox: ``(B, l, 2, ndim)``, world pixels, (t)(z)yx.
        context: of the still coarser levels, of the same samples or of a single one that all of them share.

    Returns:
        The context that views of the next finer level need.

    Raises:
        ShapeError: images or boxes have the wrong shape.
        InputError: the attention pattern is another one, or there are too many levels.
    """
    _check_cachable(encoder)
    encoder.check_images(x, x.shape[1])
    bbox = encoder.check_boxes(x, bbox)
    first = len(encoder.levels) - (0 if context is None else len(context.levels)) - x.shape[1]
    if first < 0:
        raise InputError("img", expected=f"at most {x.shape[1] + first} views beside the context", got=x.shape[1])
    for i in reversed(range(x.shape[1])):
        embedded = _embed(encoder, first + i, x[:, i])
        outputs, own = zip(*_run_blocks(encoder, embedded, x[:, i], bbox[:, i], context), strict=True)
        context = EncodedContext(
            keys_values=own,
            tokens=outputs[-1],
            coords=encoder.centers(x[:, i], bbox[:, i]),
            embedded=embedded,
            bbox=bbox[:, i],
            origin=bbox[:, i, 0] if context is None else context.origin.expand(x.shape[0], -1),
            outer=context,
        )
    assert context is not None
    return context


def encode_in_context(
    encoder: MuViTEncoder, x: Tensor, bbox: Tensor, context: EncodedContext, keep: Sequence[int] = ()
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Encode the finest views of scenes in the context of their coarse views.

    Args:
        encoder: attends ``coarse_to_fine``.
        x: ``(B, 1, C, *space)``.
        bbox: ``(B, 1, 2, ndim)``, world pixels, (t)(z)yx.
        context: of all coarse levels, of the same samples or of a single one that all of them share.
        keep: indices of blocks (0-based) whose outputs to return as well.

    Returns:
        Tokens ``(B, n, D)`` of the finest views; world coordinates of their patch centres ``(B, n, ndim)``; outputs of
        the given blocks, each ``(B, n, D)``, in block order.

    Raises:
        ShapeError: images or boxes have the wrong shape.
        InputError: the attention pattern is another one, or the context lacks a level.
    """
    _check_cachable(encoder)
    encoder.check_images(x, 1)
    x, bbox = x[:, 0], encoder.check_boxes(x, bbox)[:, 0]
    if len(context.levels) != len(encoder.levels) - 1:
        raise InputError("context", expected=f"{len(encoder.levels) - 1} coarse levels", got=len(context.levels))
    outputs = [tokens for tokens, _ in _run_blocks(encoder, _embed(encoder, 0, x), x, bbox, context)]
    return outputs[-1], encoder.centers(x, bbox), tuple(outputs[i] for i in sorted(set(keep)))


def _embed(encoder: MuViTEncoder, level: int, x: Tensor) -> Tensor:
    """Tokens ``(B, n, D)`` before the first block of views ``(B, C, *space)`` of one level."""
    return encoder.embed_level(level, patchify(x[:, None], encoder.config.patch)[:, 0])


def _run_blocks(
    encoder: MuViTEncoder, tokens: Tensor, x: Tensor, bbox: Tensor, context: EncodedContext | None
) -> Iterator[tuple[Tensor, KeysValues]]:
    """Outputs of each block for the tokens of views ``(B, C, *space)`` of one level, and their keys and values."""
    outer = () if context is None else context.expand(x.shape[0]).levels
    count, origin = tokens.shape[1], bbox[:, 0] if context is None else context.origin
    positions = encoder.centers(x, bbox - origin[:, None]).float()
    if encoder.copies is not None and len(outer) == len(encoder.levels) - 1:
        boxes = torch.stack([bbox, *(coarse.bbox for coarse in outer)], dim=1)
        everywhere = encoder.centers(x, boxes - origin[:, None, None]).flatten(1, 2).float()
        everything = torch.cat([tokens, *(coarse.embedded for coarse in outer)], dim=1)
        added, at = encoder.copies(everything, everywhere, encoder.copied_tokens(x, boxes))
        tokens, positions = torch.cat([tokens, added], dim=1), torch.cat([positions, at], dim=1)
    for i, (block, rotation) in enumerate(encoder.rotated_blocks(positions)):
        own = block.keys_values(tokens, rotation)
        keys, values = zip(own, *(coarse.keys_values[i] for coarse in outer), strict=True)
        seen = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        queries = slice(count) if i == len(encoder.layers) - 1 else None  # no block reads the last copies
        tokens = block(tokens, rotation, context_kv=seen, queries=queries)
        yield tokens[:, :count], own


def _check_cachable(encoder: MuViTEncoder) -> None:
    if not is_cachable(encoder):
        got = repr(encoder.config.attention_mode)
        raise InputError("attention_mode", expected="'coarse_to_fine' for a context of its own", got=got)
