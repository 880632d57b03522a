"""Attention maps: recorded in a forward pass, followed through the layers, and without some of the tokens.

All of it hangs on hooks that exist inside of a ``with`` block only: outside, a model runs no other code than ever.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from muvit.errors import ShapeError
from muvit.models.layers.attention import Attention, Block, attention_weights, dense_mask
from muvit.models.layers.copies import TokenCopies
from muvit.models.mask2former import QueryLayer

Inputs = tuple[Any, ...]


@contextmanager
def attention_maps(
    encoder: nn.Module, *, average_heads: bool = False, differentiable: bool = False
) -> Iterator[list[Tensor]]:
    """Record the attention of every block of an encoder in the forward passes inside of a ``with`` block.

    ```python
    with attention_maps(model.encoder) as maps:
        model(img, bbox)
    maps[-1]  # (B, heads, N, N): softmax(q k^T / sqrt(head_dim)) of the last block
    ```

    Rows are queries, columns keys, both in the order of the tokens: by level, finest first, then row-major. Keys that a
    query may not see (``attention_mode``) have weight 0. A `Segmenter` that decodes the finest view alone computes no
    other tokens in its last block, so the last map has the rows of the finest view alone. Copies of coarse tokens
    (``coarse_copies``) come after all others; the last map has no rows of them.

    Args:
        encoder: a `MuViTEncoder`, or any module with its blocks inside.
        average_heads: keep the mean over the heads, ``(B, N, N)``, for a fraction of the memory.
        differentiable: compute outputs from the recorded maps, which differ from the usual ones by rounding, so that
            `torch.autograd.grad` of a result reaches maps of all heads.

    Yields:
        A list that receives one map for each block, in their order, in each forward pass.
    """
    maps: list[Tensor] = []

    def record(module: Attention, inputs: Inputs, options: dict[str, Any], output: Tensor) -> Tensor | None:
        x, *rotation = inputs
        q, k, v = module.project(x, rotation[0] if rotation else None, options.get("context_kv"))
        weights = attention_weights(q, k, options.get("mask"))
        if differentiable and not weights.requires_grad:  # nothing before it is to be learned
            weights.requires_grad_()
        maps.append(weights.mean(1) if average_heads else weights)
        return module.merge_heads(weights @ v) if differentiable else None

    blocks = [module.attn for module in encoder.modules() if isinstance(module, Block)]
    with ExitStack() as hooks:
        for attention in blocks:
            hooks.callback(attention.register_forward_hook(record, with_kwargs=True).remove)
        yield maps


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """Attention rollout: the share of each token's content before the first block in each token after the last.

    The product over the blocks of ``(A + I) / 2``, of attention averaged over the heads (Abnar and Zuidema 2020,
    section 3); ``I`` stands for the connection that passes a block by.

    Args:
        maps: of all blocks, in their order, each ``(B, N, N)`` or ``(B, heads, N, N)``; the last may have the first
            rows alone.

    Returns:
        ``(B, N, N)``, or the rows of the last map; rows sum to 1.
    """
    flow = None
    for weights in maps:
        mean = weights.mean(1) if weights.ndim == 4 else weights
        step = (mean + _passed_by(mean)) / 2
        flow = step if flow is None else step @ flow
    assert flow is not None
    return flow


def gradient_rollout(maps: Sequence[Tensor], target: Tensor) -> Tensor:
    """Relevance of each token before the first block for a result, by attention times its gradient.

    ``R <- R + mean_heads(relu(A * dy/dA)) R`` from the first block to the last, from ``R = I`` (Chefer, Gur and Wolf
    2021, "Generic attention-model explainability", equations 5 and 6). `rollout` follows all content that reaches a
    token; here counts what raises one result, such as the logit of a class at one pixel. A decoder reads several tokens
    of several depths for a pixel, so the rows of ``R - I`` are summed, where the paper takes that of the class token.

    Args:
        maps: all heads of all blocks, from `attention_maps` with ``differentiable=True``.
        target: the result, a scalar.

    Returns:
        ``(B, N)``, at least 0.
    """
    relevance = None
    for weights, gradient in zip(maps, torch.autograd.grad(target, list(maps)), strict=True):
        step = (gradient * weights).relu().mean(1).detach()
        if relevance is None:
            relevance = torch.zeros_like(step)
        # of R - I alone: R <- R + S R is E <- E + S + S E for R = I + E
        relevance = relevance[:, : step.shape[1]] + step + step @ relevance
    assert relevance is not None
    return relevance.sum(1)


def onto_originals(shares: Tensor, copied: Tensor) -> Tensor:
    """Shares of tokens and of the copies after them, ``(B, N + c)``, as shares of the tokens alone, ``(B, N)``.

    Args:
        shares: a row of a map, or what follows from maps.
        copied: tokens that were copied ``(B, c)``, from `MuViTEncoder.copied_tokens`.
    """
    count = shares.shape[1] - copied.shape[1]
    return shares[:, :count].scatter_add(1, copied, shares[:, count:])


@contextmanager
def hidden_tokens(model: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Hide some tokens from all others in the forward passes inside of a ``with`` block, as if they were not there.

    They are keys of no query in any block of the encoder, nor of the queries of a mask2former decoder; a hidden token
    still sees itself, and is decoded if it belongs to the finest view. With a coarse token its copy is hidden.

    Args:
        model: a `Segmenter`, or a `MuViTEncoder`.
        hidden: bool ``(B | 1, N)``, tokens of all levels.

    Raises:
        ShapeError: the encoder has another number of tokens.
    """
    copied: list[Tensor] = []

    def note(module: nn.Module, inputs: Inputs) -> None:
        copied[:] = inputs[2:]

    def hide(module: nn.Module, inputs: Inputs, options: dict[str, Any]) -> tuple[Inputs, dict[str, Any]]:
        (x, *_), context = inputs, options.get("context_kv")
        num_keys = x.shape[1] if context is None else context[0].shape[2]
        copies = copied[0] if module in own and copied else None
        count = num_keys - (0 if copies is None else copies.shape[1])
        if count != hidden.shape[-1]:
            raise ShapeError("hidden", expected=f"(B, N={count}), one for each token", got=tuple(hidden.shape))
        absent = hidden
        if copies is not None:
            absent = torch.cat([hidden.expand(len(copies), -1), hidden.take_along_dim(copies, 1)], dim=1)
        visible, mask = ~absent[:, None, None, :], options.get("mask")
        allowed = visible if mask is None else visible & dense_mask(mask, num_keys, x.device)
        if module in own:
            allowed = allowed | torch.eye(x.shape[1], num_keys, dtype=torch.bool, device=x.device)
        return inputs, options | {"mask": allowed}

    own = [module.attn for module in model.modules() if isinstance(module, Block)]
    context = [module.cross_attn for module in model.modules() if isinstance(module, QueryLayer)]
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, TokenCopies):
                hooks.callback(module.register_forward_pre_hook(note).remove)
        for attention in (*own, *context):
            hooks.callback(attention.register_forward_pre_hook(hide, with_kwargs=True).remove)
        yield


def _passed_by(weights: Tensor) -> Tensor:
    """Identity of the shape of weights ``(B, N, M)``, whose rows are the first tokens."""
    return torch.eye(*weights.shape[1:], dtype=weights.dtype, device=weights.device)
