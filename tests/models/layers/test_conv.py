import pytest
import torch

from muvit.errors import InputError
from muvit.models.layers.conv import Residual, conv, conv_block, upsample


@pytest.mark.parametrize("space", [(6, 5), (4, 6, 5)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_keep_the_size(space, kernel):
    assert conv(len(space), 2, 7, kernel)(torch.zeros(1, 2, *space)).shape == (1, 7, *space)


@pytest.mark.parametrize("ndim", [1, 4])
def test_other_dimensionalities_are_refused(ndim):
    with pytest.raises(InputError, match=f"2 or 3 spatial axes for a convolutional decoder, got {ndim}"):
        conv(ndim, 1, 1, 3)


def test_a_block_convolves_normalises_and_clips():
    torch.manual_seed(0)
    block, x = conv_block(2, 3, 4), torch.randn(5, 3, 8, 8)
    y = torch.nn.functional.conv2d(x, block[0].weight, block[0].bias, padding=1)
    y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(block(x), y.clamp(min=0))


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_residual_adds_its_input_or_a_projection_of_it(ndim):
    torch.manual_seed(0)
    x = torch.randn(2, 4, *(6, 5, 4)[:ndim])
    plain, projected = Residual(ndim, 4).eval(), Residual(ndim, 4, project_shortcut=True).eval()
    torch.testing.assert_close(plain(x), plain.body[1](plain.body[0](x)) + x)
    torch.testing.assert_close(
        projected(x),
        projected.body(x) + torch.einsum("oi,bi...->bo...", projected.shortcut.weight.flatten(1), x)
        + projected.shortcut.bias.view(-1, *(1,) * ndim),
    )  # fmt: skip


def test_upsampling_aligns_the_edges_of_pixels():
    # pixel centres of the fine row lie a quarter and three quarters of the way; beyond the outer centres it is flat
    assert upsample(torch.tensor([[[[0.0, 1.0]]]]), (1, 2)).tolist() == [[[[0.0, 0.25, 0.75, 1.0]]]]


@pytest.mark.parametrize("factors", [(2, 2), (4, 1), (1, 2, 4)])
def test_upsampling_keeps_a_ramp_a_ramp_along_every_axis(factors):
    for axis, factor in enumerate(factors):
        shape = [1] * len(factors)
        shape[axis] = 8
        coarse = (torch.arange(8.0) + 0.5).reshape(1, 1, *shape).expand(1, 1, *(8,) * len(factors))
        fine = upsample(coarse, factors)
        assert fine.shape[2:] == tuple(8 * f for f in factors)
        line = fine[0, 0].movedim(axis, -1)[(0,) * (len(factors) - 1)]
        expected = (torch.arange(8.0 * factor) + 0.5) / factor
        inside = slice(factor, -factor)
        torch.testing.assert_close(line[inside], expected[inside])


def test_upsampling_by_one_changes_nothing():
    x = torch.randn(1, 1, 3, 3)
    assert upsample(x, (1, 1)) is x


def test_a_one_wide_convolution_commutes_with_upsampling():
    torch.manual_seed(0)
    x, narrow = torch.randn(1, 6, 5, 4), conv(2, 6, 3, 1)
    torch.testing.assert_close(narrow(upsample(x, (2, 2))), upsample(narrow(x), (2, 2)))
