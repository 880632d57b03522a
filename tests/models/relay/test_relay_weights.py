"""Backbones by name, and the weights that they start from."""

import pickle

import pytest
import timm
import torch
from relay_models import FAMILIES, build
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from muvit.errors import CheckpointError, InputError
from muvit.models.folder import load_settings
from muvit.models.relay.config import RelayConfig
from muvit.models.relay.segmenter import RelaySegmenter


def published(name, seed=5, **changes):
    """timm's model with a classifier, as weights are published: 3 channels, the size that timm builds."""
    torch.manual_seed(seed)
    return timm.create_model(name, **FAMILIES[name][1] | {"num_classes": 7} | changes)


@pytest.mark.parametrize("name", FAMILIES)
def test_published_weights_load_strictly_and_completely(tmp_path, name):
    size = FAMILIES[name][0]
    source = published(name, img_size=size).state_dict()
    save_file(source, tmp_path / "weights.safetensors")
    model = build(name, in_channels=3, pretrained=str(tmp_path / "weights.safetensors"))
    own = model.backbone.timm.state_dict()
    classifier = ("head.", "head_dist.", "fc_norm.", "attn_pool.")
    assert set(own) == {key for key in source if not key.startswith(classifier)}
    assert all(torch.equal(tensor, source[key]) for key, tensor in own.items())
    for key, copy in model.backbone.own(1).items():
        assert torch.equal(copy, source[key.removeprefix("timm.")])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_dinov2"])
def test_another_size_resamples_the_table_of_positions_by_the_means_of_timm(tmp_path, name):
    source = published(name)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    model = build(name, in_channels=3, pretrained=str(tmp_path / "weights.pth"))
    own, wanted = model.backbone.timm.state_dict(), source.state_dict()
    assert {key for key in own if not torch.equal(own[key], wanted[key])} == {"pos_embed"}
    num_prefix = 0 if source.no_embed_class else source.num_prefix_tokens
    resampled = resample_abs_pos_embed(wanted["pos_embed"], list(model.backbone.grid), num_prefix_tokens=num_prefix)
    torch.testing.assert_close(own["pos_embed"], resampled)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224"])
def test_another_size_changes_nothing_where_positions_are_relative(tmp_path, name):
    source = published(name).state_dict()
    torch.save({"state_dict": source}, tmp_path / "weights.pth")
    own = build(name, in_channels=3, pretrained=str(tmp_path / "weights.pth")).backbone.timm.state_dict()
    assert all(torch.equal(tensor, source[key]) for key, tensor in own.items())


def test_another_number_of_channels_adapts_the_patch_embedding_alone(tmp_path):
    source = published("vit_tiny_patch16_224", img_size=64).state_dict()
    save_file(source, tmp_path / "weights.safetensors")
    model = build(in_channels=1, pretrained=str(tmp_path / "weights.safetensors"))
    own = model.backbone.timm.state_dict()
    summed = source["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(own["patch_embed.proj.weight"], summed)
    assert all(torch.equal(own[k], source[k]) for k in own if k != "patch_embed.proj.weight")


def test_weights_that_lack_something_or_have_too_much_are_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    source = published("vit_tiny_patch16_224").state_dict()
    save_file({k: v for k, v in source.items() if k != "blocks.1.attn.qkv.weight"}, file)
    with pytest.raises(CheckpointError, match=r"Missing key.*blocks\.1\.attn\.qkv\.weight"):
        build(pretrained=str(file))
    save_file(source | {"blocks.9.norm1.weight": torch.zeros(48)}, file)
    with pytest.raises(CheckpointError, match=r"weights of vit_tiny_patch16_224.*Unexpected key.*blocks\.9"):
        build(pretrained=str(file))
    save_file(published("deit3_small_patch16_224").state_dict(), file)
    with pytest.raises(CheckpointError, match="expected the weights of vit_tiny_patch16_224"):
        build(pretrained=str(file))


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_files_that_hold_no_tensors_are_refused_and_never_executed(tmp_path):
    contents = {
        "pickle.pth": pickle.dumps({"a": Malicious()}, protocol=2),
        "text.pth": b"weights",
        "text.safetensors": b"weights",
        "empty.pth": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"a": Malicious()}, tmp_path / "zip.pth")
    torch.save({"a": 3}, tmp_path / "number.pth")
    for name in (*contents, "zip.pth", "number.pth"):
        with pytest.raises(CheckpointError, match=f"{name}: expected tensors"):
            build(pretrained=str(tmp_path / name))
    with pytest.raises(CheckpointError, match="expected a file with the backbone's weights"):
        build(pretrained=str(tmp_path / "none.pth"))


