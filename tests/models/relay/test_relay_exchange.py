"""Exchange between the views by place."""

from math import pi

import pytest
import torch
from relay_models import SWIN, boxes, build, shake, views
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate, layer_norm

from muvit.models.layers.rope import rotate
from muvit.models.relay.exchange import CellExchange, ContextExchange, LateExchange, WorldExchange, cell_side

SOME = ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "swinv2_tiny_window8_256"]


def test_tokens_attend_to_the_means_of_cells_at_their_centres():
    torch.manual_seed(0)
    exchange = WorldExchange(16, 2, num_levels=2, cells=2, periods=(4.0, 64.0))
    shake(exchange)
    maps = [torch.randn(3, 16, 4, 6), torch.randn(3, 16, 2, 2)]
    bbox = torch.tensor([[[8.0, 16.0], [24.0, 40.0]], [[0.0, 0.0], [64.0, 64.0]]]).expand(3, -1, -1, -1)

    def heads(x, rows, places):
        x = (x @ exchange.attn.qkv.weight[rows].mT).unflatten(-1, (2, 8)).transpose(1, 2)
        return x if places is None else rotate(x, exchange.rope(places.expand(3, -1, -1)))

    normed = [layer_norm(m.movedim(1, -1), (16,), exchange.norm.weight, exchange.norm.bias) for m in maps]
    # 4 x 6 tokens of 4 px in cells of 2 x 3; 2 x 2 tokens of 32 px are their own cells
    fine = normed[0].unflatten(2, (2, 3)).unflatten(1, (2, 2)).mean((2, 4)).flatten(1, 2) + exchange.level_embed[0]
    grid = torch.cat([fine, normed[1].flatten(1, 2) + exchange.level_embed[1]], dim=1)
    cells = [[12, 22], [12, 34], [20, 22], [20, 34], [16, 16], [16, 48], [48, 16], [48, 48]]
    cells = torch.tensor(cells).float()
    tokens = torch.cartesian_prod(torch.arange(10, 26, 4.0), torch.arange(18, 42, 4.0))
    for level, places in enumerate((tokens, cells[4:])):
        q = heads(normed[level].flatten(1, 2), slice(16), places)
        k, v = heads(grid, slice(16, 32), cells), heads(grid, slice(32, 48), None)
        seen = (q @ k.mT / 8**0.5).softmax(-1) @ v
        expected = seen.transpose(1, 2).flatten(2) @ exchange.attn.out.weight.mT
        torch.testing.assert_close(exchange(maps, bbox)[level], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count, cells, side", [(16, 8, 2), (8, 8, 1), (7, 8, 1), (14, 8, 2), (13, 8, 13), (64, 8, 8)])
def test_cells_are_equal_groups_of_tokens(count, cells, side):
    assert cell_side(count, cells) == side


def two_maps():
    torch.manual_seed(0)
    bbox = torch.tensor([[[8.0, 16.0], [24.0, 40.0]], [[0.0, 0.0], [64.0, 64.0]]]).expand(3, -1, -1, -1)
    return [torch.randn(3, 16, 4, 6), torch.randn(3, 16, 2, 2)], bbox


def test_the_local_view_attends_to_the_context_through_gates():
    maps, bbox = two_maps()
    exchange = ContextExchange(16, 2, num_levels=2, cells=1)
    local, other = exchange(maps, bbox)
    assert other is None and not local.any()
    shake(exchange)
    normed = [layer_norm(m.flatten(2).mT, (16,), exchange.norm.weight, exchange.norm.bias) for m in maps]
    grid = normed[1].mean(1, keepdim=True) + exchange.level_embed[1]
    # a single cell is all that is seen, so attention gives its value
    value = grid @ exchange.attn.qkv.weight[32:].mT @ exchange.attn.out.weight.mT
    expected = (exchange.gate.tanh() * value).expand(-1, 24, -1)
    torch.testing.assert_close(exchange(maps, bbox)[0], expected, rtol=1e-4, atol=1e-5)


def test_cells_of_all_views_attend_to_each_other_and_tell_their_tokens():
    maps, bbox = two_maps()
    exchange = CellExchange(16, 2, num_levels=2, cells=2)
    assert not any(gain.any() for gain in exchange(maps, bbox))
    shake(exchange)
    normed = [layer_norm(m.movedim(1, -1), (16,), exchange.norm.weight, exchange.norm.bias) for m in maps]
    fine = avg_pool2d(normed[0].movedim(-1, 1), (2, 3)).flatten(2).mT + exchange.level_embed[0]
    both = torch.cat([fine, normed[1].flatten(1, 2) + exchange.level_embed[1]], dim=1)
    found = exchange.attn(both)
    gains = exchange(maps, bbox)
    expected = interpolate(found[:, :4].mT.unflatten(2, (2, 2)), scale_factor=(2, 3), mode="nearest").flatten(2).mT
    torch.testing.assert_close(gains[0], expected)
    torch.testing.assert_close(gains[1], found[:, 4:])


def test_late_blocks_see_the_tokens_of_all_views_at_their_places():
    maps, bbox = two_maps()
    exchange = LateExchange(16, 2, periods=(4.0, 64.0))
    assert not any(gain.any() for gain in exchange(maps, bbox))
    shake(exchange)
    fine = torch.cartesian_prod(torch.arange(10, 26, 4.0), torch.arange(18, 42, 4.0))
    places = torch.cat([fine, torch.tensor([[16.0, 16], [16, 48], [48, 16], [48, 48]])]).expand(3, -1, -1)
    start = tokens = torch.cat([m.flatten(2).mT for m in maps], dim=1)
    for block in exchange.blocks:
        tokens = block(tokens, block.rotation(places))
    gains = exchange(maps, bbox)
    torch.testing.assert_close(torch.cat(gains, dim=1), tokens - start, rtol=1e-4, atol=1e-4)
    assert [gain.shape for gain in gains] == [(3, 24, 16), (3, 4, 16)]


@pytest.mark.parametrize("exchange, local_only", [("context", True), ("cells", False), ("late", False)])
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "swinv2_tiny_window8_256"])
def test_controls_bring_the_context_to_the_local_view(name, exchange, local_only):
    model, plain = (build(name, exchange=kind, relay_tokens=0) for kind in (exchange, "none"))
    found = plain.load_state_dict(model.state_dict(), strict=False)
    assert found.missing_keys == [] and all(key.startswith("trunk.exchanges") for key in found.unexpected_keys)
    img, bbox = views(model), boxes(model)
    other = img.clone()
    other[:, 1] += 1
    swapped = img.clone()
    swapped[:, 0] += 1
    with torch.no_grad():
        assert torch.equal(model(img, bbox), plain(img, bbox))  # as a pre-trained backbone starts
        shake(model)
        assert not torch.equal(model(img, bbox), model(other, bbox))
        contexts = [model.branch_logits(x, bbox)[1] for x in (img, swapped)]
        assert torch.equal(*contexts) == local_only
    assert model.config.needs_concentric_views == (exchange != "late")
    keys = list(model.trunk.exchanges)
    ends = {"context": ["0_1", "1_1"], "cells": ["0_0", "1_0"], "late": ["1_2"]}
    of_vit = {"context": ["0_0", "0_2"], "cells": ["0_0", "0_2"], "late": ["0_3"]}
    assert keys == (ends if name.startswith("swin") else of_vit)[exchange]
    model.train().branch_logits(img, bbox)[0].sum().backward()
    assert all(p.grad is not None for p in model.trunk.exchanges.parameters())


