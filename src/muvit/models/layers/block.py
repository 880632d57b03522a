"""The transformer block that encoder and decoders are made of (MuViT section 3.2)."""

from torch import Tensor, nn

from muvit.models.layers.attention import Attention, KeysValues, Spans
from muvit.models.layers.rope import AxialRope, Rotation


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU between; the hidden width is twice the token width."""

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
            rotation = None if rotation is None else (rotation[0][:, queries], rotation[1][:, queries])
        x = x + self.attn(self.norm1(x), rotation, context_kv=context_kv, mask=mask)
        return x + self.ff(self.norm2(x))
