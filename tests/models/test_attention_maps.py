import pytest
import torch
from tiny_encoders import LEVELS, nested_boxes, scene, tiny
from torch.nn.functional import scaled_dot_product_attention

from muvit.errors import ShapeError
from muvit.models.attention_maps import attention_maps, gradient_rollout, hidden_tokens, onto_originals, rollout
from muvit.models.encoder import EncoderConfig
from muvit.models.layers.attention import Attention, attention_weights, level_spans
from muvit.models.segmenter import Segmenter, SegmenterConfig


def segmenter(mode="all", **changes):
    torch.manual_seed(0)
    attention = {"attention_mode": mode}
    if mode == "copies":
        attention = {"attention_mode": "coarse_to_fine", "coarse_copies": "under"}
    sizes = {"in_channels": 2, "levels": (1, 4), "patch_size": 4, "dim": 32, "num_layers": 3, "heads": 2}
    encoder = EncoderConfig(**sizes, **attention)
    small = {"decoder_widths": (8, 8, 4), "stem_width": 4, "query_heads": 2, "num_queries": 4} | changes
    model = Segmenter(SegmenterConfig(encoder=encoder, num_classes=3, **small)).eval()
    with torch.no_grad():
        for block in model.encoder.layers:
            block.attn.qkv.weight[:64] *= 4  # far from uniform
    return model, torch.randn(2, 2, 2, 16, 16), nested_boxes()


@pytest.mark.parametrize("mask", [None, "coarse_to_fine", "same"])
def test_weights_are_those_of_scaled_dot_product_attention(mask):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 12, 8, dtype=torch.float64), torch.randn(2, 3, 12, 8, dtype=torch.float64)
    spans = None if mask is None else level_spans(mask, 3, 4)
    weights = attention_weights(q, k, spans)
    # values that are the unit vectors give the weights themselves
    unit = torch.eye(12, dtype=torch.float64).expand(2, 3, 12, 12)
    dense = None if mask is None else weights > 0
    expected = scaled_dot_product_attention(q, k, unit, attn_mask=dense, scale=8**-0.5)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-15)
    if mask is not None:
        level = torch.arange(12) // 4
        allowed = level[:, None] <= level if mask == "coarse_to_fine" else level[:, None] == level
        assert ((weights > 0) == allowed).all()


@pytest.mark.parametrize("mode", ["all", "coarse_to_fine"])
def test_maps_give_the_outputs_of_every_block(mode):
    encoder, img, bbox = scene(attention_mode=mode)
    outputs = []
    hooks = [block.attn.register_forward_hook(lambda *args: outputs.append(args)) for block in encoder.layers]
    with torch.no_grad(), attention_maps(encoder) as maps:
        seen = encoder(img, bbox)[0]
    for hook in hooks:
        hook.remove()
    assert len(maps) == len(encoder.layers) == len(outputs)
    for weights, (attention, (x, rotation), output) in zip(maps, outputs, strict=True):
        assert weights.shape == (2, 2, 48, 48)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 48))
        _, _, v = attention.project(x, rotation)
        torch.testing.assert_close(attention.merge_heads(weights @ v), output, rtol=1e-4, atol=1e-5)
    is_finer = torch.arange(48)[:, None] // 16 > torch.arange(48) // 16
    assert (mode == "coarse_to_fine") == bool((maps[0][:, :, is_finer] == 0).all())
    with torch.no_grad():
        assert torch.equal(seen, encoder(img, bbox)[0])  # recording changes nothing
    with torch.no_grad(), attention_maps(encoder, average_heads=True) as means:
        encoder(img, bbox)
    torch.testing.assert_close(means[0], maps[0].mean(1))


def test_a_segmenter_records_the_rows_that_it_computes_and_leaves_nothing_behind():
    model, img, bbox = segmenter()
    with torch.no_grad(), attention_maps(model.encoder) as maps:
        model.label_logits(img, bbox)
    assert [tuple(weights.shape) for weights in maps] == [(2, 2, 32, 32), (2, 2, 32, 32), (2, 2, 16, 32)]
    with pytest.raises(ZeroDivisionError), attention_maps(model.encoder), hidden_tokens(model, torch.zeros(1, 32) > 0):
        raise ZeroDivisionError
    for module in model.modules():
        if isinstance(module, Attention):
            assert not module._forward_hooks and not module._forward_pre_hooks


def test_rollout_follows_content_through_the_blocks():
    torch.manual_seed(0)
    first, second = (torch.rand(1, 2, 4, 4).softmax(-1) for _ in range(2))
    expected = (second.mean(1) + torch.eye(4)) / 2 @ ((first.mean(1) + torch.eye(4)) / 2)
    torch.testing.assert_close(rollout([first, second]), expected)
    torch.testing.assert_close(rollout([first.mean(1), second[:, :, :2]]), expected[:, :2])
    torch.testing.assert_close(expected.sum(-1), torch.ones(1, 4))


