import pytest
import torch
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

from muvit.errors import CheckpointError, InputError
from muvit.models.encoder import MuViTEncoder
from muvit.models.mae import DecoderConfig, MuViTDecoder

TINY = {"in_channels": 24, "dim": 32, "num_layers": 2, "heads": 2}


def tiny(ndim=2, **changes):
    torch.manual_seed(0)
    return MuViTDecoder(DecoderConfig(ndim=ndim, **TINY | changes)).eval()


def inputs(ndim=2, num=6, seen=9):
    torch.manual_seed(1)
    x, context = torch.randn(2, num, 24), torch.randn(2, seen, 24)
    return x, 50 * torch.rand(2, num, ndim), context, 50 * torch.rand(2, seen, ndim)


def test_the_papers_decoder_has_its_number_of_parameters():
    decoder = MuViTDecoder(DecoderConfig(in_channels=512))
    assert sum(p.numel() for p in decoder.parameters()) == 1_184_032
    assert (decoder.config.dim, decoder.config.num_layers, decoder.config.heads) == (256, 2, 8)


def test_the_first_block_attends_to_the_context_only():
    decoder = tiny(num_layers=1)
    x, coords, context, context_coords = inputs()
    before = decoder(x, coords, context, context_coords)
    other = x.clone()
    other[:, 2] += 1
    after = decoder(other, coords, context, context_coords)
    changed = (after - before).abs().amax(-1) > 0
    assert changed.tolist() == [[i == 2 for i in range(6)]] * 2
    context[:, 4] += 1
    assert ((decoder(x, coords, context, context_coords) - before).abs().amax(-1) > 0).all()


def test_later_blocks_attend_to_the_tokens_themselves():
    decoder = tiny()
    x, coords, context, context_coords = inputs()
    before = decoder(x, coords, context, context_coords)
    x[:, 2] += 1
    assert ((decoder(x, coords, context, context_coords) - before).abs().amax(-1) > 0).all()


def test_forward_follows_the_equations():
    decoder = tiny(num_layers=1, heads=1, rotary_mode="none")
    x, _, context, _ = inputs()
    proj, norm, block = decoder.proj[0], decoder.proj[2], decoder.layers[0]

    def project(t):
        return layer_norm(gelu(t @ proj.weight.T + proj.bias), (32,), norm.weight, norm.bias)

    h, seen = project(x), project(context)
    wq, wk, wv = block.attn.qkv.weight.chunk(3)
    q = layer_norm(h, (32,), block.norm1.weight, block.norm1.bias) @ wq.T  # only the query side is normalised
    h = h + scaled_dot_product_attention(q, seen @ wk.T, seen @ wv.T) @ block.attn.out.weight.T
    first, last = block.ff[0], block.ff[3]
    y = layer_norm(h, (32,), block.norm2.weight, block.norm2.bias)
    h = h + gelu(y @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(decoder(x, None, context), h, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_only_differences_of_coordinates_matter(ndim):
    decoder = tiny(ndim)
    x, coords, context, context_coords = inputs(ndim)
    before = decoder(x, coords, context, context_coords)
    shifted = decoder(x, coords + 7, context, context_coords + 7)
    torch.testing.assert_close(shifted, before, atol=1e-5, rtol=1e-5)
    moved = decoder(x, coords + 7, context, context_coords)
    assert (moved - before).abs().max() > 1e-4
    assert before.shape == (2, 6, 32)


def test_context_is_a_set():
    decoder = tiny()
    x, coords, context, context_coords = inputs()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        decoder(x, coords, context[:, order], context_coords[:, order]),
        decoder(x, coords, context, context_coords),
        atol=1e-5,
        rtol=1e-5,
    )


def test_without_a_context_tokens_look_at_each_other():
    decoder = tiny(num_layers=1)
    x, coords, _, _ = inputs()
    before = decoder(x, coords)
    x[:, 2] += 1
    assert ((decoder(x, coords) - before).abs().amax(-1) > 0).all()


def test_shared_frequencies_are_one_object():
    shared = tiny(rotary_mode="shared")
    assert shared.layers[0].rotary_pos_embs is shared.layers[1].rotary_pos_embs
    own = tiny(rotary_mode="per_layer")
    assert own.layers[0].rotary_pos_embs is not own.layers[1].rotary_pos_embs


@pytest.mark.parametrize(
    "wrong", [{"dim": 0}, {"heads": 0}, {"num_layers": 0}, {"in_channels": 0}, {"rotary_mode": "causal"}, {"ndim": 1}]
)
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        DecoderConfig(**TINY | wrong)


def test_a_decoder_comes_back_from_its_folder(tmp_path):
    decoder = tiny()
    decoder.save(tmp_path / "decoder")
    x, coords, context, context_coords = inputs()
    again = MuViTDecoder.from_folder(tmp_path / "decoder").eval()
    assert torch.equal(again(x, coords, context, context_coords), decoder(x, coords, context, context_coords))
    assert again.config == decoder.config
    with pytest.raises(CheckpointError, match="kind encoder, got one of kind decoder"):
        MuViTEncoder.from_folder(tmp_path / "decoder")
