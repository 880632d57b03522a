"""Mask2Former-style decoder: learnable queries look at the tokens of all levels, and each draws a mask on the pixels.

MuViT section 3.4 and supplement C.2. The layers follow the list that matches the paper's parameter counts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from muvit.models.layers.attention import Attention, FeedForward
from muvit.models.layers.rope import AxialRope


class QueryLayer(nn.Module):
    """Pre-norm layer: queries attend to each other, then to the context, then a feed-forward network.

    Args:
        dim: width of the queries and of the context.
        heads: attention heads.
        rope: rotates the keys of the context; None leaves them without position.
    """

    def __init__(self, dim: int, heads: int, rope: AxialRope | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = Attention(dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)
        self.rotary_pos_embs = rope

    def forward(self, queries: Tensor, context: Tensor, positions: Tensor) -> Tensor:
        """Queries ``(B, Q, dim)`` after a look at the context ``(B, N, dim)`` at ``positions`` ``(B, N, ndim)``."""
        # queries have no position: only keys turn, by their place relative to the origin of the positions
        rotation = None if self.rotary_pos_embs is None else self.rotary_pos_embs(positions)
        queries = queries + self.self_attn(self.norm1(queries))
        seen = self.cross_attn.keys_values(context, rotation)
        queries = queries + self.cross_attn(self.norm2(queries), context_kv=seen)
        return queries + self.ff(self.norm3(queries))


class QueryDecoder(nn.Module):
    """From the tokens of all levels to one mask embedding for each query.

    Args:
        num_queries: number of queries.
        dim: width of the queries and of the context.
        out_dim: width of the mask embeddings, that of the pixel features.
        heads: attention heads.
        ropes: what rotates the keys in each layer, None where they have no position; as many as there are layers.
    """

    def __init__(self, num_queries: int, dim: int, out_dim: int, heads: int, ropes: Sequence[AxialRope | None]) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.layers = nn.ModuleList(QueryLayer(dim, heads, rope) for rope in ropes)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, out_dim)
        )

    def forward(self, context: Tensor, positions: Tensor) -> Tensor:
        """Mask embeddings of a context.

        Args:
            context: ``(B, N, dim)``, tokens of all levels, finest first.
            positions: ``(B, N, ndim)``, their world coordinates. What counts is the distance to the first token, so
                that the output is the same wherever in the world a sample lies.

        Returns:
            ``(B, num_queries, out_dim)``.
        """
        positions = positions - positions[:, :1]
        queries = self.queries.expand(context.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, context, positions)
        return self.mlp(self.norm(queries))


def query_masks(embeddings: Tensor, features: Tensor) -> Tensor:
    """Products ``(B, Q, *space)`` of mask embeddings ``(B, Q, width)`` and pixel features ``(B, width, *space)``."""
    return torch.einsum("bqc,bc...->bq...", embeddings, features)
