from dataclasses import asdict

import pytest
import timm
import torch
from relay_models import SWIN, VIT, boxes, build, shake, views
from torch.nn.functional import conv_transpose2d, cross_entropy, interpolate

from muvit.errors import CheckpointError, InputError, ShapeError
from muvit.labels import IGNORE
from muvit.losses import SegmentationLoss
from muvit.models.relay.config import RelayConfig
from muvit.models.relay.segmenter import RelaySegmenter
from muvit.models.trained import load_network


def paper_size(**changes):
    """A model of the paper's size, without memory for its parameters."""
    fields = {"in_channels": 3, "num_classes": 8, "levels": (1, 4), "size": (256, 256)} | changes
    with torch.device("meta"):
        return RelaySegmenter(RelayConfig(**fields))


def count(module):
    return sum(p.numel() for p in module.parameters())


VIT_S = {"backbone": "vit_small_patch16_224", "timm_options": {"class_token": False, "global_pool": "avg"}}
"""The paper's: without a class token."""
RELEASED_S = {"backbone": "deit3_small_patch16_224", "class_token": False, "final_norm": False}
DEIT_S, SWIN_S = {"backbone": "deit3_small_patch16_224"}, {"backbone": "swinv2_small_window8_256"}


@pytest.mark.parametrize(
    "backbone, share, overhead, percent",
    [
        (VIT_S, False, 398_208, 1.8),
        (VIT_S, True, 3_072, 0.014),
        # the class token of DeiT-III has no position; that of the plain ViT has one in either table
        (DEIT_S, False, 398_208, 1.8),
        (DEIT_S, True, 3_072, 0.014),
        (RELEASED_S, False, 398_208, 1.8),
        (RELEASED_S, True, 3_072, 0.014),
        ({"backbone": "vit_small_patch16_224"}, False, 398_208 + 384, 1.8),
        ({"backbone": "vit_small_patch16_224"}, True, 3_072, 0.014),
        (SWIN_S, False, 393_696, 0.80),
        (SWIN_S, True, 393_696 - 4_896, 0.79),
    ],
)
def test_relay_tokens_cost_as_many_parameters_as_in_the_paper(backbone, share, overhead, percent):
    plain = paper_size(**backbone, levels=(1,))
    assert count(paper_size(**backbone, share_patch_embed=share)) - count(plain) == overhead
    assert 100 * overhead / count(plain.backbone.timm) == pytest.approx(percent, rel=0.03)


def test_the_head_is_one_linear_map_from_tokens_to_pixels():
    plain = timm.create_model("deit3_small_patch16_224", img_size=256, num_classes=0)
    assert count(paper_size(**DEIT_S, levels=(1,))) == count(plain) + 16 * 16 * 8 * 384 + 8


def test_with_one_level_it_is_the_plain_backbone_with_the_same_head():
    model = build(levels=(1,), shaken=True)
    assert model.trunk.relay_tokens is None and len(model.backbone.contexts) == 0
    twin = timm.create_model("vit_tiny_patch16_224", in_chans=2, img_size=64, num_classes=0, **VIT).eval()
    twin.load_state_dict(model.backbone.timm.state_dict())
    img, head = views(model), model.decoder.head
    with torch.no_grad():
        tokens = twin.forward_features(img[:, 0])[:, 1:].mT.unflatten(-1, (4, 4))
        expected = conv_transpose2d(tokens, head.weight, head.bias, stride=16)
        torch.testing.assert_close(model(img, boxes(model)), expected)
        torch.testing.assert_close(model.label_logits(img), expected)


def test_all_branches_use_one_head():
    model = build(shaken=True)
    img = views(model)
    with torch.no_grad():
        local, context = model.branch_logits(img, boxes(model))
        maps = [branch[0] for branch in model.trunk(img, boxes(model))]
        torch.testing.assert_close(local, model.decoder.head(maps[0]))
        torch.testing.assert_close(context, model.decoder.head(maps[1]))
        torch.testing.assert_close(model(img, boxes(model)), local)


def test_decision_fusion_adds_the_up_sampled_centre_of_the_context_logits():
    model = build(fusion="decision", shaken=True)
    assert model.trunk.relay_tokens is None
    img = views(model)
    with torch.no_grad():
        local, context = (model.decoder.head(branch[0]) for branch in model.trunk(img, boxes(model)))
        centre = context[:, :, 24:40, 24:40]
        expected = local + interpolate(centre, scale_factor=4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(img, boxes(model)), expected)
        torch.testing.assert_close(model(img), expected)  # without boxes all views share one centre
        moved = boxes(model).clone()
        moved[:, 0] -= 24 * 4
        corner = interpolate(context[:, :, :16, :16], scale_factor=4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(img, moved), local + corner)


