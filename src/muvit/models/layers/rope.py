"""Axial rotary position embedding on world coordinates (MuViT section 3.2)."""

from typing import Literal

import torch
from torch import Tensor, nn

from muvit.errors import InputError

RotaryMode = Literal["none", "fixed", "shared", "per_layer"]
"""Frequencies of the blocks: none, fixed, learnable and shared by all blocks, or learnable in each block."""

RotaryParam = Literal["freq", "base"]
"""Learnable parameters of the rotation: every frequency, or one base per axis."""

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of the rotation angles, each ``(B, N, head_dim / 2)`` float32."""


def axis_dims(head_dim: int, ndim: int) -> tuple[int, ...]:
    """Features of a head that each axis rotates: all even, the first axis takes what the others leave.

    Raises:
        InputError: the head is odd or too narrow to give every axis two features.
    """
    others = 2 * (head_dim // ndim // 2)
    if head_dim % 2 or others < 2:
        raise InputError("dim / heads", expected=f"an even head width of at least {2 * ndim}", got=head_dim)
    return (head_dim - others * (ndim - 1), *(others,) * (ndim - 1))


class AxialRope(nn.Module):
    """Rotation angles ``theta_k = p_a * omega_k`` of every axis ``a``; ``omega_k = base ** (-2k / d_a)`` at first.

    Args:
        head_dim: features of one attention head.
        ndim: number of coordinate axes.
        base: initial base; 10000 suits worlds of 1e5 px, small worlds want a smaller one.
        learn: what the optimiser may change: each frequency (``freq``), one base per axis
            (``base``), or nothing (``none``).
    """

    exponent: Tensor
    axis: Tensor

    def __init__(
        self, head_dim: int, ndim: int, base: float = 10000.0, learn: Literal["freq", "base", "none"] = "freq"
    ) -> None:
        super().__init__()
        dims = axis_dims(head_dim, ndim)
        exponent = torch.cat([-torch.arange(0, d, 2, dtype=torch.float64) / d for d in dims])
        axis = torch.repeat_interleave(torch.arange(ndim), torch.tensor(dims) // 2)
        self.register_buffer("exponent", exponent.float(), persistent=False)
        self.register_buffer("axis", axis, persistent=False)
        self.base: Tensor | None = None
        if learn == "base":
            self.base = nn.Parameter(torch.full((ndim,), float(base)))
        else:
            freq = (base**exponent).float()
            self.freq = nn.Parameter(freq) if learn == "freq" else nn.Buffer(freq)

    def forward(self, coords: Tensor) -> Rotation:
        """Angles of tokens at ``coords`` ``(B, N, ndim)``, world pixels, worked out in float64."""
        freq = self.freq if self.base is None else self.base[self.axis] ** self.exponent
        # at 1e5 px and 1 rad/px float32 would be off by 1e-2 rad, and from another origin by another amount;
        # MPS has nothing wider
        wide = torch.float32 if coords.device.type == "mps" else torch.float64
        angles = coords.to(wide)[..., self.axis] * freq.to(wide)
        return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate feature pairs of ``x`` ``(B, heads, N, head_dim)``: (u, v) -> (u cos - v sin, u sin + v cos)."""
    cos, sin = (t.unsqueeze(1) for t in rotation)
    u, v = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((u * cos - v * sin, u * sin + v * cos), dim=-1).flatten(-2).to(x.dtype)


def build_ropes(
    mode: RotaryMode, num_layers: int, head_dim: int, ndim: int, base: float, param: RotaryParam = "freq"
) -> list[AxialRope | None]:
    """One rotary embedding per block: none, all the same object, or each its own."""
    if mode == "none":
        return [None] * num_layers
    learn: Literal["freq", "base", "none"] = "none" if mode == "fixed" else param
    count = num_layers if mode == "per_layer" else 1
    ropes = [AxialRope(head_dim, ndim, base, learn) for _ in range(count)]
    return [ropes[i % count] for i in range(num_layers)]
