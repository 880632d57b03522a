import pytest
import torch
from torch.nn.functional import avg_pool2d

from muvit.errors import CheckpointError, InputError, ShapeError
from muvit.geometry import naive_boxes
from muvit.models.encoder import EncoderConfig, MuViTEncoder
from muvit.models.layers.patch import patchify
from muvit.models.mae import MAEConfig, MuViTMAE
from muvit.models.masking import TokenMask, draw_mask

ENCODER = {"in_channels": 2, "levels": (1, 4), "patch_size": 4, "dim": 32, "num_layers": 2, "heads": 2}


def tiny(ndim=2, encoder=None, **changes):
    torch.manual_seed(0)
    config = EncoderConfig(**ENCODER | {"ndim": ndim} | (encoder or {}))
    return MuViTMAE(MAEConfig(encoder=config, **{"dim_decoder": 16} | changes)).eval()


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
    model = MuViTMAE(MAEConfig(encoder=EncoderConfig(in_channels=1, levels=levels)))
    assert sum(p.numel() for p in model.parameters()) == expected


def test_the_defaults_are_the_papers():
    config = MAEConfig(encoder=EncoderConfig(in_channels=1, levels=(1,)))
    assert (config.dim_decoder, config.num_layers_decoder, config.decoder_mode) == (256, 2, "multi")
    assert (config.masking_ratio, config.masking_mode, config.loss) == (0.75, "dirichlet", "mse")
    assert (config.decoder_context, config.loss_average, config.share_masking_draw) == ("visible", "level", False)


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
    result = tiny(loss="norm_mse", loss_average="token")(img, bbox, mask=mask)
    patches = patchify(img, (4, 4)).flatten(1, 2)
    mean, std = patches.mean(-1, keepdim=True), patches.var(-1, unbiased=True, keepdim=True).sqrt()
    target = (patches - mean) / (std + 0.01)
    error = ((result["output"] - target) ** 2).mean(-1)
    torch.testing.assert_close(result["loss"], error[mask.is_masked].mean())


def test_the_laplacian_loss_squares_the_means_of_patches_and_takes_the_rest_absolutely(sample):
    img, bbox, mask = sample
    result = tiny(loss="laplacian", loss_average="token")(img, bbox, mask=mask)
    views = tiny().to_views((result["output"] - patchify(img, (4, 4)).flatten(1, 2)), (16, 16)).flatten(0, 1)
    low = avg_pool2d(views, 4)  # of each patch and channel
    high = views - low.repeat_interleave(4, 2).repeat_interleave(4, 3)
    error = low.square().mean(1) + avg_pool2d(high.abs(), 4).mean(1)
    hidden = mask.is_masked.reshape(4, 4, 4)
    torch.testing.assert_close(result["loss"], error[hidden].mean())


