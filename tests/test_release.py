"""The names of release 0.1.0, with their flat arguments and documented results."""

import pytest
import torch

from muvit.decoders import MuViTDecoder2d, MuViTDecoder3d, MuViTDecoder4d
from muvit.encoders import MuViTEncoder2d, MuViTEncoder3d, MuViTEncoder4d
from muvit.errors import CheckpointError, InputError
from muvit.mae import MuViTMAE2d, MuViTMAE3d, MuViTMAE4d
from muvit.models.encoder import EncoderConfig, MuViTEncoder
from muvit.models.layers.patch import patchify
from muvit.models.mae import DecoderConfig, MAEConfig, MuViTDecoder, MuViTMAE
from muvit.models.masking import draw_mask

TINY = {"in_channels": 2, "levels": (1, 4), "patch_size": 4, "dim": 32, "num_layers": 2, "heads": 2}
PERIODS = {"rotary_base": (8.0, 128.0)}
DECODER = {"in_channels": 24, "dim": 32, "num_layers": 2, "heads": 2}


def tiny(**changes):
    torch.manual_seed(0)
    return MuViTMAE2d(**TINY | {"dim_decoder": 16} | changes).eval()


@pytest.fixture(scope="module")
def sample():
    torch.manual_seed(1)
    lower = torch.tensor([[[0.0, 0], [-8, -8]], [[100, 100], [92, 92]]])
    bbox = torch.stack([lower, lower + torch.tensor([16.0, 64])[None, :, None]], dim=2)
    mask = draw_mask(2, 2, 16, generator=torch.Generator().manual_seed(2))
    return torch.rand(2, 2, 2, 16, 16), bbox, mask


@pytest.mark.parametrize(
    "kind, base, config, fields",
    [
        (MuViTEncoder2d, MuViTEncoder, EncoderConfig(**TINY), TINY),
        (MuViTEncoder3d, MuViTEncoder, EncoderConfig(**TINY, ndim=3), TINY),
        (MuViTEncoder4d, MuViTEncoder, EncoderConfig(**TINY, ndim=4), TINY),
        (MuViTMAE2d, MuViTMAE, MAEConfig(encoder=EncoderConfig(**TINY)), TINY),
        (MuViTMAE2d, MuViTMAE, MAEConfig(encoder=EncoderConfig(**TINY, **PERIODS)), TINY | PERIODS),
        (MuViTMAE3d, MuViTMAE, MAEConfig(encoder=EncoderConfig(**TINY, ndim=3)), TINY),
        (MuViTMAE4d, MuViTMAE, MAEConfig(encoder=EncoderConfig(**TINY, ndim=4)), TINY),
        (MuViTDecoder2d, MuViTDecoder, DecoderConfig(**DECODER), DECODER),
        (MuViTDecoder3d, MuViTDecoder, DecoderConfig(**DECODER, ndim=3), DECODER),
        (MuViTDecoder4d, MuViTDecoder, DecoderConfig(**DECODER, ndim=4), DECODER),
    ],
)
def test_flat_arguments_build_the_same_model_and_folder(tmp_path, kind, base, config, fields):
    torch.manual_seed(0)
    model = kind(**fields).eval()
    torch.manual_seed(0)
    expected = base(config).eval()
    assert isinstance(model, base)
    assert model.config == config
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    model.save(tmp_path / "flat")
    expected.save(tmp_path / "nested")
    texts = [(tmp_path / name / "config.yaml").read_text() for name in ("flat", "nested")]
    assert texts[0] == texts[1]
    again = kind.from_folder(tmp_path / "nested")
    assert type(again) is kind
    assert again._config == model._config
    assert fields.items() <= model._config.items()


@pytest.mark.parametrize("two, three", [(MuViTEncoder2d, MuViTEncoder3d), (MuViTMAE2d, MuViTMAE3d)])
def test_another_dimensionality_is_refused(tmp_path, two, three):
    two(**TINY).save(tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"expected a 3D model for {three.__name__}, got a 2D model"):
        three.from_folder(tmp_path / "model")


