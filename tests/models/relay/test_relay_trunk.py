"""In which order information passes between the branches."""

import pytest
import torch
from relay_models import boxes, build, views

SOME = ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "swinv2_tiny_window8_256"]


def depends(model, img, changed):
    """Whether the map of each branch after each block changes with the view of branch ``changed``."""
    taps = [(stage, index) for stage, depth in enumerate(model.backbone.depths) for index in range(depth)]
    other = img.clone()
    other[:, changed] = other[:, changed].flip(-2)
    with torch.no_grad():
        before, after = (model.trunk(x, boxes(model), taps) for x in (img, other))
    # maps of the taps come last block first
    return [
        [not torch.equal(a, b) for a, b in zip(x[:0:-1], y[:0:-1], strict=True)]
        for x, y in zip(before, after, strict=True)
    ]


@pytest.mark.parametrize("name", SOME)
def test_sequential_the_local_branch_sees_the_context_at_once_the_context_the_local_one_block_later(name):
    model = build(name, shaken=True)
    img = views(model)
    num_blocks = sum(model.backbone.depths)
    local, context = depends(model, img, changed=1)
    assert local == [True] * num_blocks and context == [True] * num_blocks
    local, context = depends(model, img, changed=0)
    assert local == [True] * num_blocks
    assert context == [False] + [True] * (num_blocks - 1)


@pytest.mark.parametrize("name", SOME)
def test_mean_both_branches_see_each_other_one_block_later(name):
    model = build(name, update="mean", shaken=True)
    img = views(model)
    num_blocks = sum(model.backbone.depths)
    later = [False] + [True] * (num_blocks - 1)
    assert depends(model, img, changed=1)[0] == later
    assert depends(model, img, changed=0)[1] == later


def test_sequential_the_coarsest_of_several_contexts_comes_first():
    model = build(levels=(1, 4, 16), shaken=True)
    img = views(model)
    later = [False, True, True]
    # what changes in the finest view (0), the middle (1), the coarsest (2) reaches these branches in the first block
    assert [depends(model, img, changed=0)[branch] for branch in (1, 2)] == [later, later]
    assert [depends(model, img, changed=1)[branch] for branch in (0, 2)] == [[True] * 3, later]
    assert [depends(model, img, changed=2)[branch] for branch in (0, 1)] == [[True] * 3, [True] * 3]


@pytest.mark.parametrize("update", ["sequential", "mean"])
def test_a_block_updates_branches_and_relay_tokens_as_the_paper_says(update):
    model = build(update=update, shaken=True)
    trunk, backbone = model.trunk, model.backbone
    img = views(model)
    vit = backbone.timm
    with torch.no_grad():
        local, context = (backbone.embed(img[:, i], i) for i in (0, 1))
        relay = trunk.relay_tokens.expand(2, -1, -1)
        for index in (0, 1):
            start = relay + trunk.relay_positions[1] if index == 0 else relay
            out = vit.blocks[index](torch.cat([start, context.tokens], 1))
            from_context, t_context = out[:, :4], out[:, 4:]
            handed_on = from_context if update == "sequential" else relay
            start = handed_on + trunk.relay_positions[0] if index == 0 else handed_on
            out = vit.blocks[index](torch.cat([start, local.tokens], 1))
            from_local, t_local = out[:, :4], out[:, 4:]
            expected = from_local if update == "sequential" else (from_local + from_context) / 2
            (local, context), relay = trunk.couple(0, index, [local, context], relay)
            torch.testing.assert_close(local.tokens, t_local)
            torch.testing.assert_close(context.tokens, t_context)
            torch.testing.assert_close(relay, expected)


@pytest.mark.parametrize("name", [*SOME, "vit_small_patch16_rope_mixed_224", "vit_base_patch16_clip_224"])
def test_unshared_blocks_start_equal_and_go_their_own_way(name):
    shared, own = (build(name, share_blocks=share, shaken=True) for share in (True, False))
    timm = own.backbone.timm
    in_blocks = [*getattr(timm, "blocks", getattr(timm, "layers", None)).parameters(), *timm.norm.parameters()]
    count = [sum(p.numel() for p in model.parameters()) for model in (shared, own)]
    assert count[1] - count[0] == sum(p.numel() for p in in_blocks)
    found = own.load_state_dict(shared.state_dict(), strict=False)
    assert found.unexpected_keys == [] and all(key.startswith("trunk.backbone.twins.0.") for key in found.missing_keys)
    of_local = own.backbone.state_dict()
    own.backbone.twins.load_state_dict({key: of_local[key[2:]] for key in own.backbone.twins.state_dict()})
    img, bbox = views(own), boxes(own)
    with torch.no_grad():
        (local, *_), (context, *_) = own.trunk(img, bbox)
        for map_of, (equal, *_) in zip((local, context), shared.trunk(img, bbox), strict=True):
            assert torch.equal(map_of, equal)
        for parameter in own.backbone.twins.parameters():
            parameter.mul_(0.5)
        (moved, *_), (other, *_) = own.trunk(img, bbox)
        assert not torch.equal(other, context)
        assert not torch.equal(moved, local)  # through the relay tokens
    own.train().branch_logits(img)[1].sum().backward()
    resting = [name for name, p in own.backbone.twins.named_parameters() if p.grad is None]
    assert resting == []


def test_relay_tokens_grow_with_the_stages_of_a_swin_transformer():
    model = build("swin_tiny_patch4_window7_224", timm_options={"depths": (1, 1, 2, 1), "embed_dim": 24})
    assert model.trunk.relay_tokens.shape == (1, 4, 24)
    assert model.trunk.relay_positions is None
    assert [(p.in_features, p.out_features) for p in model.trunk.widen] == [(24, 48), (48, 96), (96, 192)]


def test_relay_tokens_start_from_zero_only_where_positions_tell_them_apart():
    plain, rotary, swin = (build(name, relay_tokens=32).trunk for name in SOME)
    assert not plain.relay_tokens.any()
    assert plain.relay_positions.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(plain.relay_positions[0], plain.relay_positions[1])
    assert rotary.relay_positions is None and swin.relay_positions is None
    assert rotary.relay_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert swin.relay_tokens.std().item() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("name", SOME)
def test_context_branches_start_from_copies_of_the_local_embeddings(name):
    backbone = build(name, levels=(1, 4, 16)).backbone
    local = dict(backbone.named_parameters())
    assert len(backbone.contexts) == 2
    for level in (1, 2):
        own = backbone.own(level)
        assert any(name.endswith("patch_embed.proj.weight") for name in own)
        assert all(torch.equal(copy, local[name]) and copy is not local[name] for name, copy in own.items())
    shared = build(name, share_patch_embed=True).backbone
    assert len(shared.contexts) == 0