def test_the_folder_of_a_model_needs_no_weights_from_elsewhere(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(published("vit_tiny_patch16_224").state_dict(), file)
    model = build(in_channels=3, pretrained=str(file))
    model.save(tmp_path / "model")
    file.unlink()
    assert load_settings(tmp_path / "model")[1]["pretrained"] is False
    back = RelaySegmenter.from_folder(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))


def test_timm_loads_what_it_publishes_with_its_own_classifier(monkeypatch):
    asked, source = {}, published("vit_tiny_patch16_224", img_size=(64, 64), in_chans=2)

    def create(name, **options):
        asked.update(options)
        return source

    monkeypatch.setattr(timm, "create_model", create)
    model = build(pretrained=True)
    # with as many classes as were published timm loads strictly
    assert asked["pretrained"] is True and "num_classes" not in asked
    assert not any(name.startswith("head") for name, _ in model.backbone.timm.named_parameters())


def named(backbone, **changes):
    return RelaySegmenter(
        RelayConfig(
            **{"backbone": backbone, "in_channels": 3, "num_classes": 2, "levels": (1, 4), "size": (64, 64)} | changes
        )
    )


@pytest.mark.parametrize(
    "backbone, changes, message",
    [
        ("vit_tiny_patch16_225", {}, r"backbone: expected the name .* Did you mean vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224.none", {}, r"backbone: expected the name .* Did you mean vit_tiny_patch16_224\.augreg"),
        ("vit", {}, "backbone: expected the name of a model of timm, got 'vit'"),
        ("resnet50", {}, "backbone: expected a Vision Transformer or Swin Transformer .* got resnet50"),
        ("pvt_v2_b0", {}, "whose blocks take tokens, got pvt_v2_b0"),
        ("vit_tiny_patch16_224", {"size": (64, 60)}, r"size: expected multiples of \(16, 16\).* got \(64, 60\)"),
        ("vit_tiny_patch16_224", {"size": (8, 8)}, r"size: expected multiples of \(16, 16\)"),
        ("vit_small_patch14_dinov2", {"size": (64, 64)}, r"size: expected multiples of \(14, 14\)"),
        ("swinv2_tiny_window8_256", {"size": (48, 64)}, r"size: expected multiples of \(32, 32\)"),
        (
            "vit_tiny_patch16_224",
            {"timm_options": {"deepness": 2}},
            "options that timm's model takes, got .*'deepness'",
        ),
        ("vit_tiny_patch16_224", {"timm_options": {"num_heads": 5}}, "options that timm's model takes, got dim should"),
        (
            "vit_small_patch14_dinov2",
            {"size": (56, 56), "decoder": "unetr"},
            "decoder unetr: expected a backbone whose patches are powers of two",
        ),
        (
            "vit_small_patch16_18x2_224",
            {"pretrained": True},
            "pretrained: expected weights that timm publishes for vit_small_patch16_18x2_224.* got No pretrained",
        ),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_in_one_sentence(backbone, changes, message):
    with torch.device("meta"), pytest.raises(InputError, match=message):
        named(backbone, **changes)


def test_without_timm_there_is_a_hint(monkeypatch):
    monkeypatch.setattr("muvit.errors.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"expected the package timm, .* pip install 'muvit\[relay\]'"):
        build()
