from dataclasses import asdict

import pytest
import torch
import yaml

from muvit.errors import CheckpointError, InputError, MuViTError, ShapeError
from muvit.geometry import naive_boxes
from muvit.labels import IGNORE
from muvit.losses import SegmentationLoss
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig

ENCODER = {
    "in_channels": 2,
    "levels": (1, 4),
    "patch_size": 4,
    "dim": 16,
    "num_layers": 2,
    "heads": 2,
    "rotary_base": 100,
}

QUERIES = {"decoder": "mask2former", "num_queries": 4, "query_heads": 2}
DECODERS = pytest.mark.parametrize("decoder", [{}, QUERIES], ids=["unetr", "mask2former"])


def tiny(encoder=(), **changes):
    torch.manual_seed(0)
    fields = {"num_classes": 3, "decoder_widths": (8, 8, 4), "stem_width": 4} | changes
    return Segmenter(SegmenterConfig(encoder=EncoderConfig(**ENCODER | dict(encoder)), **fields)).eval()


def draw(num_levels=2, space=(16, 16), seed=1):
    generator = torch.Generator().manual_seed(seed)
    img = torch.randn(2, num_levels, 2, *space, generator=generator)
    lower = torch.randint(-20, 1, (2, num_levels, len(space)), generator=generator).float()
    extent = torch.tensor(space) * torch.tensor([4.0**i for i in range(num_levels)])[:, None]
    return img, torch.stack([lower, lower + extent], dim=-2)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "decoder, levels, published, ours",
    [
        ("unetr", (1,), 31.66e6, 31_667_276),
        ("unetr", (1, 8, 32), 35.02e6, 35_018_828),
        ("mask2former", (1,), 33.44e6, 33_443_884),
        ("mask2former", (1, 8, 32), 36.80e6, 36_795_436),
    ],
)
def test_the_paper_segmenter_has_its_number_of_parameters(decoder, levels, published, ours):
    model = Segmenter(
        SegmenterConfig(encoder=EncoderConfig(in_channels=1, levels=levels), num_classes=12, decoder=decoder)
    )
    assert count(model) == ours
    assert count(model) == pytest.approx(published, rel=0.002)


def test_slim_decoders_have_few_channels_at_the_pixels_and_in_the_stem():
    def sizes(**changes):
        model = tiny({"patch_size": 8, "num_layers": 3}, stem_width=None, **changes)
        return model.config.widths, model.trunk.stem[0][0].out_channels

    assert sizes(decoder_widths="slim") == ((256, 256, 128, 64), 32)
    assert sizes(decoder_widths="paper") == ((256,) * 4, 64)
    assert sizes(decoder_widths=(8, 8, 4, 4)) == ((8, 8, 4, 4), 64)


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
    encoded = model.encode(img, bbox)
    coarse = model.head(model.trunk(model.adapters[1]([m[:, 1] for m in encoded.maps]), img[:, 1]))
    torch.testing.assert_close(logits[:, 1], coarse)
    torch.testing.assert_close(logits[:, 0], model.label_logits(img, bbox))


def test_masks_of_queries_are_refined_to_classes():
    model, (img, bbox) = tiny(**QUERIES), draw()
    encoded = model.encode(img, bbox)
    last = model.encoder(img, bbox)[0]
    # every level projects its own tokens as it does for its deepest skip
    weights = [(adapter.skips[0].weight[..., 0, 0], adapter.skips[0].bias) for adapter in model.adapters]
    context = [tokens @ w.T + b for tokens, (w, b) in zip(last.split(16, dim=1), weights, strict=True)]
    embeddings = model.query_decoder(torch.cat(context, dim=1), encoded.positions)
    features = model.trunk(model.adapters[0]([m[:, 0] for m in encoded.maps]), img[:, 0])
    masks = torch.stack([(e[..., None, None] * features).sum(1) for e in embeddings.unbind(1)], dim=1)
    expected = (model.head.weight[:, :, 0, 0] @ masks.flatten(2)).unflatten(2, (16, 16)) + model.head.bias[
        :, None, None
    ]
    torch.testing.assert_close(model(img, bbox), expected, rtol=1e-4, atol=1e-5)


