import pytest
import torch
from tiny_encoders import LEVELS, scene

from muvit.errors import InputError, ShapeError
from muvit.models.context import encode_context, encode_in_context
from muvit.models.layers.attention import level_mask


def through_a_dense_mask(encoder, img, bbox):
    """Outputs of all blocks under a bool mask over all tokens: the pattern from its definition."""
    tokens, positions = encoder.embed(encoder.patches(img)), encoder.place(img, bbox)[1]
    count = tokens.shape[1]
    level = torch.arange(count) * len(LEVELS) // count
    if encoder.copies is not None:  # they attend, and are attended to, as tokens of the finest level
        chosen = torch.arange(len(img))[:, None], encoder.copied_tokens(img, bbox)
        tokens = torch.cat([tokens, tokens[chosen] + encoder.copies.vector], dim=1)
        positions = torch.cat([positions, positions[chosen]], dim=1)
        level = torch.cat([level, torch.zeros(tokens.shape[1] - count, dtype=torch.int64)])
    mask = level_mask("coarse_to_fine", *2 * (level.expand(len(img), -1),))
    return [output[:, :count] for output in encoder.run_blocks(tokens, positions, mask, (0, 1, 2))[1]]


@pytest.mark.parametrize("offset", [0.0, 1_000_000.0])
@pytest.mark.parametrize("ndim, changes", [(2, {}), (2, {"rotary_mode": "shared"}), (2, {"patch_spacing": "corner"}),
                                           (2, {"rotary_mode": "none"}), (2, {"rotary_base": (8.0, 128.0)}),
                                           (3, {}), (2, {"coarse_copies": "under"}), (2, {"coarse_copies": "ring"}),
                                           (3, {"coarse_copies": "under", "patch_size": 2}),
                                           (4, {"coarse_copies": "under"})])  # fmt: skip
@torch.no_grad()
def test_a_context_encoded_once_gives_what_masked_attention_over_all_views_gives(ndim, changes, offset):
    encoder, img, bbox = scene(ndim, offset=offset, side={2: 16, 3: 8, 4: 8}[ndim], **changes)
    expected, coords = through_a_dense_mask(encoder, img, bbox), encoder(img, bbox)[1]
    context = encode_context(encoder, img[:, 1:], bbox[:, 1:])
    tokens, places, kept = encode_in_context(encoder, img[:, :1], bbox[:, :1], context, keep=(0, 1, 2))
    n = tokens.shape[1]
    assert n == img[0, 0, 0].numel() // encoder.config.patch[0] ** ndim
    for got, whole in zip(kept, expected, strict=True):
        torch.testing.assert_close(got, whole[:, :n], rtol=0, atol=1e-5)
    assert torch.equal(tokens, kept[-1])
    coarse = torch.cat([level.tokens for level in context.levels], dim=1)
    torch.testing.assert_close(coarse, expected[-1][:, n:], rtol=0, atol=1e-5)
    assert torch.equal(torch.cat([places, *(level.coords for level in context.levels)], dim=1), coords)
    # and it is the context that makes them so
    other = encode_context(encoder, img[:, 1:] + 1, bbox[:, 1:])
    assert (encode_in_context(encoder, img[:, :1], bbox[:, :1], other)[0] - tokens).abs().max() > 1e-2


@pytest.mark.parametrize("copies", ["none", "under"])
@torch.no_grad()
def test_a_context_grows_level_by_level_and_is_shared_by_all_views_inside_it(copies):
    encoder, img, bbox = scene(batch=3, coarse_copies=copies)
    whole, medium, fine = slice(2, 3), slice(1, 2), slice(0, 1)
    img[:, whole], bbox[:, whole] = img[:1, whole].clone(), bbox[:1, whole].clone()  # three tiles, one coarsest view
    coarsest = encode_context(encoder, img[:1, whole], bbox[:1, whole])
    expected = encoder(img, bbox)[0]
    inner = encode_context(encoder, img[:, medium], bbox[:, medium], coarsest)
    at_once = encode_in_context(encoder, img[:, fine], bbox[:, fine], inner)[0]
    torch.testing.assert_close(at_once, expected[:, :16], rtol=0, atol=1e-5)
    for i in range(3):
        one = slice(i, i + 1)
        context = encode_context(encoder, img[one, medium], bbox[one, medium], coarsest)
        assert context.levels[1] is coarsest
        torch.testing.assert_close(context.tokens, expected[one, 16:32], rtol=0, atol=1e-5)
        tokens = encode_in_context(encoder, img[one, fine], bbox[one, fine], context)[0]
        torch.testing.assert_close(tokens, expected[one, :16], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_finest_level_is_encoded_as_a_context_of_its_own():
    encoder, img, bbox = scene(coarse_copies="under")
    context = encode_context(encoder, img[:, 1:], bbox[:, 1:])
    tokens = encode_context(encoder, img[:, :1], bbox[:, :1], context).tokens
    torch.testing.assert_close(tokens, encoder(img, bbox)[0][:, :16], rtol=0, atol=1e-5)


def test_sharing_a_context_copies_nothing():
    encoder, img, bbox = scene(batch=1)
    context = encode_context(encoder, img[:, 1:], bbox[:, 1:])
    shared = context.expand(5)
    for many, one in zip(shared.levels, context.levels, strict=True):
        assert many.tokens.shape == (5, 16, 32)
        for pair, own in zip(many.keys_values, one.keys_values, strict=True):
            assert [t.shape[0] for t in pair] == [5, 5]
            assert [t.data_ptr() for t in pair] == [t.data_ptr() for t in own]
    with pytest.raises(ShapeError, match="context: expected 1 sample or 3, got 5"):
        shared.expand(3)


def test_a_context_needs_the_pattern_and_all_coarse_levels():
    encoder, img, bbox = scene()
    with pytest.raises(InputError, match=r"attention_mode: expected 'coarse_to_fine' .*, got 'all'"):
        encode_context(scene(attention_mode="all")[0], img[:, 1:], bbox[:, 1:])
    coarsest = encode_context(encoder, img[:, 2:], bbox[:, 2:])
    with pytest.raises(InputError, match="context: expected 2 coarse levels, got 1"):
        encode_in_context(encoder, img[:, :1], bbox[:, :1], coarsest)
    with pytest.raises(InputError, match="img: expected at most 2 views beside the context, got 3"):
        encode_context(encoder, img, bbox, coarsest)
    with pytest.raises(ShapeError, match=r"img: expected shape \(B, L=1, C=2, y, x\), got \(2, 3, 2, 16, 16\)"):
        encode_in_context(encoder, img, bbox, encode_context(encoder, img[:, 1:], bbox[:, 1:]))
    with pytest.raises(ShapeError, match=r"bbox: expected shape .* = \(2, 1, 2, 2\), got \(2, 3, 2, 2\)"):
        encode_context(encoder, img[:, 2:], bbox)
