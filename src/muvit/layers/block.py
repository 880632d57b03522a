"""The transformer block that encoder and decoders are made of (MuViT section 3.2)."""

from torch import Tensor, nn

from muvit.layers.attention import Attention, Spans
from muvit.layers.rope import AxialRope, Rotation


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU between; the hidden width is twice the token width, as in the release."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim))


class Block(nn.Module):
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

    def rotation(self, coords: Tensor) -> Rotation | None:
        """Angles of this block for tokens at ``coords`` ``(B, N, ndim)``."""
        return None if self.rotary_pos_embs is None else self.rotary_pos_embs(coords)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        *,
        context_kv: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | Spans | None = None,
    ) -> Tensor:
        """``(B, N, D) -> (B, N, D)``; arguments as in `Attention.forward`."""
        x = x + self.attn(self.norm1(x), rotation, context_kv=context_kv, mask=mask)
        return x + self.ff(self.norm2(x))
