import pytest
import torch
from torch.nn.functional import layer_norm, linear, softmax

from muvit.models.layers.rope import AxialRope, rotate
from muvit.models.mask2former import QueryDecoder, QueryLayer, query_masks


def build(rope=True, num_layers=2, ndim=2, **changes):
    torch.manual_seed(0)
    sizes = {"num_queries": 5, "dim": 24, "out_dim": 7, "heads": 2} | changes
    ropes = [AxialRope(12, ndim, 100) if rope else None for _ in range(num_layers)]
    return QueryDecoder(ropes=ropes, **sizes)


def draw(ndim=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 11, 24, generator=generator), 40 * torch.rand(2, 11, ndim, generator=generator)


def test_the_query_part_of_the_paper_has_its_number_of_parameters():
    ropes = [AxialRope(32, 2) for _ in range(2)]
    decoder = QueryDecoder(16, 256, 256, 8, ropes)
    refinement = 16 * 12 + 12
    assert sum(p.numel() for p in decoder.parameters()) + refinement == 1_779_692
    assert sum(p.numel() for p in decoder.layers[0].parameters()) == 788_752


def attend(q, k, v):
    """One head after the other, ``(B, N, D)``, two heads."""
    heads = []
    for i in (slice(0, 12), slice(12, 24)):
        weights = softmax(q[..., i] @ k[..., i].mT / 12**0.5, dim=-1)
        heads.append(weights @ v[..., i])
    return torch.cat(heads, dim=-1)


def test_a_layer_is_self_attention_then_a_look_at_rotated_keys_then_feed_forward():
    torch.manual_seed(0)
    layer, (context, positions) = QueryLayer(24, 2, AxialRope(12, 2, 100)), draw()
    x = torch.randn(2, 5, 24)

    def norm(x, module):
        return layer_norm(x, (24,), module.weight, module.bias)

    q, k, v = linear(norm(x, layer.norm1), layer.self_attn.qkv.weight).split(24, dim=-1)
    h = x + linear(attend(q, k, v), layer.self_attn.out.weight)
    to_q, to_k, to_v = layer.cross_attn.qkv.weight.split(24)
    k = linear(context, to_k).unflatten(-1, (2, 12)).transpose(1, 2)
    k = rotate(k, layer.rotary_pos_embs(positions)).transpose(1, 2).flatten(2)
    h = h + linear(attend(linear(norm(h, layer.norm2), to_q), k, linear(context, to_v)), layer.cross_attn.out.weight)
    expected = h + layer.ff(norm(h, layer.norm3))
    torch.testing.assert_close(layer(x, context, positions), expected)


@pytest.mark.parametrize("ndim", [2, 3])
def test_every_axis_of_the_places_counts_relative_to_the_first_token(ndim):
    decoder, (context, positions) = build(ndim=ndim), draw(ndim)
    embeddings = decoder(context, positions)
    assert embeddings.shape == (2, 5, 7)
    for axis in range(ndim):
        moved = positions.clone()
        moved[:, 4:, axis] += 9
        assert not torch.allclose(decoder(context, moved), embeddings, atol=1e-3)
    torch.testing.assert_close(decoder(context, positions + 4096), embeddings, rtol=0, atol=1e-3)


def test_without_rotation_the_places_do_not_count():
    decoder, (context, positions) = build(rope=False), draw()
    assert torch.equal(decoder(context, 3 * positions), decoder(context, positions))


def test_the_context_is_a_set_of_placed_tokens():
    decoder, (context, positions) = build(), draw()
    order = torch.tensor([0, *(1 + torch.randperm(10)).tolist()])  # the first one is the origin
    expected = decoder(context, positions)
    torch.testing.assert_close(decoder(context[:, order], positions[:, order]), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(decoder(context.flip(0), positions.flip(0)), expected.flip(0), rtol=0, atol=1e-5)


def test_masks_are_products_with_the_features_of_each_pixel():
    embeddings, features = torch.randn(2, 5, 7), torch.randn(2, 7, 3, 4, 2)
    masks = query_masks(embeddings, features)
    assert masks.shape == (2, 5, 3, 4, 2)
    assert masks[1, 3, 2, 0, 1].item() == pytest.approx(embeddings[1, 3].dot(features[1, :, 2, 0, 1]).item(), abs=1e-5)
