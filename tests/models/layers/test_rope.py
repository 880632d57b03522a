from math import pi

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muvit.errors import InputError
from muvit.models.layers.rope import AxialRope, axis_dims, periods_between, periods_of_views, rotate, split_heads


def turned_as_complex_numbers(x, coords, dims, base):
    """Feature pairs (u, v) as u + iv, times exp(i p_a b^(-2k / d_a)): MuViT section 3.2, pair by pair."""
    out, pair = torch.empty_like(x), 0
    for axis, width in enumerate(dims):
        for k in range(width // 2):
            theta = coords[..., axis] * base ** (-2 * k / width)
            turn = torch.polar(torch.ones_like(theta), theta)[:, None]
            z = torch.complex(x[..., 2 * pair], x[..., 2 * pair + 1]) * turn
            out[..., 2 * pair], out[..., 2 * pair + 1] = z.real, z.imag
            pair += 1
    return out


@pytest.mark.parametrize(
    "head_dim, ndim, dims",
    [(64, 2, (32, 32)), (34, 2, (18, 16)), (64, 3, (24, 20, 20)), (16, 3, (8, 4, 4)), (64, 4, (16, 16, 16, 16))],
)
def test_the_first_axis_takes_what_the_even_shares_of_the_others_leave(head_dim, ndim, dims):
    assert axis_dims(head_dim, ndim) == dims


@given(st.integers(1, 64), st.integers(2, 4))
def test_axes_share_a_head_in_whole_pairs(half, ndim):
    if 2 * half < 2 * ndim:
        with pytest.raises(InputError, match=f"at least {2 * ndim}, got {2 * half}"):
            axis_dims(2 * half, ndim)
        return
    dims = axis_dims(2 * half, ndim)
    assert sum(dims) == 2 * half
    assert all(d % 2 == 0 and d >= 2 for d in dims)
    assert dims[0] == max(dims)


def test_an_odd_head_is_refused():
    with pytest.raises(InputError, match="even head width"):
        axis_dims(33, 2)


@pytest.mark.parametrize("base", [100.0, 10000.0])
@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_frequencies_fall_from_one_as_powers_of_the_base(ndim, base):
    expected = [base ** (-2 * k / d) for d in axis_dims(32, ndim) for k in range(d // 2)]
    torch.testing.assert_close(AxialRope(32, ndim, base).freq.detach(), torch.tensor(expected))


@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_rotation_is_multiplication_by_unit_complex_numbers(ndim):
    torch.manual_seed(0)
    x, coords = torch.randn(2, 3, 5, 24, dtype=torch.float64), torch.randint(-500, 500, (2, 5, ndim)).double()
    rope = AxialRope(24, ndim, 1000)
    expected = turned_as_complex_numbers(x, coords, axis_dims(24, ndim), 1000)
    torch.testing.assert_close(rotate(x, rope(coords)), expected, rtol=0, atol=1e-3)
    assert not torch.allclose(rotate(x, rope(coords)), x, atol=0.1)


@given(st.integers(-2000, 2000), st.integers(-2000, 2000), st.integers(0, 2**31))
def test_the_product_of_rotated_vectors_depends_on_the_difference_of_places_only(dy, dx, seed):
    torch.manual_seed(seed)
    q, k, places = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16), torch.randint(-1000, 1000, (1, 4, 2)).float()
    rope = AxialRope(16, 2)
    here = rotate(q, rope(places)) @ rotate(k, rope(places)).mT
    there = rotate(q, rope(places + torch.tensor([dy, dx]))) @ rotate(k, rope(places + torch.tensor([dy, dx]))).mT
    torch.testing.assert_close(here, there, rtol=0, atol=5e-3)


def test_one_axis_rotates_its_own_features_only():
    x, rope, origin = torch.ones(1, 1, 1, 18), AxialRope(18, 2, 100), torch.zeros(1, 1, 2)
    for axis, own in enumerate((slice(0, 10), slice(10, 18))):
        moved = origin.clone()
        moved[..., axis] = 3.0
        changed = (rotate(x, rope(moved)) != x)[0, 0, 0]
        assert changed[own].all()
        assert changed.sum() == own.stop - own.start


@pytest.mark.parametrize("ndim", [2, 3])
def test_learning_bases_instead_of_frequencies_starts_from_the_same_angles(ndim):
    coords = torch.randint(0, 100, (1, 7, ndim)).float()
    ropes = [AxialRope(20, ndim, 500, learn) for learn in ("freq", "base", "none")]
    assert [sum(p.numel() for p in rope.parameters()) for rope in ropes] == [10, ndim, 0]
    by_frequency = ropes[0](coords)
    for rope in ropes[1:]:
        torch.testing.assert_close(rope(coords), by_frequency, rtol=0, atol=1e-4)


def test_a_learned_base_moves_the_frequencies_of_its_axis_as_the_formula_says():
    rope = AxialRope(16, 2, 100, "base")
    with torch.no_grad():
        rope.base[1] = 50.0
    cos, sin = rope(torch.ones(1, 1, 2)).unbind(-1)
    expected = [base ** (-2 * k / 8) for base in (100, 50) for k in range(4)]
    torch.testing.assert_close(torch.atan2(sin, cos)[0, 0], torch.tensor(expected))


def test_gradients_reach_the_frequencies():
    rope, coords = AxialRope(8, 2, 100), torch.tensor([[[3.0, 5.0], [-2.0, 7.0]]])
    rope(coords)[..., 1].sum().backward()
    # d sin(p w) / dw = p cos(p w)
    place = coords[0][:, [0, 0, 1, 1]]
    torch.testing.assert_close(rope.freq.grad, (place * torch.cos(place * rope.freq.detach())).sum(0))
    rope = AxialRope(8, 2, 100, "base")
    rope(coords)[..., 1].sum().backward()
    assert (rope.base.grad != 0).all()


def test_angles_stay_float32_under_autocast_and_in_a_half_precision_model():
    coords = torch.tensor([[[99_999.0, 65_537.0]]])
    rope = AxialRope(16, 2)
    exact = rope(coords)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = rope(coords)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, exact)


@pytest.mark.parametrize("learn", ["freq", "base"])
def test_far_from_the_origin_angles_are_as_exact_as_near_it(learn):
    rope, coords = AxialRope(16, 2, 100, learn), torch.tensor([[[99_999.5, 65_537.0]]])
    freq = rope.freq if learn == "freq" else rope.base[rope.axis] ** rope.exponent
    theta = coords.double()[..., rope.axis] * freq.double()
    cos, sin = rope(coords).unbind(-1)
    torch.testing.assert_close(cos.double(), theta.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin.double(), theta.sin(), rtol=0, atol=1e-7)


def test_rotation_keeps_the_precision_of_its_input_and_computes_above_it():
    torch.manual_seed(0)
    x, rope = torch.randn(1, 2, 6, 16), AxialRope(16, 2, 100)
    rotation = rope(torch.randint(0, 99, (1, 6, 2)).float())
    half = rotate(x.bfloat16(), rotation)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rotate(x.bfloat16().float(), rotation).bfloat16())


