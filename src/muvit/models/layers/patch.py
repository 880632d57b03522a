"""Cutting views into patches and putting them together again, for any number of axes."""

from collections.abc import Sequence
from math import prod

from torch import Tensor

from muvit.errors import ShapeError


def patch_grid(space: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Number of patches along each axis.

    Raises:
        ShapeError: a side is not a multiple of the patch, or there are others than its axes.
    """
    if len(space) != len(patch) or any(n % p for n, p in zip(space, patch, strict=True)):
        raise ShapeError(
            "img",
            expected=f"sides that are multiples of the patch {tuple(patch)}",
            got=tuple(space),
            hint="Choose another crop size or patch size.",
        )
    return tuple(n // p for n, p in zip(space, patch, strict=True))


def patchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """``(B, L, C, *space) -> (B, L, n, prod(patch) * C)``: patches row-major, channels fastest inside a patch."""
    d = len(patch)
    grid = patch_grid(x.shape[-d:], patch)
    split = [n for pair in zip(grid, patch, strict=True) for n in pair]
    x = x.reshape(*x.shape[:3], *split)
    # (B, L, C, g1, p1, g2, p2, ...) -> (B, L, g1, g2, ..., p1, p2, ..., C)
    order = [0, 1, *range(3, 3 + 2 * d, 2), *range(4, 4 + 2 * d, 2), 2]
    return x.permute(order).reshape(x.shape[0], x.shape[1], prod(grid), -1)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """The inverse of `patchify`: ``(B, L, n, prod(patch) * C) -> (B, L, C, *space)``."""
    d = len(patch)
    x = tokens.reshape(*tokens.shape[:2], *grid, *patch, -1)
    # (B, L, g1, g2, ..., p1, p2, ..., C) -> (B, L, C, g1, p1, g2, p2, ...)
    order = [0, 1, 2 + 2 * d, *(axis for i in range(d) for axis in (2 + i, 2 + d + i))]
    return x.permute(order).reshape(*tokens.shape[:2], -1, *(g * p for g, p in zip(grid, patch, strict=True)))