@pytest.mark.parametrize("name", SOME)
def test_places_count_relative_to_each_other_only(name):
    model = build(name, exchange="world", shaken=True)
    img, bbox = views(model), boxes(model)
    moved = bbox.clone()
    moved[:, 1] += 24
    with torch.no_grad():
        here = model(img, bbox)
        torch.testing.assert_close(model(img, bbox + 2**20), here)
        assert not torch.allclose(model(img, moved), here, atol=1e-4)
        alone = build(name, shaken=True)
        assert torch.equal(alone(img, bbox), alone(img, moved))


@pytest.mark.parametrize("name", SOME)
def test_a_pre_trained_backbone_starts_undisturbed(name):
    model, plain = build(name, exchange="world"), build(name)
    found = plain.load_state_dict(model.state_dict(), strict=False)
    assert found.missing_keys == [] and all(key.startswith("trunk.exchanges") for key in found.unexpected_keys)
    img = views(model)
    with torch.no_grad():
        assert torch.equal(model(img), plain(img))


def test_every_second_block_has_one_whose_periods_span_from_token_to_context():
    model = build("swin_tiny_patch4_window7_224", exchange="world", timm_options={"depths": (2, 1, 2), "embed_dim": 24})
    found = model.trunk.exchanges
    assert list(found) == ["0_0", "1_0", "2_1"]
    for pitch, exchange in zip((4, 8, 16), found.values(), strict=True):
        freq = exchange.rope.freq.detach()
        # a context of 96 px along the longer side at level 4
        assert freq.max().item() == pytest.approx(pi / pitch)
        assert freq.min().item() == pytest.approx(pi / (4 * 96))
    assert len(build(exchange="world", levels=(1,)).trunk.exchanges) == 0


def place_task(model, seed):
    """Samples whose class is what the context view shows where the fine view lies, at random, in it."""
    generator = torch.Generator().manual_seed(seed)
    quadrants = torch.randint(2, (32, 2, 2), generator=generator)
    where = torch.randint(2, (2, 32), generator=generator)
    img = torch.randn(32, 2, 1, 16, 16, generator=generator)
    img[:, 1, 0] += 4.0 * (2 * quadrants - 1).repeat_interleave(8, 1).repeat_interleave(8, 2)
    bbox = boxes(model, 32).clone()
    bbox[:, 0] += 16.0 * (2 * where.mT[:, None] - 1)
    label = quadrants[torch.arange(32), where[0], where[1]]
    return {"img": img, "bbox": bbox, "label": label[:, None, None].expand(-1, 16, 16).contiguous()}


@pytest.mark.parametrize("relay_tokens, exchange", [(4, "none"), (0, "world"), (0, "late")])
def test_only_an_exchange_by_place_brings_what_stands_at_a_place(relay_tokens, exchange):
    fields = {"in_channels": 1, "num_classes": 2, "size": (16, 16), "drop_path": 0.0, "context_weight": 0.0}
    options = SWIN | {"window_size": 2}
    model = build(
        "swinv2_tiny_window8_256", timm_options=options, relay_tokens=relay_tokens, exchange=exchange, **fields
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for step in range(40):
        optimizer.zero_grad()
        model.training_loss(place_task(model, step), cross_entropy)[0].backward()
        optimizer.step()
    test = place_task(model, 1000)
    with torch.no_grad():
        loss = cross_entropy(model.eval()(test["img"], test["bbox"]), test["label"])
    assert (loss > 0.4) if exchange == "none" else (loss < 0.2)
