"""The transformers of HIPT over patches and over regions."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import gelu

from muvit.errors import CheckpointError, InputError, ShapeError
from muvit.models.hierarchy import RegionConfig, RegionEncoder
from muvit.models.trained import load_network

TINY = RegionConfig(
    in_channels=1,
    grid=2,
    patch_size=8,
    token_size=4,
    dim=16,
    num_layers=1,
    heads=2,
    region_dim=8,
    region_layers=1,
    region_heads=2,
)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    encoder = RegionEncoder(TINY).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


@torch.no_grad()
def test_a_region_is_the_transformer_over_the_class_tokens_of_its_patches(encoder):
    img = torch.randn(2, 1, 1, 16, 16)
    corners = [(0, 0), (0, 8), (8, 0), (8, 8)]
    vectors = torch.stack([encoder.patch(img[:, 0, :, y : y + 8, x : x + 8]) for y, x in corners], dim=1)
    vit = encoder.region
    linear = vit.patch_embed[0]
    tokens = gelu(vectors @ linear.weight.mT + linear.bias)
    tokens = torch.cat([vit.cls_token.expand(2, -1, -1), tokens], dim=1) + vit.pos_embed
    expected = vit.norm(vit.blocks[0](tokens))[:, :1]
    (found,) = encoder(img)
    torch.testing.assert_close(found, expected)
    assert found.shape == (2, 1, 8)
    with pytest.raises(ShapeError, match=r"img: expected shape \(B, 1, 1, 16, 16\)"):
        encoder(img[..., :8])


def test_the_sizes_are_those_of_hipt():
    with torch.device("meta"):
        encoder = RegionEncoder(RegionConfig())
    patch, region = (sum(p.numel() for p in part.parameters()) for part in (encoder.patch, encoder.region))
    # ViT-S/16 with a table of 16 x 16 positions, and six blocks of width 192
    assert patch == 12 * (12 * 384**2 + 13 * 384) + 384 * 769 + 384 * 258 + 2 * 384
    assert region == 6 * (12 * 192**2 + 13 * 192) + 192 * 385 + 192 * 258 + 2 * 192


def test_weights_come_from_files_by_the_names_of_dino(encoder, tmp_path):
    wide = {"pos_embed": torch.randn(1, 10, 16)}
    patch = {f"module.backbone.{k}": v for k, v in (encoder.patch.state_dict() | wide).items()}
    save_file(patch | {"module.head.mlp.0.weight": torch.zeros(3, 3)}, tmp_path / "patch.safetensors")
    region = {k.replace("patch_embed.0.", "phi.0."): v for k, v in encoder.region.state_dict().items()}
    torch.save({"state_dict": region}, tmp_path / "region.pth")
    found = RegionEncoder.from_files(tmp_path / "patch.safetensors", tmp_path / "region.pth", TINY)
    assert not found.training
    own, given = found.state_dict(), encoder.state_dict()
    assert all(torch.equal(own[name], given[name]) for name in given if name != "patch.pos_embed")
    assert torch.equal(own["patch.pos_embed"][:, 0], wide["pos_embed"][:, 0])  # of the class token
    found.save(tmp_path / "model")
    img = torch.randn(1, 1, 1, 16, 16)
    assert torch.equal(load_network(tmp_path / "model").eval()(img)[0], found(img)[0])
    with pytest.raises(CheckpointError, match=r"region\.pth: expected weights of VisionTransformer"):
        RegionEncoder.from_files(tmp_path / "region.pth", tmp_path / "region.pth", TINY)


def test_there_is_one_level(encoder):
    assert encoder.extract_levels([1]) is encoder
    with pytest.raises(InputError, match="the one that a region encoder has"):
        encoder.extract_levels([1, 8])
    with pytest.raises(InputError, match="patch_size: expected a multiple of 16"):
        RegionConfig(patch_size=200)
