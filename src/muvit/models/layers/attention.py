"""Self-attention with rotated queries and keys, and the transformer block around it."""

from collections.abc import Sequence
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from muvit.errors import InputError
from muvit.models.layers.rope import AxialRope, Rotation, split_heads
from muvit.models.layers.stage import Stage

AttentionMode = Literal["all", "causal", "same", "random", "coarse_to_fine"]
"""Keys that a query attends to: all levels; its own and finer ones; only its own; one random token; its own and coarser
ones."""

Spans = Sequence[tuple[slice, slice]]
"""Runs of queries and the run of keys that each may see: attention without a dense mask."""

KeysValues = tuple[Tensor, Tensor]
"""Rotated keys and values of some tokens, each ``(B, heads, M, head_dim)``."""


class Attention(nn.Module):
    """Multi-head attention without biases; queries and keys are rotated by their world coordinates.

    Args:
        dim: width of the tokens, a multiple of ``heads``.
        heads: number of heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise InputError("dim", expected=f"a multiple of the {heads} heads", got=dim)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        *,
        context_kv: KeysValues | None = None,
        mask: Tensor | Spans | None = None,
    ) -> Tensor:
        """Attend from ``x`` to itself, or to the keys and values of a context.

        Args:
            x: ``(B, N, D)``.
            rotation: angles of the tokens of ``x``; None leaves them without position.
            context_kv: keys and values from `keys_values`, which then replace those of ``x``.
            mask: bool ``(B | 1, 1, N, M)``, true where a query may look, or spans.

        Returns:
            ``(B, N, D)``.
        """
        q, k, v = self.project(x, rotation, context_kv)
        return self.merge_heads(attend(q, k, v, mask))

    def project(
        self, x: Tensor, rotation: Rotation | None = None, context_kv: KeysValues | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, and keys and values, each ``(B, heads, N, head_dim)``; arguments as of `forward`."""
        if context_kv is None:
            q, k, v = split_heads(self.qkv(x), 3, self.heads, rotation)
            return q, k, v
        (q,) = split_heads(self._project(x, slice(x.shape[-1])), 1, self.heads, rotation)
        return q, *context_kv

    def merge_heads(self, x: Tensor) -> Tensor:
        """Output ``(B, N, D)`` from what the heads found, ``(B, heads, N, head_dim)``."""
        return self.out(x.transpose(1, 2).flatten(2))

    def keys_values(self, context: Tensor, rotation: Rotation | None = None) -> KeysValues:
        """Rotated keys and values ``(B, heads, M, head_dim)`` of a context ``(B, M, D)``."""
        k, v = split_heads(self._project(context, slice(context.shape[-1], None)), 2, self.heads, rotation)
        return k, v

    def _project(self, x: Tensor, rows: slice) -> Tensor:
        """The projection of ``x`` by some rows of the weight."""
        # what low-rank additions bring is not in the rows of the weight
        return linear(x, self.qkv.weight[rows]) if type(self.qkv) is nn.Linear else self.qkv(x)[..., rows]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Spans | None) -> Tensor:
    """Scaled dot-product attention of ``(B, heads, N, head_dim)``, under a bool mask or span by span."""
    if mask is None or isinstance(mask, Tensor):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return torch.cat(
        [scaled_dot_product_attention(q[:, :, rows], k[:, :, cols], v[:, :, cols]) for rows, cols in mask], dim=2
    )


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | Spans | None) -> Tensor:
    """Weights ``(B, heads, N, M)`` by which `attend` averages the values; rows sum to 1."""
    scores = q @ k.mT / sqrt(q.shape[-1])
    if mask is None:
        return scores.softmax(-1)
    return scores.masked_fill(~dense_mask(mask, k.shape[2], q.device), -torch.inf).softmax(-1)


def dense_mask(mask: Tensor | Spans, num_keys: int, device: torch.device) -> Tensor:
    """Bool ``(B | 1, 1, N, num_keys)`` from a mask of either kind, true where a query may look."""
    if isinstance(mask, Tensor):
        return mask
    key = torch.arange(num_keys, device=device)
    rows = [((key >= cols.start) & (key < cols.stop)).expand(run.stop - run.start, -1) for run, cols in mask]
    return torch.cat(rows)[None, None]