def test_constant_views_have_a_finite_normalised_loss(sample):
    _, bbox, mask = sample
    model = tiny(loss="norm_mse")
    result = model(torch.full((2, 2, 2, 16, 16), 0.3), bbox, mask=mask)
    result["loss"].backward()
    assert result["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("loss", ["mse", "norm_mse", "laplacian"])
def test_restored_patches_keep_what_is_visible(sample, loss):
    img, bbox, mask = sample
    model = tiny(loss=loss)
    result = model(img, bbox, mask=mask)
    restored = model.restored_patches(result["output"], result["input"], mask)
    hidden = mask.is_masked
    assert torch.equal(restored[~hidden], result["input"][~hidden])
    mean, scale = result["input"].mean(-1, keepdim=True), result["input"].std(-1, keepdim=True) + 0.01
    expected = result["output"] if loss != "norm_mse" else result["output"] * scale + mean
    assert torch.equal(restored[hidden], expected[hidden])
    views = model.to_views(result["input"], img.shape[3:])
    assert torch.equal(views, img)


@pytest.mark.parametrize("mode, sees_others", [("multi", True), ("multi_iso", False), ("single", True)])
def test_decoder_modes_differ_in_what_a_level_sees(sample, mode, sees_others):
    img, bbox, mask = sample
    model = tiny(decoder_mode=mode, encoder={"attention_mode": "same"})  # the encoder must not mix the levels
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
    model = tiny(encoder={"attention_mode": attention})
    everything = TokenMask(torch.arange(32).expand(2, -1), 32)
    tokens = model.encoder.embed(model.encoder.patches(img))
    _, positions = model.encoder.place(img, bbox)
    encoded = model.encode_visible(tokens, positions, everything)
    torch.testing.assert_close(encoded, model.encoder(img, bbox)[0], atol=1e-5, rtol=1e-5)


def test_copies_would_show_masked_patches_and_are_refused():
    with pytest.raises(InputError, match=r"encoder\.coarse_copies: expected none, got 'under'"):
        tiny(encoder={"attention_mode": "coarse_to_fine", "coarse_copies": "under"})


@pytest.mark.parametrize("context", ["visible", "all"])
def test_fixed_positions_tell_masked_tokens_apart(sample, context):
    img, bbox, mask = sample
    without = {"rotary_mode": "none"}
    blank = tiny(encoder=without, decoder_context=context)(img, bbox, mask=mask)["output"][0, mask.masked[0]]
    model = tiny(encoder=without | {"fixed_positions": "grid"}, decoder_context=context)
    found = model(img, bbox, mask=mask)["output"][0, mask.masked[0]]
    of_first = mask.masked[0] < 16
    assert (blank[of_first] - blank[of_first][:1]).abs().max() < 1e-5
    assert (found[of_first][1:] - found[of_first][:1]).abs().amax(1).min() > 1e-3
    # whatever the order of the visible tokens, each has its own place
    shuffled = TokenMask(torch.cat([mask.visible.flip(1), mask.masked], 1), mask.num_visible)
    assert torch.allclose(model(img, bbox, mask=shuffled)["output"][0, mask.masked[0]], found, atol=1e-5)
    fixed = model.fixed_positions(model.encoder.offsets(img, bbox))
    assert fixed.shape == (2, 32, 16) and "fixed_positions.freq" not in model.state_dict()


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
    model = tiny(ndim, encoder={"patch_size": patch}, decoder_mode=mode)
    img, bbox = torch.rand(2, 2, 2, *space), boxes(space)
    result = model(img, bbox)
    assert torch.equal(model.to_views(result["input"], space), img)
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
    img, model = sample[0], tiny()
    first, again, other = (model.draw_mask(2, (16, 16), torch.Generator().manual_seed(s)).is_masked for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(5)
    loss = model(img)["loss"]
    torch.manual_seed(5)
    assert torch.equal(model(img, mask=model.draw_mask(2, (16, 16)))["loss"], loss)


def test_masking_modes_reach_the_mask():
    def hidden(**changes):
        mask = tiny(**changes).draw_mask(8, (16, 16), torch.Generator().manual_seed(0))
        return mask.is_masked.unflatten(1, (2, 16)).float().mean(2)

    assert hidden(masking_mode=(0.0, 1.0)).mean(0).tolist() == [1.0, 0.5]
    assert hidden(masking_ratio=0.5).mean() == 0.5
    shared, own = (hidden(masking_ratio=0.5, share_masking_draw=shares) for shares in (True, False))
    assert shared[:, 0].std() < own[:, 0].std()


def test_the_decoders_follow_the_encoder():
    encoder = {"heads": 4, "rotary_mode": "shared", "rotary_base": 50, "dropout": 0.1}
    for dim, expected in ((64, 64), (None, 32)):
        model = tiny(3, {**encoder, "dim": 32}, dim_decoder=dim, decoder_mode="single", num_layers_decoder=1)
        decoder = model.decoder[0].config
        assert (decoder.in_channels, decoder.dim, decoder.num_layers, decoder.ndim) == (32, expected, 1, 3)
        assert (decoder.heads, decoder.rotary_mode, decoder.rotary_base, decoder.dropout) == (4, "shared", 50, 0.1)


def test_models_come_back_from_their_folder(tmp_path, sample):
    img, bbox, mask = sample
    model = tiny(masking_mode=(1.0, 2.0), encoder={"patch_size": (4, 4)}, decoder_context="all")
    model.save(tmp_path / "mae")
    again = MuViTMAE.from_folder(tmp_path / "mae").eval()
    assert again.config == model.config
    assert torch.equal(again(img, bbox, mask=mask)["loss"], model(img, bbox, mask=mask)["loss"])
    with pytest.raises(CheckpointError, match="expected a model of kind encoder, got one of kind mae"):
        MuViTEncoder.from_folder(tmp_path / "mae")


@pytest.mark.parametrize(
    "wrong",
    [
        {"masking_ratio": 0},
        {"masking_ratio": 1},
        {"decoder_mode": "two"},
        {"loss": "mae"},
        {"loss_average": "sample"},
        {"decoder_context": "none"},
        {"num_layers_decoder": 0},
        {"dim_decoder": 0},
        {"masking_mode": "some"},
        {"masking_mode": (1.0, -1.0)},
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
