"""Every family of backbone: relay tokens come in, and without them nothing changes."""

import pytest
import timm
import torch
from relay_models import FAMILIES, SWIN, VIT, boxes, build, views
from torch.nn.functional import normalize

from muvit.errors import InputError
from muvit.geometry import naive_boxes
from muvit.losses import SegmentationLoss
from muvit.models.trained import load_network


def timm_twin(model, level):
    """timm's own model with the weights of a branch."""
    backbone, config = model.backbone, model.config
    twin = timm.create_model(
        config.backbone, in_chans=2, img_size=config.size, num_classes=0, **config.timm_options
    ).eval()
    state = backbone.timm.state_dict()
    if level:
        state |= {name.removeprefix("timm."): p.detach() for name, p in backbone.own(level).items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(("fc_norm", "attn_pool")) for name in missing)  # what only a classifier uses
    return twin


def features(twin, view):
    """timm's features as a map, without class and register tokens."""
    x = twin.forward_features(view)
    if x.ndim == 4:
        return x.movedim(-1, 1)
    return x[:, twin.num_prefix_tokens :].mT.unflatten(-1, twin.patch_embed.grid_size)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_relay_tokens_each_branch_is_the_timm_backbone(name):
    model = build(name, relay_tokens=0, shaken=True)
    img = views(model)
    with torch.no_grad():
        maps = [branch[0] for branch in model.trunk(img, boxes(model))]
        for level, branch in enumerate(maps):
            twin = timm_twin(model, level)
            torch.testing.assert_close(branch, features(twin, img[:, level]), rtol=1e-5, atol=1e-5)
        # the context branch has embeddings of its own
        assert not torch.allclose(maps[1], features(timm_twin(model, 0), img[:, 1]), atol=1e-2)


@pytest.mark.parametrize("update", ["sequential", "mean"])
@pytest.mark.parametrize("name", FAMILIES)
def test_relay_tokens_let_the_local_output_see_the_context(name, update):
    img = None
    for num_relay in (4, 0):
        model = build(name, relay_tokens=num_relay, update=update, shaken=True)
        img = views(model) if img is None else img
        other = img.clone()
        other[:, 1] = other[:, 1].flip(-1)
        with torch.no_grad():
            assert torch.equal(model(img), model(other)) == (num_relay == 0)
            assert model(img).shape == (2, 3, *model.config.size)


@pytest.mark.parametrize("share_patch_embed", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_takes_part_in_training(name, share_patch_embed):
    model = build(name, share_patch_embed=share_patch_embed, shaken=True).train()
    img, size = views(model), model.config.size
    batch = {
        "img": img,
        "bbox": naive_boxes((1, 4), size).expand(2, -1, -1, -1),
        "label": (img[:, 0, 0] > 0).long(),
    }
    model.training_loss(batch, SegmentationLoss())[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    "name, registers", [("deit3_small_patch16_224", "reg_tokens"), ("vit_small_patch16_dinov3", "num_reg_tokens")]
)
def test_the_first_branch_of_a_block_sees_relay_tokens_as_further_registers(name, registers):
    # of one sequence they are nothing else: unrotated, with positions of their own
    model = build(name, shaken=True)
    backbone, img = model.backbone, views(model)
    own, num_relay = timm_twin(model, 1), 4
    prefix = own.num_prefix_tokens - 1  # registers of the backbone, beside the class token
    options = FAMILIES[name][1] | {registers: prefix + num_relay}
    twin = timm.create_model(name, in_chans=2, img_size=model.config.size, num_classes=0, **options).eval()
    relay = model.trunk.place(model.trunk.relay_tokens, 1)
    state = own.state_dict()
    state["reg_token"] = torch.cat([state["reg_token"], relay], 1) if prefix else relay.detach()
    twin.load_state_dict(state)
    stream = backbone.embed(img[:, 1], 1)
    with torch.no_grad():
        relay = relay.expand(2, -1, -1)
        for index in range(backbone.depths[0]):
            stream, relay = backbone.run(0, index, stream, relay)
        branch = backbone.to_map(0, backbone.normalize(stream))
        torch.testing.assert_close(branch, features(twin, img[:, 1]), rtol=1e-5, atol=1e-5)


def attention_by_hand(attn, x, bias):
    """One window ``(N, C)``: timm's attention, written out head by head."""
    is_v2 = hasattr(attn, "logit_scale")
    bias_qkv = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias]) if is_v2 else attn.qkv.bias
    q, k, v = (x @ attn.qkv.weight.T + bias_qkv).chunk(3, dim=-1)
    heads = []
    for head, (qh, kh, vh) in enumerate(zip(*(t.chunk(attn.num_heads, -1) for t in (q, k, v)), strict=True)):
        if is_v2:
            scores = normalize(qh, dim=-1) @ normalize(kh, dim=-1).T * attn.logit_scale[head].clamp(max=100).exp()
        else:
            scores = qh @ kh.T / qh.shape[-1] ** 0.5
        heads.append((scores + bias[head]).softmax(-1) @ vh)
    return torch.cat(heads, -1) @ attn.proj.weight.T + attn.proj.bias