def test_encoded_positions_are_those_of_the_tokens():
    model, (img, bbox) = tiny(), draw()
    encoded = model.encode(img, bbox)
    assert [tuple(m.shape) for m in encoded.maps] == [(2, 2, 16, 4, 4)] * 2
    places, _ = model.encoder.place(img, bbox)
    torch.testing.assert_close(encoded.positions - encoded.positions[:, :1], places - places[:, :1])


def test_queries_see_the_place_of_the_context_through_their_keys_alone():
    img, bbox = draw()
    moved = bbox.clone()
    moved[:, 1] += 12
    for rotates in (True, False):  # an encoder without positions leaves them to the keys
        model = tiny({"rotary_mode": "none"}, **QUERIES, mask_key_rope=rotates)
        assert torch.allclose(model(img, moved), model(img, bbox), atol=1e-4) is not rotates


@pytest.mark.parametrize("changes", [{}, {"mask_key_rope": False}])
def test_naive_boxes_hold_for_queries_too(changes):
    model, (img, bbox) = tiny(boxes="naive", **QUERIES, **changes), draw()
    moved = bbox.clone()
    moved[:, 1] += 12
    assert torch.equal(model(img, moved), model(img, bbox))
    centred = naive_boxes((1, 4), (16, 16)).expand(2, -1, -1, -1)
    # the origin does not count, only how the views lie to each other
    torch.testing.assert_close(tiny(**QUERIES, **changes)(img, 7 + centred), model(img), rtol=0, atol=1e-4)


