import pytest
import torch

from muvit.errors import CheckpointError, InputError, ShapeError
from muvit.geometry import naive_boxes
from muvit.models.layers.patch import patchify
from muvit.models.mae import MAEConfig, MuViTMAE, MuViTMAE2d, MuViTMAE3d, MuViTMAE4d, build_mae
from muvit.models.masking import TokenMask, draw_mask

CLASSES = {2: MuViTMAE2d, 3: MuViTMAE3d, 4: MuViTMAE4d}
TINY = {
    "in_channels": 2,
    "levels": (1, 4),
    "patch_size": 4,
    "dim": 32,
    "num_layers": 2,
    "heads": 2,
    "dim_decoder": 16,
}


def tiny(ndim=2, **changes):
    torch.manual_seed(0)
    return CLASSES[ndim](**TINY | changes).eval()


def boxes(space, levels=(1, 4), batch=2):
    """Each sample's crops at another place, coarse ones off centre."""
    lower = torch.tensor([[[100.0 * b - 8 * i] * len(space) for i in range(len(levels))] for b in range(batch)])
    extent = torch.stack([torch.tensor(space) * level for level in levels]).float()
    return torch.stack([lower, lower + extent], dim=-2)


@pytest.fixture(scope="module")
def sample():
    torch.manual_seed(1)
    mask = draw_mask(2, 2, 16, generator=torch.Generator().manual_seed(2))
    return torch.rand(2, 2, 2, 16, 16), boxes((16, 16)), mask