@pytest.mark.parametrize("levels", [(1, 4), (1, 4, 16)])
def test_the_training_loss_is_made_of_its_terms(levels):
    model = build(levels=levels, shaken=True, context_weight=0.3, consistency_weight=0.7)
    img = views(model)
    label = (img[:, 0, 0] > 0).long()
    label[:, :3] = IGNORE
    batch = {"img": img, "bbox": boxes(model), "label": label}
    loss, logits = model.training_loss(batch, SegmentationLoss())
    branches = model.branch_logits(img, boxes(model))
    expected = SegmentationLoss()(branches[0], label)
    for factor, context in zip(levels[1:], branches[1:], strict=True):
        n = 64 // factor
        start = (64 - n) // 2
        log_p = context[:, :, start : start + n, start : start + n].log_softmax(1)
        soft = branches[0].softmax(1).unflatten(3, (n, factor)).unflatten(2, (n, factor)).mean((3, 5))
        blocks = label.unflatten(2, (n, factor)).unflatten(1, (n, factor))
        shares = torch.stack([(blocks == c).float().mean((2, 4)) for c in range(3)], 1)
        shares = shares * (blocks != IGNORE).all(4).all(2)[:, None]
        expected = expected - 0.3 * (shares * log_p).sum(1).mean() - 0.7 * (soft * log_p).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, branches[0])