@DECODERS
def test_samples_of_a_batch_do_not_see_each_other(decoder):
    model, (img, bbox) = tiny(decode="all", **decoder), draw()
    logits = model(img, bbox)
    torch.testing.assert_close(model(img.flip(0), bbox.flip(0)), logits.flip(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(model(img[1:], bbox[1:]), logits[1:], rtol=0, atol=1e-5)


@DECODERS
@pytest.mark.parametrize("decode", ["finest", "all"])
@pytest.mark.parametrize("levels", [(1,), (1, 4), (1, 4, 16)])
def test_what_trains_gets_a_gradient_and_the_rest_gets_none(decoder, decode, levels):
    model, (img, bbox) = tiny({"levels": levels}, decode=decode, **decoder).train(), draw(len(levels))
    model(img, bbox).square().mean().backward()
    # batch normalisation hides the bias before it, but for rounding
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    # coarse views that are not decoded are read as context of the queries, or not at all
    context = {"skips.0.weight", "skips.0.bias"} if decoder else set()
    for adapter in model.adapters[1:]:
        wanted = {n for n, _ in adapter.named_parameters()} if decode == "all" else context
        assert {n for n, p in adapter.named_parameters() if p.requires_grad} == wanted


def labels_of_all_views(seed=2):
    labels = torch.randint(0, 3, (2, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    labels[0, 1, :5] = IGNORE
    return labels


@DECODERS
def test_deep_supervision_adds_the_mean_loss_of_the_coarse_views(decoder):
    model = tiny({"levels": (1, 4, 16)}, decode="all", deep_supervision=0.3, **decoder)
    (img, bbox), labels, criterion = draw(3), labels_of_all_views(), SegmentationLoss()
    batch = {"img": img, "bbox": bbox, "label": labels[:, 0], "labels": labels}
    loss, logits = model.training_loss(batch, criterion)
    finest, middle, coarse = (criterion(model(img, bbox)[:, i], labels[:, i]) for i in range(3))
    torch.testing.assert_close(loss, finest + 0.3 * (middle + coarse) / 2)
    torch.testing.assert_close(logits, model.label_logits(img, bbox))


@pytest.mark.parametrize("changes", [{"decode": "finest"}, {"decode": "all", "encoder": {"levels": (1,)}}])
def test_without_coarse_logits_the_loss_is_that_of_the_finest_view(changes):
    model = tiny(**changes)
    (img, bbox), label = draw(len(model.config.encoder.levels)), labels_of_all_views()[:, 0]
    loss, logits = model.training_loss({"img": img, "bbox": bbox, "label": label}, SegmentationLoss())
    assert torch.equal(logits, model.label_logits(img, bbox))
    assert torch.equal(loss, SegmentationLoss()(logits, label))


def test_deep_supervision_needs_labels_of_all_views():
    (img, bbox), label = draw(), labels_of_all_views()[:, 0]
    with pytest.raises(InputError, match=r"labels: expected those of every view.*Set data\.label_levels to all"):
        tiny(decode="all").training_loss({"img": img, "bbox": bbox, "label": label}, SegmentationLoss())


@DECODERS
def test_a_volume_with_flat_patches_is_segmented_by_the_same_code(decoder):
    model = tiny({"ndim": 3, "patch_size": (1, 4, 4), "dim": 24}, decoder_widths=(16, 8, 4), **decoder)
    img, bbox = draw(space=(3, 8, 8))
    logits = model(img, bbox)
    assert logits.shape == (2, 3, 3, 8, 8)
    for axis in range(3):
        moved = bbox.clone()
        moved[:, 1, :, axis] += 10
        assert not torch.allclose(model(img, moved), logits, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"boxes": "naive", "decode": "all", "decoder_widths": "slim", "stem_width": None},
        QUERIES | {"query_layers": 1, "deep_supervision": 1.0},
        QUERIES | {"mask_key_rope": False},
    ],
)
def test_a_saved_segmenter_comes_back_equal(tmp_path, changes):
    model, (img, bbox) = tiny(**changes), draw()
    model.train()(img, bbox)  # gives batch normalisation some statistics to keep
    model.eval().save(tmp_path / "model")
    back = Segmenter.from_folder(tmp_path / "model").eval()
    assert asdict(back.config) == asdict(model.config)
    assert torch.equal(back(img, bbox), model(img, bbox))
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_folder_from_before_there_was_a_choice_of_decoders_still_loads(tmp_path):
    model, (img, bbox) = tiny(decoder_widths="paper"), draw()
    model.save(tmp_path / "model")
    file = tmp_path / "model" / "config.yaml"
    known = ("encoder", "num_classes", "boxes", "decode", "decoder_widths", "stem_width")
    config = {name: value for name, value in yaml.safe_load(file.read_text()).items() if name in known}
    assert "kind" not in config
    config["encoder"]["input_space"] = "real"
    file.write_text(yaml.safe_dump(config | {"decoder_widths": None}))
    back = Segmenter.from_folder(tmp_path / "model").eval()
    assert back.config == model.config
    assert torch.equal(back(img, bbox), model(img, bbox))


def test_the_folder_of_another_model_is_refused(tmp_path):
    tiny().encoder.save(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match="expected a model of kind muvit, got one of kind encoder"):
        Segmenter.from_folder(tmp_path / "encoder")


@DECODERS
def test_training_steps_lower_the_loss(decoder):
    model, (img, bbox) = tiny(**decoder).train(), draw()
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
        {"decoder": "fcn"},
        {"decoder_widths": "wide"},
        {"deep_supervision": 0.0},
        {"deep_supervision": float("nan")},
        QUERIES | {"num_queries": 2},
        QUERIES | {"query_layers": 0},
        QUERIES | {"query_heads": 3},
        QUERIES | {"query_heads": 4},
    ],
)
def test_settings_that_do_not_fit_are_refused(changes):
    with pytest.raises(MuViTError):
        tiny(**changes)


def test_only_the_decoder_with_queries_asks_for_enough_of_them():
    assert tiny(num_classes=5, num_queries=4).num_classes == 5
    with pytest.raises(InputError, match="num_queries: expected at least one for each of the 5 classes, got 4"):
        tiny(num_classes=5, **QUERIES)


def test_images_of_another_shape_are_refused():
    img, bbox = draw()
    with pytest.raises(ShapeError, match="img: expected shape"):
        tiny()(img[:, :1], bbox[:, :1])
    with pytest.raises(ShapeError, match="bbox: expected shape"):
        tiny()(img, bbox[:, :1])


def test_lists_of_widths_become_tuples():
    config = SegmenterConfig(encoder=EncoderConfig(**ENCODER), num_classes=2, decoder_widths=[4, 4, 4])
    assert config.decoder_widths == (4, 4, 4)
    with pytest.raises(InputError, match=r"encoder: expected EncoderConfig, got \{"):
        SegmenterConfig(encoder=ENCODER, num_classes=2)