def change(img, mask, level, *, masked):
    """Images with other pixels in the masked (or visible) patches of one level."""
    hidden = mask.is_masked.unflatten(1, (2, 4, 4)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    chosen = hidden[:, level] if masked else ~hidden[:, level]
    assert chosen.any()
    other = img.clone()
    other[:, level] += chosen[:, None]
    return other


@pytest.mark.parametrize("levels, expected", [((1,), 26_445_024), ((1, 8, 32), 28_883_744)])
def test_the_papers_models_have_their_number_of_parameters(levels, expected):
    assert sum(p.numel() for p in MuViTMAE2d(levels=levels).parameters()) == expected


def test_the_defaults_are_the_papers():
    config = MAEConfig()
    assert (config.patch, config.dim, config.num_layers, config.heads) == ((8, 8), 512, 12, 8)
    assert (config.dim_decoder, config.num_layers_decoder, config.decoder_mode) == (256, 2, "multi")
    assert (config.masking_ratio, config.masking_mode, config.loss) == (0.75, "dirichlet", "mse")
    assert (config.decoder_context, config.loss_average, config.patch_spacing) == ("visible", "level", "center")


def test_what_is_masked_reaches_the_loss_only(sample):
    img, bbox, mask = sample
    model = tiny()
    before = model(img, bbox, mask=mask)
    for level in (0, 1):
        after = model(change(img, mask, level, masked=True), bbox, mask=mask)
        assert torch.equal(after["output"], before["output"])
        assert after["loss"] != before["loss"]
        seen = model(change(img, mask, level, masked=False), bbox, mask=mask)
        assert not torch.allclose(seen["output"], before["output"])


def test_the_loss_is_the_mean_over_levels_of_their_masked_patches(sample):
    img, bbox, mask = sample
    result = tiny()(img, bbox, mask=mask)
    error = ((result["output"] - patchify(img, (4, 4)).flatten(1, 2)) ** 2).mean(-1)
    hidden = mask.is_masked
    per_level = [error[:, s][hidden[:, s]].mean() for s in (slice(0, 16), slice(16, 32))]
    torch.testing.assert_close(result["loss_per_level"], torch.stack(per_level))
    torch.testing.assert_close(result["loss"], sum(per_level) / 2)
    pooled = tiny(loss_average="token")(img, bbox, mask=mask)
    torch.testing.assert_close(pooled["loss"], error[hidden].mean())
    assert abs(pooled["loss"] - result["loss"]) > 1e-6
    torch.testing.assert_close(pooled["loss_per_level"], result["loss_per_level"])


def test_a_level_without_masked_tokens_does_not_count(sample):
    img, bbox, _ = sample
    order = torch.arange(32).expand(2, -1)
    model = tiny()
    result = model(img, bbox, mask=TokenMask(order, 20))  # all of the first level is visible
    assert result["loss_per_level"].isnan().tolist() == [True, False]
    torch.testing.assert_close(result["loss"], result["loss_per_level"][1])
    result["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_normalised_targets_use_the_unbiased_deviation(sample):
    img, bbox, mask = sample
    result = tiny(loss="norm_mse", loss_average="token")(img, bbox, mask=mask, return_all=True)
    patches = patchify(img, (4, 4)).flatten(1, 2)
    mean, std = patches.mean(-1, keepdim=True), patches.var(-1, unbiased=True, keepdim=True).sqrt()
    target = (patches - mean) / (std + 0.01)
    error = ((result["output"] - target) ** 2).mean(-1)
    torch.testing.assert_close(result["loss"], error[mask.is_masked].mean())
    shown = patchify(result["reco"], (4, 4)).flatten(1, 2)
    expected = torch.where(mask.is_masked[..., None], result["output"] * (std + 0.01) + mean, patches)
    torch.testing.assert_close(shown, expected)


def test_constant_views_have_a_finite_normalised_loss(sample):
    _, bbox, mask = sample
    model = tiny(loss="norm_mse")
    result = model(torch.full((2, 2, 2, 16, 16), 0.3), bbox, mask=mask)
    result["loss"].backward()
    assert result["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_pictures_keep_what_is_visible(sample):
    img, bbox, mask = sample
    result = tiny()(img, bbox, mask=mask, return_all=True)
    hidden = result["mask"]
    assert hidden.dtype == torch.bool
    assert hidden.shape == result["reco"].shape == result["input_masked"].shape == img.shape
    assert torch.equal(hidden.float().mean((0, 1, 2)), hidden[:, :, 0].float().mean((0, 1)))
    assert hidden.float().mean() == 0.75
    assert torch.equal(result["reco"][~hidden], img[~hidden])
    assert torch.equal(result["input_masked"][~hidden], img[~hidden])
    assert (result["input_masked"][hidden] == 0.5).all()
    output = result["output"].unflatten(1, (2, 16))
    assert torch.equal(patchify(result["reco"], (4, 4))[patchify(hidden, (4, 4))], output[patchify(hidden, (4, 4))])


@pytest.mark.parametrize("mode, sees_others", [("multi", True), ("multi_iso", False), ("single", True)])
def test_decoder_modes_differ_in_what_a_level_sees(sample, mode, sees_others):
    img, bbox, mask = sample
    model = tiny(decoder_mode=mode, attention_mode="same")  # the encoder must not mix the levels
    before = model(img, bbox, mask=mask)["output"][:, :16]
    after = model(change(img, mask, 1, masked=False), bbox, mask=mask)["output"][:, :16]
    assert ((after - before).abs().max() > 1e-5) == sees_others
    assert len(model.decoder) == model.mask_token.shape[1] == (1 if mode == "single" else 2)


def test_the_context_is_what_is_visible_or_everything(sample):
    img, bbox, mask = sample
    for context, sees_masks in (("visible", False), ("all", True)):
        model = tiny(decoder_context=context)
        before = model(img, bbox, mask=mask)["output"][:, :16]
        with torch.no_grad():
            model.mask_token[:, 1] += 1
        after = model(img, bbox, mask=mask)["output"][:, :16]
        assert ((after - before).abs().max() > 1e-5) == sees_masks


def test_the_order_of_a_mask_is_of_no_matter(sample):
    img, bbox, mask = sample
    shuffled = TokenMask(torch.cat([mask.visible.flip(1), mask.masked.flip(1)], 1), mask.num_visible)
    model = tiny()
    for a, b in ((model(img, bbox, mask=m)["output"] for m in (mask, shuffled)),):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["all", "causal", "same", "coarse_to_fine"])
def test_with_everything_visible_the_encoder_is_the_encoder(sample, attention):
    img, bbox, _ = sample
    model = tiny(attention_mode=attention)
    everything = TokenMask(torch.arange(32).expand(2, -1), 32)
    tokens, positions = model.encoder.embed(img)[0].flatten(1, 2), model.encoder.token_positions(img, bbox)
    encoded = model.encode_visible(tokens, positions, everything)
    torch.testing.assert_close(encoded, model.encoder(img, bbox)[0], atol=1e-5, rtol=1e-5)


def test_translation_changes_nothing_and_boxes_do(sample):
    img, bbox, mask = sample
    model = tiny()
    here = model(img, bbox, mask=mask)["output"]
    far = model(img, bbox.double() + 1e6, mask=mask)["output"]
    torch.testing.assert_close(far, here, atol=1e-6, rtol=1e-6)
    naive = model(img, None, mask=mask)["output"]
    assert (naive - here).abs().max() > 1e-4
    same = model(img, naive_boxes((1, 4), (16, 16)).expand(2, -1, -1, -1), mask=mask)["output"]
    torch.testing.assert_close(naive, same, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ndim, space", [(2, (8, 16)), (3, (4, 8, 16)), (4, (2, 4, 8, 8))])
@pytest.mark.parametrize("mode", ["multi", "single"])
def test_any_number_of_axes(ndim, space, mode):
    patch = (2, 4, 4, 4)[-ndim:]
    model = tiny(ndim, patch_size=patch, decoder_mode=mode)
    img, bbox = torch.rand(2, 2, 2, *space), boxes(space)
    result = model(img, bbox, return_all=True, rng_generator=torch.Generator().manual_seed(0))
    assert result["reco"].shape == img.shape
    assert torch.equal(model.patch_token_to_image(result["input"], *img.shape[2:]), img)
    num_tokens = result["input"].shape[1]
    assert result["encoded"].shape == (2, int(0.25 * num_tokens), 32)
    assert result["decoded"].shape == (2, num_tokens, 16)


def test_gradients_reach_every_parameter(sample):
    img, bbox, mask = sample
    for changes in ({}, {"decoder_mode": "multi_iso"}, {"decoder_mode": "single"}, {"decoder_context": "all"}):
        model = tiny(**changes).train()
        model(img, bbox, mask=mask)["loss"].backward()
        resting = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert resting == []


def test_a_generator_decides_the_mask(sample):
    img, bbox, _ = sample
    model = tiny()
    first, again, other = (
        model(img, bbox, return_all=True, rng_generator=torch.Generator().manual_seed(s))["mask"] for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_masking_modes_reach_the_mask(sample):
    img, bbox, _ = sample
    weights = tiny(masking_mode=(0.0, 1.0))(img, bbox, return_all=True)["mask"].float().mean((0, 2, 3, 4))
    assert weights.tolist() == [1.0, 0.5]
    ratios = tiny(masking_mode=(0.5, 0.25))(img, bbox, return_all=True, masking_mode_is_ratio=True)["mask"]
    assert ratios.float().mean((0, 2, 3, 4)).tolist() == [0.5, 0.25]
    shared = tiny(share_masking_draw=True, masking_ratio=0.5)
    img8 = img.repeat(4, 1, 1, 1, 1)
    spread = [
        model(img8, return_all=True, rng_generator=torch.Generator().manual_seed(0))["mask"].float().mean((2, 3, 4))
        for model in (shared, tiny(masking_ratio=0.5))
    ]
    assert spread[0][:, 0].std() < spread[1][:, 0].std()


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


def test_models_come_back_from_their_folder(tmp_path, sample):
    img, bbox, mask = sample
    model = tiny(masking_mode=(1.0, 2.0), patch_size=(4, 4), decoder_context="all")
    model.save(tmp_path / "mae")
    again = MuViTMAE2d.from_folder(tmp_path / "mae").eval()
    assert again.config == model.config
    assert torch.equal(again(img, bbox, mask=mask)["loss"], model(img, bbox, mask=mask)["loss"])
    with pytest.raises(CheckpointError, match="3D"):
        MuViTMAE3d.from_folder(tmp_path / "mae")


def test_a_config_builds_its_model():
    model = build_mae(MAEConfig(**TINY, ndim=3))
    assert isinstance(model, MuViTMAE3d)
    assert model.config == MAEConfig(**TINY, ndim=3)
    with pytest.raises(InputError, match="ndim"):
        build_mae(MAEConfig(**TINY, ndim=5))
    with pytest.raises(TypeError, match="MuViTMAE2d"):
        MuViTMAE(**TINY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"masking_ratio": 0},
        {"masking_ratio": 1},
        {"decoder_mode": "two"},
        {"loss": "mae"},
        {"loss_average": "sample"},
        {"decoder_context": "none"},
        {"levels": ()},
        {"patch_size": (4, 4, 4)},
        {"rotary_mode": "learned"},
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        tiny(**wrong)


def test_batches_of_the_wrong_shape_are_refused(sample):
    img, bbox, _ = sample
    model = tiny()
    for wrong in (img[:, :1], img[:, :, :1], img[0]):
        with pytest.raises(ShapeError, match="img"):
            model(wrong, None)
    with pytest.raises(ShapeError, match="multiples of the patch"):
        model(img[..., :15], None)
    with pytest.raises(ShapeError, match="bbox"):
        model(img, bbox[:, :1])