def bias_by_hand(attn, rows, cols, num_relay):
    """Bias ``(heads, N, N)`` of a window, looked up pair by pair; 0 for relay tokens."""
    if hasattr(attn, "logit_scale"):
        table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).flatten(0, 2))
    else:
        table = attn.relative_position_bias_table
    places = [(y, x) for y in range(rows) for x in range(cols)]
    bias = torch.zeros(attn.num_heads, len(places) + num_relay, len(places) + num_relay)
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            bias[:, i, j] = table[(y - v + rows - 1) * (2 * cols - 1) + x - u + cols - 1]
    return bias


def block_by_hand(block, image, relay):
    """A block of a Swin Transformer on one image ``(H, W, C)``, window by window."""
    height, width, channels = image.shape
    (rows, cols), (down, right) = block.window_size, block.shift_size
    is_v2 = hasattr(block.attn, "logit_scale")
    norm = (lambda t: t) if is_v2 else block.norm1
    bias = bias_by_hand(block.attn, rows, cols, len(relay))
    tall, wide = -(-height // rows) * rows, -(-width // cols) * cols
    padded = torch.zeros(tall, wide, channels)
    padded[:height, :width] = norm(image).roll((-down, -right), (0, 1))
    result, relays = torch.zeros_like(padded), []
    for top in range(0, tall, rows):
        for left in range(0, wide, cols):
            window = padded[top : top + rows, left : left + cols].flatten(0, 1)
            # tokens that the shift brought together from opposite borders do not see each other
            apart = [
                ((top + y >= tall - down) if down else False, (left + x >= wide - right) if right else False)
                for y in range(rows)
                for x in range(cols)
            ]
            hidden = torch.tensor([[-100.0 * (a != b) for b in apart] for a in apart])
            seen = bias.clone()
            seen[:, : len(apart), : len(apart)] += hidden
            out = attention_by_hand(block.attn, torch.cat([window, norm(relay)]), seen)
            result[top : top + rows, left : left + cols] = out[: len(apart)].unflatten(0, (rows, cols))
            relays.append(out[len(apart) :])
    attended = torch.cat([result[:height, :width].roll((down, right), (0, 1)).flatten(0, 1), sum(relays) / len(relays)])
    x = torch.cat([image.flatten(0, 1), relay])
    if is_v2:
        x = x + block.norm1(attended)
        x = x + block.norm2(block.mlp(x))
    else:
        x = x + attended
        x = x + block.mlp(block.norm2(x))
    return x[: height * width].unflatten(0, (height, width)), x[height * width :]


@pytest.mark.parametrize("index", [0, 1])  # plain windows, shifted windows
@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "swin_tiny_patch4_window7_224"])
def test_relay_tokens_join_every_window_and_are_averaged(name, index):
    model = build(name, relay_tokens=3, size=(24, 40), timm_options=SWIN | {"window_size": 4}, shaken=True)
    backbone, img = model.backbone, views(model)
    block = backbone.timm.layers[0].blocks[index]
    assert any(block.shift_size) == (index == 1)
    with torch.no_grad():
        stream = backbone.enter(0, backbone.embed(img[:, 0], 0))
        relay = torch.randn(2, 3, 16)
        after, updated = backbone.run(0, index, stream, relay)
        for sample in range(2):
            tokens, tokens_relay = block_by_hand(block, stream.tokens[sample], relay[sample])
            torch.testing.assert_close(after.tokens[sample], tokens, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(updated[sample], tokens_relay, rtol=1e-4, atol=1e-5)


def test_rates_of_stochastic_depth_reach_the_blocks():
    first, *others = build(drop_path=0.3).backbone.timm.blocks
    assert isinstance(first.drop_path1, torch.nn.Identity)
    assert [block.drop_path1.drop_prob for block in others] == pytest.approx([0.15, 0.3])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "swinv2_tiny_window8_256"])