def mask_of_queries(mask: Tensor | Spans | None, queries: slice) -> Tensor | Spans | None:
    """The mask of the first queries, as many as ``queries`` takes."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        return mask[:, :, queries]
    return [(slice(run.start, min(run.stop, queries.stop)), keys) for run, keys in mask if run.start < queries.stop]


def level_spans(mode: AttentionMode, num_levels: int, tokens_per_level: int, num_copies: int = 0) -> Spans | None:
    """Spans of a complete token sequence, level-major and finest first; None where every token sees every other.

    Copies of coarse tokens stand at the end, under ``coarse_to_fine`` alone. They belong to the finest level: they see
    all tokens, and only they and the finest see them.

    Raises:
        InputError: the mode is unknown, or cannot be told by spans (``random``).
    """
    edge = [i * tokens_per_level for i in range(num_levels + 1)]
    if mode == "all":
        return None
    seen = {
        "causal": lambda i: slice(0, edge[i + 1]),
        "same": lambda i: slice(edge[i], edge[i + 1]),
        "coarse_to_fine": lambda i: slice(edge[i], edge[-1]),
    }
    if mode not in seen:
        raise InputError("attention_mode", expected=f"all, {', '.join(seen)}", got=repr(mode))
    spans = [(slice(edge[i], edge[i + 1]), seen[mode](i)) for i in range(num_levels)]
    if num_copies == 0:
        return spans
    everything = slice(0, edge[-1] + num_copies)
    return [(spans[0][0], everything), *spans[1:], (slice(edge[-1], everything.stop), everything)]


def level_mask(mode: AttentionMode, query_level: Tensor, key_level: Tensor) -> Tensor | None:
    """The same patterns for tokens in any order: ``(B, 1, N, M)`` bool from level indices ``(B, N)`` and ``(B, M)``."""
    query, key = query_level[:, None, :, None], key_level[:, None, None, :]
    if mode == "random":
        return random_key_mask(query.shape[2], key.shape[3], query_level.device)
    return {"all": None, "causal": query >= key, "same": query == key, "coarse_to_fine": query <= key}[mode]


def random_key_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Let each query see one random key, ``(1, 1, num_queries, num_keys)``, bool (mode ``random``)."""
    chosen = torch.randint(num_keys, (num_queries, 1), device=device)
    return torch.zeros(num_queries, num_keys, dtype=torch.bool, device=device).scatter_(1, chosen, True)[None, None]


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU between; the hidden width is twice the token width."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim))


class Block(Stage):
    """Pre-norm block: ``h = x + Attention(LN(x))``, then ``h + FeedForward(LN(h))``.

    Args:
        dim: token width.
        heads: attention heads.
        rope: rotary embedding of this block; blocks that share one hold the same object. None leaves tokens without
            position.
        dropout: inside the feed-forward network.
    """

    def __init__(self, dim: int, heads: int, rope: AxialRope | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout)
        self.rotary_pos_embs = rope

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Send tokens through the block, as `forward`."""
        return self.run(super().__call__, *args, **options)

    def rotation(self, coords: Tensor) -> Rotation | None:
        """Angles of this block for tokens at ``coords`` ``(B, N, ndim)``."""
        return None if self.rotary_pos_embs is None else self.rotary_pos_embs(coords)

    def keys_values(self, x: Tensor, rotation: Rotation | None = None) -> KeysValues:
        """Keys and values of tokens ``(B, N, D)`` as this block's attention sees them."""
        return self.attn.keys_values(self.norm1(x), rotation)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        *,
        context_kv: KeysValues | None = None,
        mask: Tensor | Spans | None = None,
        queries: slice | None = None,
    ) -> Tensor:
        """Send tokens through the block.

        Args:
            x: ``(B, N, D)``.
            rotation: as in `Attention.forward`.
            context_kv: as in `Attention.forward`.
            mask: as in `Attention.forward`; with ``queries``, of these alone.
            queries: the tokens to compute; they see all of ``x`` as ever. Unset, all.

        Returns:
            The tokens that were computed, ``(B, N, D)``.
        """
        if queries is not None:
            context_kv = self.keys_values(x, rotation) if context_kv is None else context_kv
            x = x[:, queries]
            rotation = None if rotation is None else rotation[:, queries]
        x = x + self.attn(self.norm1(x), rotation, context_kv=context_kv, mask=mask)
        return x + self.ff(self.norm2(x))
