from dataclasses import asdict

import pytest
import torch

from muvit.encoders import EncoderConfig
from muvit.errors import CheckpointError, InputError, MuViTError, ShapeError
from muvit.losses import SegmentationLoss
from muvit.segmentation import Segmenter, SegmenterConfig

ENCODER = {
    "in_channels": 2,
    "levels": (1, 4),
    "patch_size": 4,
    "dim": 16,
    "num_layers": 2,
    "heads": 2,
    "rotary_base": 100,
}


def tiny(encoder=(), **changes):
    torch.manual_seed(0)
    fields = {"num_classes": 3, "decoder_widths": (8, 8, 4), "stem_width": 4} | changes
    return Segmenter(encoder=EncoderConfig(**ENCODER | dict(encoder)), **fields).eval()


def draw(num_levels=2, space=(16, 16), seed=1):
    generator = torch.Generator().manual_seed(seed)
    img = torch.randn(2, num_levels, 2, *space, generator=generator)
    lower = torch.randint(-20, 1, (2, num_levels, len(space)), generator=generator).float()
    extent = torch.tensor(space) * torch.tensor([4.0**i for i in range(num_levels)])[:, None]
    return img, torch.stack([lower, lower + extent], dim=-2)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("levels, published, ours", [((1,), 31.66e6, 31_667_276), ((1, 8, 32), 35.02e6, 35_018_828)])
def test_the_paper_segmenter_has_its_number_of_parameters(levels, published, ours):
    model = Segmenter(encoder=EncoderConfig(in_channels=1, levels=levels), num_classes=12)
    assert count(model) == ours
    assert count(model) == pytest.approx(published, rel=0.002)


def test_logits_have_the_shape_of_the_finest_view():
    img, bbox = draw(space=(16, 24))
    assert tiny()(img, bbox).shape == (2, 3, 16, 24)


def test_the_forward_pass_is_encoder_adapter_trunk_and_head():
    model, (img, bbox) = tiny(), draw()
    _, _, _, kept = model.encoder(img, bbox, return_intermediate_idxs=(0, 1))
    # finest level: the first 16 of 32 tokens, on a 4 x 4 grid; the deepest block first
    first, last = (tokens[:, :16].mT.unflatten(-1, (4, 4)) for tokens in kept)
    expected = model.head(model.trunk(model.adapters[0]([last, first]), img[:, 0]))
    torch.testing.assert_close(model(img, bbox), expected)


def test_logits_depend_on_the_pixels_of_the_context():
    model, (img, bbox) = tiny(), draw()
    other = img.clone()
    other[:, 1] = other[:, 1].flip(-1)
    assert not torch.allclose(model(other, bbox), model(img, bbox), atol=1e-3)


def test_logits_depend_on_the_place_of_the_context():
    model, (img, bbox) = tiny(), draw()
    moved = bbox.clone()
    moved[:, 1] += 12
    assert not torch.allclose(model(img, moved), model(img, bbox), atol=1e-3)
    shift = torch.tensor([300_000.0, 5.0])
    torch.testing.assert_close(model(img, bbox + shift), model(img, bbox), rtol=0, atol=1e-4)


def test_the_naive_control_sees_pixels_but_no_boxes():
    model, (img, bbox) = tiny(boxes="naive"), draw()
    moved = bbox.clone()
    moved[:, 1] += 12
    assert torch.equal(model(img, moved), model(img, bbox))
    assert torch.equal(model(img, bbox), model(img))
    assert torch.equal(model(img), tiny()(img))
    assert not torch.allclose(model(img, bbox), tiny()(img, bbox), atol=1e-3)


def test_decoding_all_levels_adds_the_logits_of_the_coarse_ones():
    model, (img, bbox) = tiny(decode="all"), draw()
    logits = model(img, bbox)
    assert logits.shape == (2, 2, 3, 16, 16)
    torch.testing.assert_close(logits[:, 0], tiny()(img, bbox))
    maps = model.encode(img, bbox)
    coarse = model.head(model.trunk(model.adapters[1]([m[:, 1] for m in maps]), img[:, 1]))
    torch.testing.assert_close(logits[:, 1], coarse)


@pytest.mark.parametrize("decode", ["finest", "all"])
def test_adapters_that_are_not_decoded_rest(decode):
    model, (img, bbox) = tiny(decode=decode).train(), draw()
    model(img, bbox).square().mean().backward()
    coarse = list(model.adapters[1].named_parameters())
    if decode == "finest":
        assert all(not p.requires_grad and p.grad is None for _, p in coarse)
    # batch normalisation hides the bias before it, but for rounding
    trained = [(n, p) for n, p in model.named_parameters() if not n.startswith("adapters.1") or decode == "all"]
    assert [n for n, p in trained if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_volume_with_flat_patches_is_segmented_by_the_same_code():
    model = tiny({"ndim": 3, "patch_size": (1, 4, 4), "dim": 24}, decoder_widths=(8, 8, 4))
    img, bbox = draw(space=(3, 8, 8))
    logits = model(img, bbox)
    assert logits.shape == (2, 3, 3, 8, 8)
    for axis in range(3):
        moved = bbox.clone()
        moved[:, 1, :, axis] += 12
        assert not torch.allclose(model(img, moved), logits, atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"boxes": "naive", "decode": "all", "decoder_widths": None}])
def test_a_saved_segmenter_comes_back_equal(tmp_path, changes):
    model, (img, bbox) = tiny(**changes), draw()
    model.train()(img, bbox)  # gives batch normalisation some statistics to keep
    model.eval().save(tmp_path / "model")
    back = Segmenter.from_folder(tmp_path / "model").eval()
    assert asdict(back.config) == asdict(model.config)
    assert torch.equal(back(img, bbox), model(img, bbox))
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]


def test_the_folder_of_another_model_is_refused(tmp_path):
    tiny().encoder.save(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match="expected settings of Segmenter"):
        Segmenter.from_folder(tmp_path / "encoder")


def test_training_steps_lower_the_loss():
    model, (img, bbox) = tiny().train(), draw()
    truth = (img[:, 0].sum(1) > 0).long()
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-2), SegmentationLoss()
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        values.append(loss(model(img, bbox), truth))
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 1},
        {"boxes": "wrong"},
        {"decode": "coarsest"},
        {"decoder_widths": (8, 8)},
        {"stem_width": 0},
        {"encoder": {"patch_size": 6}},
        {"encoder": {"ndim": 4, "dim": 32}},
        {"encoder": {"num_layers": 1}},
    ],
)
def test_settings_that_do_not_fit_are_refused(changes):
    with pytest.raises(MuViTError):
        tiny(**changes)


def test_images_of_another_shape_are_refused():
    img, bbox = draw()
    with pytest.raises(ShapeError, match="img: expected shape"):
        tiny()(img[:, :1], bbox[:, :1])
    with pytest.raises(ShapeError, match="bbox: expected shape"):
        tiny()(img, bbox[:, :1])


def test_a_configuration_may_hold_the_encoder_as_plain_data():
    config = SegmenterConfig(encoder=dict(ENCODER), num_classes=2, decoder_widths=[4, 4, 4])
    assert config.encoder == EncoderConfig(**ENCODER)
    assert config.decoder_widths == (4, 4, 4)
    with pytest.raises(InputError, match="levels"):
        SegmenterConfig(encoder=dict(ENCODER) | {"levels": []}, num_classes=2)