def test_half_precision_gives_nearly_the_same_loss(name):
    model = build(name, shaken=True)
    img = views(model)
    batch = {
        "img": img,
        "bbox": naive_boxes((1, 4), model.config.size).expand(2, -1, -1, -1),
        "label": (img[:, 0, 0] > 0).long(),
    }
    loss, _ = model.training_loss(batch, SegmentationLoss())
    with torch.autocast("cpu", torch.bfloat16):
        rounded, logits = model.training_loss(batch, SegmentationLoss())
    assert logits.dtype == torch.bfloat16 and rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, loss, rtol=1e-2, atol=0)


RELEASED = {"class_token": False, "final_norm": False}
"""As the released code of Relay Tokens."""


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",  # a row of the position table for the class token
        "deit3_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",  # registers stay
        "vit_small_patch16_dinov3",  # rotary attention, registers
    ],
)
def test_without_class_token_and_final_norm_it_is_timms_model_built_without_them(name):
    model, (size, options) = build(name, levels=(1,), shaken=True, **RELEASED), FAMILIES[name]
    twin = timm.create_model(
        name, in_chans=2, img_size=size, num_classes=0, class_token=False, global_pool="avg", **options
    ).eval()
    twin.norm = twin.fc_norm = torch.nn.Identity()
    twin.load_state_dict(model.backbone.timm.state_dict())
    img = views(model)
    with torch.no_grad():
        tokens = twin.forward_features(img[:, 0])[:, twin.num_prefix_tokens :]
        expected = model.decoder.head(tokens.mT.unflatten(-1, model.backbone.grid))
        torch.testing.assert_close(model(img), expected)


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_tiny_patch16_224"])
def test_class_token_and_final_norm_are_left_out_of_folders_and_counts(name, tmp_path):
    kept, model = build(name, shaken=True), build(name, shaken=True, **RELEASED)
    rows = 1 if name.startswith("deit3") else 3  # the token, and its row in the table of either branch
    num_kept, num_left = (sum(p.numel() for p in m.parameters()) for m in (kept, model))
    assert num_kept - num_left == (rows + 2) * model.backbone.widths[0]
    model.save(tmp_path / "model")
    again = load_network(tmp_path / "model")
    img = views(model)
    with torch.no_grad():
        assert torch.equal(again(img), model(img))


def test_class_tokens_are_taken_out_of_pretrained_weights(tmp_path):
    name = "vit_tiny_patch16_224"
    source = timm.create_model(name, img_size=64, num_classes=0, **VIT)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    own = build(name, in_channels=3, pretrained=str(tmp_path / "weights.pth"), **RELEASED).backbone.timm.state_dict()
    state = source.state_dict()
    assert set(state) - set(own) == {"cls_token", "norm.weight", "norm.bias"}
    assert torch.equal(own["pos_embed"], state["pos_embed"][:, 1:])


@pytest.mark.parametrize(
    "name",
    ["swinv2_tiny_window8_256", "vit_base_patch16_siglip_224", "deit_tiny_distilled_patch16_224"],
)
def test_a_class_token_that_cannot_be_left_out_is_refused(name):
    with pytest.raises(InputError, match=f"class_token: expected true, .* got false for {name}"):
        build(name, class_token=False)