def test_what_there_never_was_a_choice_of_is_refused():
    for kind in (MuViTEncoder2d, MuViTMAE2d):
        assert kind(**TINY, input_space="real").config == kind(**TINY).config
        with pytest.raises(InputError, match="input_space: expected real, got 'fourier'"):
            kind(**TINY, input_space="fourier")
    assert MuViTDecoder2d(**DECODER, attention_mode="all").config == DecoderConfig(**DECODER)
    with pytest.raises(InputError, match="decoder attention_mode: expected 'all', got 'same'"):
        MuViTDecoder2d(**DECODER, attention_mode="same")


def test_results_are_those_of_the_model_and_views_if_asked_for(sample):
    img, bbox, mask = sample
    model = tiny()
    result = model(img, bbox, mask=mask)
    assert set(result) == {"input", "output", "loss", "loss_per_level"}
    whole = model(img, bbox, return_all=True, mask=mask)
    assert set(whole) - set(result) == {"encoded", "decoded", "reco", "input_masked", "mask"}
    assert all(torch.equal(whole[name], value) for name, value in result.items())
    hidden = whole["mask"]
    assert hidden.dtype == torch.bool
    assert hidden.shape == whole["reco"].shape == whole["input_masked"].shape == img.shape
    assert torch.equal(patchify(hidden, (4, 4)).flatten(1, 2).all(-1), mask.is_masked)
    assert torch.equal(whole["reco"][~hidden], img[~hidden])
    assert torch.equal(whole["input_masked"][~hidden], img[~hidden])
    assert (whole["input_masked"][hidden] == 0.5).all()
    output = whole["output"].unflatten(1, (2, 16))
    assert torch.equal(patchify(whole["reco"], (4, 4))[patchify(hidden, (4, 4))], output[patchify(hidden, (4, 4))])
    assert torch.equal(model.patch_token_to_image(whole["input"], *img.shape[2:]), img)


def test_eps_is_added_to_the_deviation(sample):
    img, bbox, mask = sample
    result = tiny(loss="norm_mse")(img, bbox, return_all=True, mask=mask, eps=0.5)
    patches = patchify(img, (4, 4)).flatten(1, 2)
    mean, std = patches.mean(-1, keepdim=True), patches.std(-1, keepdim=True)
    expected = torch.where(mask.is_masked[..., None], result["output"] * (std + 0.5) + mean, patches)
    torch.testing.assert_close(patchify(result["reco"], (4, 4)).flatten(1, 2), expected)


def test_a_generator_decides_the_mask(sample):
    img, bbox, _ = sample
    model = tiny()
    first, again, other = (
        model(img, bbox, return_all=True, rng_generator=torch.Generator().manual_seed(s))["mask"] for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_numbers_may_be_the_masked_share_of_each_level(sample):
    img, bbox, _ = sample
    result = tiny(masking_mode=(0.5, 0.25))(img, bbox, return_all=True, masking_mode_is_ratio=True)
    assert result["mask"].float().mean((0, 2, 3, 4)).tolist() == [0.5, 0.25]


def test_consistent_levels_mask_alike_in_models_of_other_levels(sample):
    img, bbox, _ = sample
    both, coarse = tiny(), tiny(levels=(4,))
    masks = [
        model(x, b, return_all=True, consistent_levels=True, rng_generator=torch.Generator().manual_seed(3))["mask"]
        for model, x, b in ((both, img, bbox), (coarse, img[:, 1:], bbox[:, 1:]))
    ]
    assert torch.equal(masks[0][:, 1:], masks[1])


@pytest.mark.parametrize("mode", ["multi", "multi_iso", "single"])
def test_levels_are_extracted_with_what_belongs_to_them(mode):
    model = tiny(levels=(1, 4, 16), decoder_mode=mode)
    part = model.extract_levels((16, 1))
    assert part.levels == part.encoder.levels == (16, 1)
    assert torch.equal(part.encoder.level_embed, model.encoder.level_embed[[2, 0]])
    if mode != "single":
        assert torch.equal(part.mask_token, model.mask_token[:, [2, 0]])
        assert torch.equal(part.decoder[0].proj[0].weight, model.decoder[2].proj[0].weight)
    assert part(torch.rand(1, 2, 2, 8, 8))["loss"].isfinite()
    with torch.no_grad():
        part.final.bias += 1
    assert not torch.equal(part.final.bias, model.final.bias)
    assert model.extract_levels((1, 4, 16), copy=False) is model
    assert model.extract_levels((1, 4, 16)) is not model
    with pytest.raises(InputError, match="Level 2 not found"):
        model.extract_levels((1, 2))