def context_task(model, seed):
    """Samples whose class can be read in the context view only."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(16).reshape(16, 1, 1) % 2
    img = torch.randn(16, 2, 1, 16, 16, generator=generator)
    img[:, 1] += 2.0 * (2 * label - 1)[:, None]
    return {"img": img, "bbox": boxes(model, 16), "label": label.expand(-1, 16, 16).contiguous()}


@pytest.mark.parametrize("relay_tokens", [4, 0])
@pytest.mark.parametrize(
    "name, options, steps",
    [
        ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}, 25),
        ("swinv2_tiny_window8_256", SWIN | {"window_size": 4}, 90),
    ],
)
def test_only_relay_tokens_bring_what_the_context_knows(name, options, steps, relay_tokens):
    fields = {"in_channels": 1, "num_classes": 2, "size": (16, 16), "drop_path": 0.0}
    model = build(name, timm_options=options, relay_tokens=relay_tokens, **fields).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for step in range(steps):
        optimizer.zero_grad()
        model.training_loss(context_task(model, step), cross_entropy)[0].backward()
        optimizer.step()
    test = context_task(model, 1000)
    with torch.no_grad():
        loss = cross_entropy(model.eval()(test["img"], test["bbox"]), test["label"])
    if relay_tokens:
        assert loss < 0.2
    else:
        assert loss > 0.6


@pytest.mark.parametrize("decoder", ["unetr", "mask2former"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swinv2_tiny_window8_256", "swin_tiny_patch4_window7_224"])
def test_the_decoders_of_muvit_work_on_the_maps_of_a_branch(name, decoder):
    options = VIT | {"depth": 4} if name.startswith("vit") else SWIN | {"window_size": 4}
    widths = (32,) * 4 + (8,) if name.startswith("vit") else (32, 16, 8, 8)
    fields = {"decoder": decoder, "decoder_widths": widths, "timm_options": options, "size": (64, 32), "num_queries": 4}
    model = build(name, **fields).train()
    img, label = views(model), torch.randint(3, (2, 64, 32))
    shake(model)
    loss, logits = model.training_loss({"img": img, "bbox": boxes(model), "label": label}, cross_entropy)
    loss.backward()
    assert logits.shape == (2, 3, 64, 32)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    # pixels, skips of all depths and, through them, the context are read
    model.eval()
    with torch.no_grad():
        before = model(img, boxes(model))
        for level in (0, 1):
            other = img.clone()
            other[:, level] = other[:, level].flip(-1)
            assert not torch.allclose(model(other, boxes(model)), before, atol=1e-4)
        # where the world begins makes no difference, how large it is does, to queries
        shifted, scaled = boxes(model) + 1000, boxes(model) * 3
        torch.testing.assert_close(model(img, shifted), before, rtol=1e-3, atol=1e-3)
        assert torch.allclose(model(img, scaled), before, atol=1e-5) == (decoder == "unetr")


def test_skips_come_from_spaced_blocks_or_from_stages():
    vit = build(decoder="unetr", timm_options=VIT | {"depth": 12})
    assert vit.decoder.sources == ((0, 11), (0, 7), (0, 3), (0, 0))
    swin = build("swin_tiny_patch4_window7_224", decoder="unetr", timm_options={"depths": (1, 1, 2, 1)})
    assert swin.decoder.sources == ((3, 0), (2, 1), (1, 0), (0, 0), (0, 0))
    img = views(swin)
    maps = swin.trunk(img, boxes(swin), swin.decoder.taps)[0]
    assert [m.shape[1:] for m in maps] == [(768, 2, 3), (384, 4, 6), (192, 8, 12), (96, 16, 24)]
    adapter = swin.decoder.adapter.skips
    assert [skip.in_channels for skip in adapter] == [768, 384, 192, 96, 96]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fusion": "decision"},
        {"levels": (1,)},
        {"share_patch_embed": True},
        {"share_blocks": False},
        {"exchange": "world"},
        {"exchange": "late"},
    ],
)
def test_a_saved_model_comes_back_equal(tmp_path, changes):
    model = build("vit_small_patch16_dinov3", shaken=True, **changes)
    model.save(tmp_path / "model")
    back = load_network(tmp_path / "model").eval()
    assert isinstance(back, RelaySegmenter)
    assert asdict(back.config) == asdict(model.config)
    img = views(model)
    assert torch.equal(back(img, boxes(model)), model(img, boxes(model)))


def test_the_folder_of_another_backbone_is_refused(tmp_path):
    build(levels=(1,)).save(tmp_path / "model")
    config = tmp_path / "model" / "config.yaml"
    config.write_text(config.read_text().replace("depth: 3", "depth: 4"))
    with pytest.raises(CheckpointError, match=r"expected weights of RelaySegmenter, got .*blocks\.3.* missing"):
        load_network(tmp_path / "model")


def test_views_say_what_the_model_takes():
    found = build("vit_small_patch14_dinov2", levels=(1, 8)).views
    assert (found.levels, found.in_channels, found.ndim, found.multiple, found.size) == (
        (1, 8),
        2,
        2,
        (14, 14),
        (56, 56),
    )


def test_the_backbone_is_what_may_come_pre_trained():
    model = build()
    rest = set(model.parameters()) - set(model.backbone.parameters())
    named = {name for name, p in model.named_parameters() if p in rest}
    assert named == {"trunk.relay_tokens", "trunk.relay_positions", "decoder.head.weight", "decoder.head.bias"}


def test_images_and_boxes_of_another_shape_are_refused():
    model = build()
    img, bbox = views(model), boxes(model)
    with pytest.raises(ShapeError, match=r"img: expected shape \(B, 2, 2, 64, 64\), got \(2, 1, 2, 64, 64\)"):
        model(img[:, :1], bbox[:, :1])
    with pytest.raises(ShapeError, match=r"img: expected shape \(B, 2, 2, 64, 64\), got \(2, 2, 2, 64, 32\)"):
        model(img[..., :32], bbox)
    with pytest.raises(ShapeError, match=r"bbox: expected shape \(2, 2, 2, 2\), got \(2, 1, 2, 2\)"):
        model(img, bbox[:, :1])
    with pytest.raises(InputError, match="bbox: expected upper corners above lower corners"):
        model(img, bbox.flip(2))


@pytest.mark.parametrize("name", ["in_channels", "num_classes", "size"])
def test_a_model_needs_to_know_its_task(name):
    with pytest.raises(InputError, match=f"{name}: expected a value, to build vit_tiny_patch16_224, got none"):
        build(**{name: None})
    RelayConfig(backbone="vit_tiny_patch16_224", levels=(1, 4))  # a recipe fills the others in


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"levels": (4, 1)}, "levels: expected different levels in ascending order"),
        ({"levels": (1, 1)}, "levels: expected different levels in ascending order"),
        ({"size": (64,)}, r"size: expected \(a whole number >= 1, a whole number >= 1\), got"),
        ({"size": (64, 64, 64)}, r"size: expected \(a whole number >= 1, a whole number >= 1\), got"),
        ({"relay_tokens": -1}, "relay_tokens: expected a whole number >= 0"),
        ({"num_classes": 1}, "num_classes: expected a whole number >= 2"),
        ({"update": "zigzag"}, "update: expected sequential or mean"),
        ({"fusion": "early"}, "fusion: expected relay or decision"),
        ({"exchange": "world", "fusion": "decision"}, "exchange: expected none with fusion decision"),
        ({"decoder": "upernet"}, "decoder: expected linear or unetr or mask2former"),
        ({"context_target": "all"}, "context_target: expected center or full"),
        ({"context_weight": -0.1}, "context_weight: expected a number >= 0"),
        ({"consistency_weight": float("nan")}, "consistency_weight: expected a number >= 0"),
        ({"drop_path": 1.0}, "drop_path: expected a number >= 0 and < 1"),
        ({"decoder_widths": "thin"}, "decoder_widths: expected paper or slim or a list"),
        ({"decoder": "unetr", "decoder_widths": (8, 8)}, "decoder_widths: expected 5 positive widths"),
        ({"decoder": "unetr"}, "num_layers: expected at least 4 blocks"),
        ({"decoder": "mask2former", "num_queries": 2}, "num_queries: expected at least one for each of the 3 classes"),
        ({"decoder": "mask2former", "decoder_widths": (8,) * 5, "timm_options": VIT | {"depth": 4}}, "multiple of 32"),
        ({"relay_tokens": 0, "context_weight": 0, "consistency_weight": 0}, "relay_tokens: expected at least 1"),
        ({"timm_options": {"img_size": 64}}, "timm_options.img_size: expected the setting size"),
        ({"timm_options": {"patch_drop_rate": 0.5}}, "timm_options.patch_drop_rate: expected an argument that keeps"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        build(**changes)
