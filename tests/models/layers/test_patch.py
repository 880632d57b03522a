from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muvit.errors import ShapeError
from muvit.models.layers.patch import patch_grid, patchify, unpatchify

axes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=4)


@given(axes, st.integers(1, 2), st.integers(1, 2), st.integers(1, 3))
def test_unpatchify_undoes_patchify(axes, batch, levels, channels):
    grid, patch = zip(*axes, strict=True)
    space = tuple(g * p for g, p in axes)
    x = torch.arange(batch * levels * channels * prod(space)).reshape(batch, levels, channels, *space)
    tokens = patchify(x, patch)
    assert tokens.shape == (batch, levels, prod(grid), prod(patch) * channels)
    assert torch.equal(unpatchify(tokens, grid, patch), x)


@given(axes, st.integers(1, 3))
def test_patches_are_row_major_and_channels_fastest_inside_a_patch(axes, channels):
    grid, patch = zip(*axes, strict=True)
    x = torch.arange(channels * prod(g * p for g, p in axes)).reshape(1, 1, channels, *(g * p for g, p in axes))
    tokens = patchify(x, patch)[0, 0]
    for n, place in enumerate(product(*map(range, grid))):
        block = x[(0, 0, slice(None), *(slice(i * p, (i + 1) * p) for i, p in zip(place, patch, strict=True)))]
        # (C, *patch) -> (*patch, C): row, column, channel
        assert torch.equal(tokens[n], block.movedim(0, -1).flatten())


def test_a_small_image_by_hand():
    red = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    tokens = patchify(torch.stack([red, red + 10])[None, None], (2, 2))
    assert tokens.tolist() == [[[[0, 10, 1, 11, 4, 14, 5, 15], [2, 12, 3, 13, 6, 16, 7, 17]]]]


def test_the_grid_counts_patches_along_each_axis():
    assert patch_grid((24, 8, 4), (8, 4, 4)) == (3, 2, 1)


def test_a_crop_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ShapeError, match=r"multiples of the patch \(8, 8\), got \(24, 20\)\. Choose another crop size"):
        patch_grid((24, 20), (8, 8))
