"""UNETR-style decoder: encoder maps of several depths, up-sampled step by step to the pixels.

MuViT section 3.4 and supplement C.2.
The layers follow the list that matches the paper's parameter counts; the order of a stage is up-sample, add the skip
(or concatenate it, as the paper's main text says), convolve. A ViT keeps one grid, so every skip starts at 1/P and is
brought to its stage's size; skips of another backbone may have finer grids.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import log2
from typing import Literal

import torch
from torch import Tensor, nn

from muvit.errors import InputError
from muvit.models.layers.conv import Residual, conv, conv_block, upsample
from muvit.models.layers.stage import Stage

Fusion = Literal["add", "concatenate"]
"""Joining of the up-sampled features and the skip of a stage: their sum (the paper's supplement and its parameter
counts), or both beside each other (its main text)."""


def upsampling_steps(patch: Sequence[int]) -> list[tuple[int, ...]]:
    """Factors per axis that lead from the token grid to the pixels by steps of at most 2, e.g. 8 -> three steps of 2.

    An axis with a smaller patch joins in the last steps, where the others are as fine as it is.

    Raises:
        InputError: a patch side is not a power of two.
    """
    if any(p < 1 or p & (p - 1) for p in patch):
        raise InputError("patch_size", expected="powers of two for a convolutional decoder", got=tuple(patch))
    depth = [int(log2(p)) for p in patch]
    return [tuple(2 if max(depth) - step <= d else 1 for d in depth) for step in range(max(depth))]


def stage_widths(choice: Literal["paper", "slim"], num_steps: int) -> tuple[int, ...]:
    """Channels of the stages from the token grid to the pixels, for ``num_steps`` up-sampling steps.

    ``paper``: 256 in every stage. ``slim``: 64 at the pixels and twice as many with every step away from them, up to
    256, so that no stage costs much more than another; for patches of 8: 256, 256, 128, 64.
    """
    return tuple(256 if choice == "paper" else min(256, 64 * 2**step) for step in reversed(range(num_steps + 1)))


def skip_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Blocks whose outputs feed the decoder, evenly spaced and ending with the last: 12 blocks, 3 skips -> 0, 5, 11.

    Raises:
        InputError: there are fewer blocks than skips.
    """
    if count > num_layers:
        raise InputError(
            "num_layers", expected=f"at least {count} blocks, one for each up-sampling stage", got=num_layers
        )
    return tuple(int(i) for i in torch.linspace(0, num_layers - 1, count).tolist()) if count > 1 else (num_layers - 1,)


class LevelAdapter(nn.Module):
    """Each level's own part of the decoder: projections of its skips, and a neck on the deepest one.

    Args:
        ndim: spatial axes.
        dim: width of the encoder's tokens, or of each skip's if they differ.
        widths: channels of the stages that take a skip, coarsest stage (deepest block) first.
    """

    def __init__(self, ndim: int, dim: int | Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        dims = (dim,) * len(widths) if isinstance(dim, int) else dim
        self.skips = nn.ModuleList(conv(ndim, d, width, 1) for d, width in zip(dims, widths, strict=True))
        self.neck = Residual(ndim, widths[0], project_shortcut=True)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Encoder maps ``(B, D, *grid)``, deepest first, to skips ``(B, width, *grid)`` in the order of the stages."""
        deepest, *others = (skip(x) for skip, x in zip(self.skips, maps, strict=True))
        return [self.neck(deepest), *others]

    def context(self, deepest: Tensor) -> Tensor:
        """The deepest map ``(B, D, *grid)``, projected as for the skip, as tokens ``(B, n, widths[0])``."""
        return self.skips[0](deepest).flatten(2).mT

    def rest(self, *, but_context: bool) -> None:
        """Take no part in training, except for what `context` needs if ``but_context``."""
        self.requires_grad_(False)
        self.skips[0].requires_grad_(but_context)


class PixelDecoder(Stage):
    """Trunk shared by all levels: fuses skips from the token grid up to the pixels of the view.

    Args:
        ndim: spatial axes.
        in_channels: channels of the image.
        patch: side of a patch along each axis, powers of two.
        widths: channels of the stages from 1/P to 1/1, one more than there are up-sampling steps; see `stage_widths`.
        stem_width: channels of the two convolutions on the image.
        fusion: how a stage takes its skip.
    """

    def __init__(
        self,
        ndim: int,
        in_channels: int,
        patch: Sequence[int],
        widths: Sequence[int],
        stem_width: int,
        fusion: Fusion = "add",
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.steps = upsampling_steps(patch)
        if len(widths) != len(self.steps) + 1 or min(widths) < 1:
            raise InputError(
                "decoder_widths",
                expected=f"{len(self.steps) + 1} positive widths for patch {tuple(patch)}, token grid to pixels",
                got=tuple(widths),
            )
        beside = [0, *(width if fusion == "concatenate" else 0 for width in widths[1:])]
        self.stages = nn.ModuleList(Residual(ndim, n, skip_dim=skip) for n, skip in zip(widths, beside, strict=True))
        self.narrow = nn.ModuleList(nn.Identity() if a == b else conv(ndim, a, b, 1) for a, b in pairwise(widths))
        self.stem = nn.Sequential(
            conv_block(ndim, in_channels, stem_width),
            conv_block(ndim, stem_width, stem_width),
            conv(ndim, stem_width, widths[-1], 1),
        )

    def forward(self, skips: Sequence[Tensor], image: Tensor) -> Tensor:
        """Features ``(B, widths[-1], *space)`` from skips ``(B, width, *grid)`` and the view ``(B, C, *space)``."""
        x = self.stages[0](skips[0])
        for i in range(1, len(self.steps)):
            x = self._upsampled(i, x, skips[i])
        return self.run(self._to_pixels, x, image) if self.steps else x

    def _to_pixels(self, x: Tensor, image: Tensor) -> Tensor:
        """The last stage, whose activations are the largest of all."""
        return self._upsampled(len(self.steps), x, self.stem(image))

    def _upsampled(self, stage: int, x: Tensor, skip: Tensor) -> Tensor:
        # a 1-wide convolution commutes with the up-sampling and is cheaper before it
        x = upsample(self.narrow[stage - 1](x), self.steps[stage - 1])
        factors = [n // m for n, m in zip(x.shape[2:], skip.shape[2:], strict=True)]
        skip = upsample(skip, factors)
        return self.stages[stage](x + skip) if self.fusion == "add" else self.stages[stage](x, skip)
