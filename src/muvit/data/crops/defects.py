"""Blur, gamma, noise and lost channels of normalised views: the same on every device, without waiting for it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Defects(NamedTuple):
    """Defects of views, in the order in which they come about; None: the data set has none of the kind."""

    kernel: Tensor | None = None
    """Weights of a blur along each axis, of odd number: float32 ``(..., L, K)``."""
    gamma: Tensor | None = None
    """Exponents of values above 0, float32 ``(..., L)``."""
    noise: Tensor | None = None
    """Standard deviations of Gaussian noise, float32 ``(..., L)``."""
    seed: Tensor | None = None
    """Seeds of the noise, int32 ``(..., L)``."""
    kept: Tensor | None = None
    """Whether channels stay, bool ``(..., L, C)``; others become 0."""


def degrade(views: Tensor, defects: Defects, inside: Tensor | None = None) -> None:
    """Change views ``(n, C, *space)``, float32, in place.

    Args:
        views: normalised pixels, 0 outside the image.
        defects: those of each view, ``(n)`` in place of ``(..., L)``.
        inside: bool ``(n, *space)``, False outside the image, which does not darken the border. None: nowhere.
    """
    per_view = (-1, *(1,) * (views.ndim - 1))
    if defects.kernel is not None:
        views.copy_(_blurred(views, defects.kernel))
        if inside is not None:
            mask = inside[:, None].float()
            weight = _blurred(mask, defects.kernel)
            views.mul_(torch.where(mask > 0, mask / weight, 0.0))
    if defects.gamma is not None:
        views.copy_(torch.where(views > 0, views.pow(defects.gamma.reshape(per_view)), views))
    if defects.noise is not None and defects.seed is not None:
        noise = normal_numbers(defects.seed, math.prod(views.shape[1:])).view_as(views)
        noise.mul_(defects.noise.reshape(per_view))
        views.add_(noise if inside is None else noise.mul_(inside[:, None]))
    if defects.kept is not None:
        views.mul_(defects.kept.reshape(*views.shape[:2], *per_view[2:]))


def _blurred(views: Tensor, kernel: Tensor) -> Tensor:
    """Weighted sums along each axis; beyond its ends, the last pixels go on."""
    radius = kernel.shape[1] // 2
    weights = kernel.reshape(*kernel.shape, *(1,) * (views.ndim - 1)).unbind(1)
    for axis in range(2, views.ndim):
        size = views.shape[axis]
        places = torch.arange(-radius, size + radius, device=views.device).clamp(0, size - 1)
        wide = views.index_select(axis, places)
        views = wide.narrow(axis, 0, size) * weights[0]
        for place, weight in enumerate(weights[1:], start=1):
            views.addcmul_(wide.narrow(axis, place, size), weight)
    return views


def normal_numbers(seed: Tensor, count: int) -> Tensor:
    """Independent numbers of mean 0 and variance 1, float32 ``(n, count)``, that follow from the seeds ``(n)``, int32.

    Unlike those of torch's generators they are the same, but for rounding, on every device and in every batch: numbers
    counted from 0 are hashed, and taken in pairs (Box and Muller 1958).
    """
    half = -(-count // 2)
    places = _hashed(torch.arange(2 * half, dtype=torch.int32, device=seed.device))
    bits = _hashed(places + seed[:, None])
    uniform = (bits.bitwise_and_(0xFFFFFF).float() + 0.5) * 2.0**-24
    radius, angle = (-2 * uniform[:, :half].log()).sqrt_(), 2 * math.pi * uniform[:, half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def _hashed(numbers: Tensor) -> Tensor:
    """Numbers, int32, whose bits depend on all bits of the given ones (the last steps of MurmurHash3, Appleby)."""
    for factor, shift in ((1, 16), (-2048144789, 13), (-1028477387, 16)):
        numbers = numbers * factor  # modulo 2 ** 32
        numbers = numbers ^ (numbers >> shift & (1 << 32 - shift) - 1)
    return numbers