def test_the_gradient_reaches_the_maps_and_weighs_them():
    model, img, bbox = segmenter()
    with torch.no_grad():
        usual = model.label_logits(img, bbox)
    with attention_maps(model.encoder, differentiable=True) as maps:
        logits = model.label_logits(img, bbox)
    torch.testing.assert_close(logits, usual, rtol=1e-4, atol=1e-5)
    target = logits[0, 1, 3, 5]
    gradients = torch.autograd.grad(target, maps, retain_graph=True)
    relevance = gradient_rollout(maps, target)
    assert relevance.shape == (2, 32) and (relevance >= 0).all()
    assert relevance[0].sum() > 0 and (relevance[1] == 0).all()  # the other sample has no part in it
    # equations 5 and 6, of the whole matrix
    full = torch.eye(32)
    for weights, gradient in zip(maps, gradients, strict=True):
        step = (weights * gradient)[0].relu().mean(0)
        full = full[: len(step)] + step @ full
    torch.testing.assert_close(relevance[0], (full - torch.eye(16, 32)).sum(0))


@torch.no_grad()
def test_what_goes_to_copies_is_counted_for_their_originals():
    model, img, bbox = segmenter("copies")
    with attention_maps(model.encoder, average_heads=True) as maps:
        model.label_logits(img, bbox)
    copied = model.encoder.copied_tokens(img, bbox)
    count = copied.shape[1]
    assert [tuple(weights.shape[1:]) for weights in maps] == [*2 * [(32 + count,) * 2], (16, 32 + count)]
    for shares in (maps[-1][:, 5], rollout(maps)[:, 5]):
        whole = onto_originals(shares, copied)
        torch.testing.assert_close(whole.sum(1), torch.ones(2))
        for sample, (tokens, original) in enumerate(zip(shares, copied, strict=True)):
            expected = tokens[original[0]] + tokens[32]
            torch.testing.assert_close(whole[sample, original[0]], expected)
    assert (maps[0][:, 16:32, :16] == 0).all() and (maps[0][:, 16:32, 32:] == 0).all()
    assert (maps[0][:, 32:, :16].sum(-1) > 0).all() and (maps[0][:, 32:, 32:].sum(-1) > 0).all()


@pytest.mark.parametrize("mode", ["all", "coarse_to_fine", "copies"])
def test_a_hidden_token_has_no_influence_on_others(mode):
    model, img, bbox = segmenter(mode)
    hidden = torch.zeros(1, 32, dtype=torch.bool)
    hidden[:, 20] = True
    changed = img.clone()
    changed[:, 1, :, 4:8, 0:4] = 9.0  # the pixels of token 20, the fifth of the coarse view
    with torch.no_grad():
        before = model.label_logits(img, bbox)
        assert not torch.allclose(before, model.label_logits(changed, bbox), atol=1e-3)
        with hidden_tokens(model, hidden):
            torch.testing.assert_close(model.label_logits(changed, bbox), model.label_logits(img, bbox))
            with attention_maps(model.encoder) as maps:
                model.label_logits(img, bbox)
        with hidden_tokens(model, ~hidden), attention_maps(model.encoder) as rest:
            model.label_logits(img, bbox)
        with pytest.raises(ShapeError, match="one for each token"), hidden_tokens(model, hidden[:, 1:]):
            model.label_logits(img, bbox)
    others = torch.arange(maps[0].shape[3]) != 20
    assert all((weights[:, :, others[: weights.shape[2]], 20] == 0).all() for weights in maps)
    # hidden from all, every token still sees itself and the only visible one, and its copy
    seen = [3, 20] if mode != "copies" else [3, 20, 32 + model.encoder.copied_tokens(img, bbox)[0].tolist().index(20)]
    assert (rest[0][:, :, 3, seen].sum(-1) - 1).abs().max() < 1e-6


def test_queries_do_not_see_hidden_tokens_either():
    model, img, bbox = segmenter(decoder="mask2former", decoder_widths=(16, 8, 4))
    hidden = (torch.arange(32) >= 16)[None]
    changed = img.clone()
    changed[:, 1] += 3
    with torch.no_grad(), hidden_tokens(model, hidden):
        torch.testing.assert_close(model.label_logits(changed, bbox), model.label_logits(img, bbox))


def test_hiding_the_coarse_level_is_attention_within_the_finest():
    """With all other levels hidden, full attention and attention within levels are the same."""
    encoder, same = tiny(levels=LEVELS), tiny(levels=LEVELS, attention_mode="same")
    img, bbox = torch.randn(2, 3, 2, 16, 16), nested_boxes(LEVELS)
    with torch.no_grad(), hidden_tokens(encoder, (torch.arange(48) >= 16)[None]):
        finest = encoder.encode(img, bbox, only_finest=True).tokens
    with torch.no_grad():
        torch.testing.assert_close(finest, same.encode(img, bbox, only_finest=True).tokens)