def heads_one_by_one(x, num_parts, rotation):
    """`split_heads` into 3 heads from its definition, differentiated by autograd."""
    parts = x.unflatten(-1, (num_parts, 3, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return [rotate(part, rotation) if i < max(1, num_parts - 1) else part for i, part in enumerate(parts)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_heads_and_their_gradients_are_those_of_the_definition(num_parts, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 5, num_parts * 24, dtype=dtype, requires_grad=True)
    rope, coords = AxialRope(8, 2, 100), torch.randint(0, 50, (2, 5, 2)).float()
    expected, found = heads_one_by_one(x, num_parts, rope(coords)), split_heads(x, num_parts, 3, rope(coords))
    towards = [torch.randn_like(part) for part in expected]
    inputs = (x, rope.freq)
    gradients = [torch.autograd.grad(parts, inputs, towards) for parts in (found, expected)]
    for ours, theirs in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert ours.dtype == theirs.dtype
        assert error < (1e-5 if dtype != torch.bfloat16 else 1e-2)


def test_gradients_of_attention_in_any_layout_are_turned_back():
    x, coords = torch.randn(2, 5, 72, requires_grad=True), torch.randint(0, 50, (2, 5, 2)).float()
    rotation = AxialRope(8, 2, 100)(coords).detach()
    towards = torch.randn(2, 5, 1, 1).expand(-1, -1, 3, 8).transpose(1, 2)
    gradients = [
        torch.autograd.grad(parts, x, [towards] * 3)[0]
        for parts in (split_heads(x, 3, 3, rotation), heads_one_by_one(x, 3, rotation))
    ]
    torch.testing.assert_close(*gradients)


def test_the_backward_pass_keeps_nothing_but_the_rotated_heads():
    x, rope = torch.randn(1, 16, 72, requires_grad=True), AxialRope(8, 2, 100)
    rotation, kept = rope(torch.zeros(1, 16, 2)), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        q, k, _ = split_heads(x, 3, 3, rotation)
    assert kept.keys() == {q.data_ptr(), k.data_ptr(), rotation.data_ptr()}


def test_periods_are_spaced_evenly_on_a_logarithmic_scale():
    rope = AxialRope(34, 2, (16.0, 512.0))
    periods = 2 * pi / rope.freq.detach().double()
    # 9 pairs for the first axis, 8 for the second
    for of_axis, count in ((periods[:9], 9), (periods[9:], 8)):
        expected = torch.tensor([16 * 32 ** (k / (count - 1)) for k in range(count)], dtype=torch.float64)
        torch.testing.assert_close(of_axis, expected, rtol=1e-6, atol=0)
    with pytest.raises(InputError, match="rotary_base: expected a number, as rotary_param is base"):
        AxialRope(16, 2, (16.0, 512.0), "base")


def test_periods_span_from_two_tokens_to_twice_a_view():
    assert periods_between(8, 256) == (16, 512)
    assert periods_of_views((2, (8, 4)), (4, 2), (64, 128)) == (2 * 2 * 2, 2 * 64 * 8)
