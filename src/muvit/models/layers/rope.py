"""Axial rotary position embedding on world coordinates (MuViT section 3.2)."""

from collections.abc import Sequence
from math import log, pi
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from muvit.checks import Bounds, Positive
from muvit.errors import InputError
from muvit.levels import Level, level_factors

RotaryMode = Literal["none", "fixed", "shared", "per_layer"]
"""Frequencies of the blocks: none, fixed, learnable and shared by all blocks, or learnable in each block."""

RotaryBase = Annotated[float, Bounds(above=1)] | tuple[Positive, Positive]
"""Base of rotary frequencies, or their shortest and longest period in world pixels."""

RotaryParam = Literal["freq", "base"]
"""Learnable parameters of the rotation: every frequency, or one base per axis."""

Rotation = Tensor
"""Cosine and sine of the rotation angles, ``(B, N, head_dim / 2, 2)`` float32: unit complex numbers, taken apart."""


def axis_dims(head_dim: int, ndim: int) -> tuple[int, ...]:
    """Features of a head that each axis rotates: all even, the first axis takes what the others leave.

    Raises:
        InputError: the head is odd or too narrow to give every axis two features.
    """
    others = 2 * (head_dim // ndim // 2)
    if head_dim % 2 or others < 2:
        raise InputError("dim / heads", expected=f"an even head width of at least {2 * ndim}", got=head_dim)
    return (head_dim - others * (ndim - 1), *(others,) * (ndim - 1))


Periods = tuple[float, float]
"""Shortest and longest period of a rotation, world pixels."""


def periods_between(pitch: float, extent: float) -> Periods:
    """Periods for tokens ``pitch`` apart in views ``extent`` wide, world pixels.

    Two tokens are the shortest period that their grid can tell from longer ones; with twice the extent as the longest,
    no two places in a view look alike.
    """
    return 2 * pitch, 2 * extent


def periods_of_views(levels: Sequence[Level], patch: Sequence[int], size: Sequence[int]) -> Periods:
    """Periods for views of ``size`` pixels: from the finest patches to the coarsest view."""
    factors = [level_factors(level, len(patch)) for level in levels]
    pitch = min(p * f for level in factors for p, f in zip(patch, level, strict=True))
    return periods_between(pitch, max(n * f for level in factors for n, f in zip(size, level, strict=True)))


def frequencies(dims: Sequence[int], start: float | Periods) -> Tensor:
    """Frequencies of the feature pairs of each axis, rad/px, float64.

    Args:
        dims: features that each axis rotates.
        start: a base, for ``omega_k = base ** (-2k / d_a)``; or the shortest and longest period, for ``2 pi / period``
            of periods that are evenly spaced on a logarithmic scale.
    """
    if not isinstance(start, tuple):
        return start ** _exponents(dims)
    fastest, slowest = (log(2 * pi / period) for period in start)
    return torch.cat([torch.linspace(fastest, slowest, d // 2, dtype=torch.float64) for d in dims]).exp()


def _exponents(dims: Sequence[int]) -> Tensor:
    return torch.cat([-torch.arange(0, d, 2, dtype=torch.float64) / d for d in dims])


class AxialRope(nn.Module):
    """Rotation angles ``theta_k = p_a * omega_k`` of every axis ``a``.

    Args:
        head_dim: features of one attention head.
        ndim: number of coordinate axes.
        base: of the initial `frequencies`; 10000 suits worlds of 1e5 px, small worlds want a smaller one, or periods.
        learn: what the optimiser may change: each frequency (``freq``), one base per axis
            (``base``), or nothing (``none``).

    Raises:
        InputError: the head is odd or too narrow, or bases are to be learned, but periods are given.
    """

    exponent: Tensor
    axis: Tensor

    def __init__(
        self, head_dim: int, ndim: int, base: float | Periods = 10000.0, learn: Literal["freq", "base", "none"] = "freq"
    ) -> None:
        super().__init__()
        dims = axis_dims(head_dim, ndim)
        axis = torch.repeat_interleave(torch.arange(ndim), torch.tensor(dims) // 2)
        self.register_buffer("exponent", _exponents(dims).float(), persistent=False)
        self.register_buffer("axis", axis, persistent=False)
        self.base: Tensor | None = None
        if learn == "base":
            if isinstance(base, tuple):
                raise InputError("rotary_base", expected="a number, as rotary_param is base", got=base)
            self.base = nn.Parameter(torch.full((ndim,), float(base)))
        else:
            freq = frequencies(dims, base).float()
            self.freq = nn.Parameter(freq) if learn == "freq" else nn.Buffer(freq)

    def forward(self, coords: Tensor) -> Rotation:
        """Angles of tokens at ``coords`` ``(B, N, ndim)``, world pixels, worked out in float64."""
        freq = self.freq if self.base is None else self.base[self.axis] ** self.exponent
        # at 1e5 px and 1 rad/px float32 would be off by 1e-2 rad, and from another origin by another amount;
        # MPS has nothing wider
        wide = torch.float32 if coords.device.type == "mps" else torch.float64
        angles = coords.to(wide)[..., self.axis] * freq.to(wide)
        return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


class FixedPositions(AxialRope):
    """Sines and cosines of the places of tokens in their views, to be added to the tokens.

    ``cos(p / P * omega_k)`` and ``sin(p / P * omega_k)`` of every axis, with ``omega_k = 10000 ** (-2k / d_a)``: places
    ``p`` are pixels, patches of ``P`` pixels the unit.

    Args:
        dim: token width.
        patch: side of a patch along each axis.

    Raises:
        InputError: the tokens are too narrow.
    """

    def __init__(self, dim: int, patch: Sequence[int]) -> None:
        super().__init__(dim, len(patch), learn="none")
        self.freq = nn.Buffer(self.freq / torch.tensor(patch)[self.axis], persistent=False)

    def forward(self, coords: Tensor) -> Tensor:
        """Embedding ``(B, N, dim)`` of places ``(B, N, ndim)``."""
        return super().forward(coords).flatten(-2)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate feature pairs of ``x`` ``(B, heads, N, head_dim)``: (u, v) -> (u cos - v sin, u sin + v cos)."""
    cos, sin = rotation.unsqueeze(1).unbind(-1)
    u, v = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((u * cos - v * sin, u * sin + v * cos), dim=-1).flatten(-2).to(x.dtype)


_COMPLEX = ("cpu", "cuda")
"""Types of device that rotate by multiplication of complex numbers, in one pass."""


def split_heads(x: Tensor, num_parts: Literal[1, 2, 3], heads: int, rotation: Rotation | None) -> tuple[Tensor, ...]:
    """Heads of projected tokens, all but the values rotated.

    Args:
        x: ``(B, N, num_parts * D)``: queries (1 part), keys and values (2), or all three (3).
        num_parts: number of parts.
        heads: heads of each part.
        rotation: angles of the tokens; None leaves them without position.

    Returns:
        Each part, ``(B, heads, N, head_dim)``.
    """
    if rotation is not None and x.device.type in _COMPLEX and not torch.compiler.is_compiling():
        return _SplitHeads.apply(x, rotation, num_parts, heads)
    # (B, N, parts * heads * head_dim) -> parts x (B, heads, N, head_dim)
    parts = x.unflatten(-1, (num_parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if rotation is None:
        return parts
    count = _num_rotated(num_parts)
    return (*(rotate(part, rotation) for part in parts[:count]), *parts[count:])


class _SplitHeads(Function):
    """`split_heads` in one pass over each part, which keeps for the backward pass nothing but its results.

    Written out because the derivatives of views and products would keep the projected tokens beside the rotated ones,
    and gather gradients part by part before they are turned back. Keys and values come out head by head in memory,
    where attention on a CPU is fastest.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation, num_parts: int, heads: int) -> tuple[Tensor, ...]:
        count, turn = _num_rotated(num_parts), torch.view_as_complex(rotation)[:, :, None]
        results = []
        for i, part in enumerate(x.unflatten(-1, (num_parts, heads, -1)).unbind(2)):
            is_query = i == 0 and num_parts != 2
            out = torch.empty_like(part, memory_format=torch.contiguous_format) if is_query else _by_head(part)
            _turn(part, turn, out) if i < count else out.copy_(part)
            results.append(out.transpose(1, 2))
        ctx.save_for_backward(rotation, *(results[:count] if ctx.needs_input_grad[1] else ()))
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rotation, *rotated = ctx.saved_tensors
        batch, heads, tokens, width = grads[0].shape
        back, count = torch.view_as_complex(rotation).conj().resolve_conj()[:, :, None], _num_rotated(len(grads))
        of_x = grads[0].new_empty(batch, tokens, len(grads), heads, width)
        for i, grad in enumerate(grads):
            part = grad.transpose(1, 2)
            _turn(part, back, of_x[:, :, i]) if i < count else of_x[:, :, i].copy_(part)
        of_rotation = None
        if rotated:
            # d(turn * z) = dturn * z, and z = conj(turn) * result, as turns have length 1
            pairs = zip(grads, rotated, strict=False)
            total = torch.stack([(_complex(g) * _complex(r).conj()).sum(1) for g, r in pairs]).sum(0)
            of_rotation = torch.view_as_real(total * torch.view_as_complex(rotation)).sum_to_size(rotation.shape)
        return of_x.flatten(2), of_rotation, None, None


def _num_rotated(num_parts: int) -> int:
    return max(1, num_parts - 1)


def _by_head(part: Tensor) -> Tensor:
    """Memory for ``(B, N, heads, head_dim)`` in the order ``(B, heads, N, head_dim)``."""
    batch, tokens, heads, width = part.shape
    return part.new_empty(batch, heads, tokens, width).transpose(1, 2)


def _complex(x: Tensor) -> Tensor:
    """Feature pairs as complex numbers, of single precision at least."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    x = x if x.stride(-1) == 1 else x.contiguous()
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _turn(x: Tensor, turn: Tensor, out: Tensor) -> None:
    """Write the feature pairs of ``x`` ``(B, N, heads, head_dim)``, times unit complex numbers, to ``out``."""
    if x.dtype in (torch.float32, torch.float64):
        torch.mul(_complex(x), turn, out=_complex(out))
    else:
        out.copy_(torch.view_as_real(_complex(x) * turn).flatten(-2))


def build_ropes(
    mode: RotaryMode, num_layers: int, head_dim: int, ndim: int, base: float | Periods, param: RotaryParam = "freq"
) -> list[AxialRope | None]:
    """One rotary embedding per block: none, all the same object, or each its own."""
    if mode == "none":
        return [None] * num_layers
    learn: Literal["freq", "base", "none"] = "none" if mode == "fixed" else param
    count = num_layers if mode == "per_layer" else 1
    ropes = [AxialRope(head_dim, ndim, base, learn) for _ in range(count)]
    return [ropes[i % count] for i in range(num_layers)]
