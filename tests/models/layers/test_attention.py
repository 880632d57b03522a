import pytest
import torch

from muvit.errors import InputError
from muvit.models.layers.attention import Attention, level_spans, random_key_mask
from muvit.models.layers.rope import AxialRope, rotate

DIM, HEADS, LEVELS, PER_LEVEL = 24, 3, 3, 4
SEEN = {
    "all": lambda query, key: True,
    "causal": lambda query, key: key <= query,
    "same": lambda query, key: key == query,
    "coarse_to_fine": lambda query, key: key >= query,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def plain_attention(attention, x, context, rotations, allowed=None):
    """Softmax attention head by head, from the definition."""
    wq, wk, wv = attention.qkv.weight.chunk(3)
    heads, width = [], DIM // HEADS
    for head in range(HEADS):
        own = slice(head * width, (head + 1) * width)
        q, k, v = x @ wq[own].T, context @ wk[own].T, context @ wv[own].T
        q, k = (t if r is None else rotate(t[:, None], r)[:, 0] for t, r in ((q, rotations[0]), (k, rotations[1])))
        scores = q @ k.mT / width**0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, -1) @ attention.out.weight.T


def mask_between_levels(mode):
    level = torch.arange(LEVELS * PER_LEVEL) // PER_LEVEL
    return torch.tensor([[SEEN[mode](q, k) for k in level] for q in level])


@pytest.mark.parametrize("is_rotated", [True, False])
def test_packed_projections_give_plain_softmax_attention(is_rotated):
    attention, x = Attention(DIM, HEADS), torch.randn(2, 7, DIM)
    rotation = AxialRope(DIM // HEADS, 2, 100)(torch.randint(0, 50, (2, 7, 2)).float()) if is_rotated else None
    torch.testing.assert_close(attention(x, rotation), plain_attention(attention, x, x, (rotation, rotation)))


def test_there_are_no_biases():
    assert sum(p.numel() for p in Attention(DIM, HEADS).parameters()) == 4 * DIM**2


@pytest.mark.parametrize("mode", SEEN)
def test_spans_say_what_a_dense_mask_says(mode):
    attention, x = Attention(DIM, HEADS), torch.randn(2, LEVELS * PER_LEVEL, DIM)
    rotation = AxialRope(DIM // HEADS, 2, 100)(torch.randint(0, 50, (2, x.shape[1], 2)).float())
    allowed, spans = mask_between_levels(mode), level_spans(mode, LEVELS, PER_LEVEL)
    by_spans = attention(x, rotation, mask=spans)
    torch.testing.assert_close(by_spans, attention(x, rotation, mask=allowed[None, None]))
    torch.testing.assert_close(by_spans, plain_attention(attention, x, x, (rotation, rotation), allowed))


def test_seeing_everything_needs_no_spans():
    assert level_spans("all", LEVELS, PER_LEVEL) is None


@pytest.mark.parametrize("mode", ["random", "backwards"])
def test_a_pattern_that_spans_cannot_tell_is_refused(mode):
    with pytest.raises(InputError, match=f"attention_mode: expected all, causal.*got '{mode}'"):
        level_spans(mode, LEVELS, PER_LEVEL)


@pytest.mark.parametrize("is_rotated", [True, False])
def test_a_context_replaces_keys_and_values(is_rotated):
    attention, x, context = Attention(DIM, HEADS), torch.randn(2, 5, DIM), torch.randn(2, 9, DIM)
    rope = AxialRope(DIM // HEADS, 2, 100)
    of_x, of_context = (
        rope(torch.randint(0, 50, (2, n, 2)).float()) if is_rotated else None for n in (x.shape[1], context.shape[1])
    )
    crossed = attention(x, of_x, context_kv=attention.keys_values(context, of_context))
    torch.testing.assert_close(crossed, plain_attention(attention, x, context, (of_x, of_context)))


def test_self_attention_is_attention_to_oneself_as_context():
    attention, x = Attention(DIM, HEADS), torch.randn(1, 6, DIM)
    rotation = AxialRope(DIM // HEADS, 2, 100)(torch.randint(0, 50, (1, 6, 2)).float())
    crossed = attention(x, rotation, context_kv=attention.keys_values(x, rotation))
    torch.testing.assert_close(crossed, attention(x, rotation))


def test_additions_to_the_projection_reach_every_part_of_it():
    class WithAddition(torch.nn.Module):
        """As low-rank additions wrap a layer: its weight is still to be had, but is not all."""

        def __init__(self, base):
            super().__init__()
            self.weight, self.added = base.weight, torch.randn_like(base.weight)

        def forward(self, x):
            return x @ (self.weight + self.added).T

    plain, wrapped, x, context = (
        Attention(DIM, HEADS),
        Attention(DIM, HEADS),
        torch.randn(1, 6, DIM),
        torch.randn(1, 9, DIM),
    )
    wrapped.load_state_dict(plain.state_dict())
    wrapped.qkv = WithAddition(wrapped.qkv)
    with torch.no_grad():
        plain.qkv.weight += wrapped.qkv.added
    torch.testing.assert_close(wrapped(x), plain(x))
    torch.testing.assert_close(
        wrapped(x, context_kv=wrapped.keys_values(context)), plain(x, context_kv=plain.keys_values(context))
    )


def test_under_the_random_pattern_each_query_takes_over_the_value_of_one_key():
    attention, x = Attention(DIM, HEADS), torch.randn(1, 40, DIM)
    mask = random_key_mask(40, 40, torch.device("cpu"))
    assert mask.shape == (1, 1, 40, 40)
    assert (mask.sum(-1) == 1).all()
    chosen = mask[0, 0].int().argmax(-1)
    assert len(chosen.unique()) > 10  # not all the same
    values = x @ attention.qkv.weight.chunk(3)[2].T
    torch.testing.assert_close(attention(x, mask=mask), values[:, chosen] @ attention.out.weight.T)


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match="dim: expected a multiple of the 5 heads, got 24"):
        Attention(DIM, 5)
