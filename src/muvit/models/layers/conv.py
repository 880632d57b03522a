"""Convolutional pieces of the segmentation decoders, for images and volumes alike."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from muvit.errors import InputError

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_MEMORY_FORMAT = {2: torch.channels_last, 3: torch.contiguous_format}
"""Order of weights and activations in memory; on a CPU, channels last are faster for images, and slower for volumes."""
_LINEAR_MODE = {2: "bilinear", 3: "trilinear"}


def conv(ndim: int, in_dim: int, out_dim: int, kernel: int) -> nn.Module:
    """Convolution with bias that keeps the size.

    Raises:
        InputError: there is no convolution over ``ndim`` axes.
    """
    if ndim not in _CONV:
        raise InputError("ndim", expected="2 or 3 spatial axes for a convolutional decoder", got=ndim)
    return _CONV[ndim](in_dim, out_dim, kernel, padding=kernel // 2).to(memory_format=_MEMORY_FORMAT[ndim])


def conv_block(ndim: int, in_dim: int, out_dim: int) -> nn.Sequential:
    """3-wide convolution, batch norm, ReLU."""
    return nn.Sequential(conv(ndim, in_dim, out_dim, 3), _NORM[ndim](out_dim), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """Two `conv_block` and a shortcut: the input itself, or a 1-wide convolution of it.

    Args:
        ndim: spatial axes.
        dim: channels.
        skip_dim: channels of a skip that the convolutions see beside the input, but not the shortcut.
        project_shortcut: whether the shortcut is a convolution.
    """

    def __init__(self, ndim: int, dim: int, *, skip_dim: int = 0, project_shortcut: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_block(ndim, dim + skip_dim, dim), conv_block(ndim, dim, dim))
        self.shortcut = conv(ndim, dim, dim, 1) if project_shortcut else nn.Identity()

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """``(B, dim, *space)`` from an input alike, and a skip ``(B, skip_dim, *space)`` if there is one."""
        return self.body(x if skip is None else torch.cat([x, skip], dim=1)) + self.shortcut(x)


def upsample(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Multilinear up-sampling of ``(B, C, *space)`` by whole factors per axis, pixel edges aligned."""
    if all(f == 1 for f in factors):
        return x
    size = [n * f for n, f in zip(x.shape[2:], factors, strict=True)]
    return interpolate(x, size=size, mode=_LINEAR_MODE[len(size)], align_corners=False)
