import torch

from muvit.models.layers.attention import Block, FeedForward
from muvit.models.layers.rope import AxialRope


def test_a_block_adds_attention_then_a_two_fold_feed_forward_network():
    torch.manual_seed(0)
    block, x = Block(16, 2, AxialRope(8, 2, 100)), torch.randn(2, 5, 16)
    rotation = block.rotation(torch.randint(0, 50, (2, 5, 2)).float())
    h = x + block.attn(block.norm1(x), rotation)
    wide = torch.nn.functional.gelu(block.norm2(h) @ block.ff[0].weight.T + block.ff[0].bias)
    assert wide.shape[-1] == 32
    torch.testing.assert_close(block(x, rotation), h + wide @ block.ff[3].weight.T + block.ff[3].bias)


def test_a_block_of_the_paper_has_its_number_of_parameters():
    assert sum(p.numel() for p in Block(512, 8, AxialRope(64, 2)).parameters()) == 2_100_768
    assert sum(p.numel() for p in FeedForward(512).parameters()) == 1_050_112


def test_without_rope_a_block_has_no_angles():
    assert Block(16, 2).rotation(torch.zeros(1, 3, 2)) is None


def test_chosen_tokens_come_out_as_if_all_had_been_computed():
    torch.manual_seed(0)
    block, x = Block(16, 2, AxialRope(8, 2, 100)), torch.randn(2, 7, 16)
    rotation, chosen = block.rotation(torch.randint(0, 50, (2, 7, 2)).float()), slice(2, 5)
    torch.testing.assert_close(block(x, rotation, queries=chosen), block(x, rotation)[:, chosen])
    mask = torch.rand(2, 1, 7, 7) > 0.3
    masked = block(x, rotation, mask=mask[:, :, chosen], queries=chosen)
    torch.testing.assert_close(masked, block(x, rotation, mask=mask)[:, chosen])
    seen = block.keys_values(x[:, :4], rotation[:, :4])
    among_four = block(x, rotation, context_kv=seen, queries=chosen)
    torch.testing.assert_close(among_four, block(x, rotation, context_kv=seen)[:, chosen])
    assert block(Block(16, 2)(x), queries=chosen).shape == (2, 3, 16)


def test_a_block_sees_itself_through_its_keys_and_values():
    torch.manual_seed(0)
    block, x = Block(16, 2, AxialRope(8, 2, 100)), torch.randn(2, 7, 16)
    rotation = block.rotation(torch.randint(0, 50, (2, 7, 2)).float())
    torch.testing.assert_close(block(x, rotation, context_kv=block.keys_values(x, rotation)), block(x, rotation))
