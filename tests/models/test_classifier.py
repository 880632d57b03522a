import pytest
import torch

from muvit.errors import CheckpointError, InputError, ShapeError
from muvit.models.classifier import AttentionPool, Classifier, ClassifierConfig, mean_tokens
from muvit.models.encoder import EncoderConfig
from muvit.models.folder import load_settings
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.trained import load_network

ENCODER = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=1, heads=2)


def build(**fields):
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(**{"encoder": ENCODER, "num_classes": 3} | fields)).eval()


def sample(batch=2, ndim=2):
    torch.manual_seed(1)
    lower = torch.randint(0, 100, (batch, 2, ndim)).float()
    return torch.rand(batch, 2, 1, *(8,) * ndim), torch.stack(
        [lower, lower + torch.tensor([8.0, 32.0])[:, None]], dim=2
    )


def test_means_are_over_all_tokens_or_over_each_level():
    tokens = torch.randn(2, 6, 5)
    assert torch.allclose(mean_tokens(tokens, 2, "mean"), tokens.sum(1) / 6)
    of_levels = mean_tokens(tokens, 2, "levels")
    assert torch.allclose(of_levels, torch.cat([tokens[:, :3].mean(1), tokens[:, 3:].mean(1)], dim=1))


def test_attention_is_a_weighted_mean_that_prefers_what_scores_high():
    torch.manual_seed(0)
    pool, tokens = AttentionPool(8), torch.randn(3, 10, 8)
    weights = pool.weights(tokens)
    assert torch.allclose(weights.sum(1), torch.ones(3))
    assert torch.allclose(pool(tokens), (weights[..., None] * tokens).sum(1), atol=1e-6)
    assert (weights.argmax(1) == pool.score(tokens).squeeze(-1).argmax(1)).all()
    order = torch.randperm(10)
    assert torch.allclose(pool(tokens[:, order]), pool(tokens), atol=1e-6)


@pytest.mark.parametrize("pooling, width", [("mean", 16), ("levels", 32), ("attention", 16)])
def test_logits_come_from_pooled_tokens(pooling, width):
    model, (img, bbox) = build(pooling=pooling), sample()
    features = model.features(img, bbox)
    assert features.shape == (2, width)
    assert torch.allclose(model(img, bbox), model.head(model.norm(features)))
    tokens = model.encoder(img, bbox)[0]
    expected = model.pool(tokens) if pooling == "attention" else mean_tokens(tokens, 2, pooling)
    assert torch.allclose(features, expected)
    model(img, bbox).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_true_boxes_matter_and_naive_ones_do_not():
    img, bbox = sample()
    moved = bbox.clone()
    moved[:, 1] += 40
    assert not torch.allclose(build()(img, bbox), build()(img, moved))
    naive = build(boxes="naive")
    assert torch.equal(naive(img, bbox), naive(img, moved))


def test_volumes_are_classified_too():
    encoder = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=24, num_layers=1, heads=1, ndim=3)
    assert build(encoder=encoder)(*sample(ndim=3)).shape == (2, 3)


def test_a_folder_gives_the_same_classifier_back(tmp_path):
    model, (img, bbox) = build(pooling="attention"), sample()
    model.save(tmp_path / "model")
    again = Classifier.from_folder(tmp_path / "model").eval()
    assert again.config == model.config
    assert torch.equal(again(img, bbox), model(img, bbox))
    kind, settings = load_settings(tmp_path / "model")
    assert (kind, settings["pooling"]) == ("classifier", "attention")
    with pytest.raises(
        CheckpointError, match=r"expected a model of kind muvit or relay or unet or .*, got one of kind"
    ):
        load_network(tmp_path / "model", kind=SegmentationModel)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_classes": 1}, "num_classes: expected a whole number >= 2"),
        ({"num_classes": None}, "num_classes: expected a number of at least 2"),
        ({"pooling": "max"}, "pooling: expected mean or levels or attention, got 'max'"),
        ({"boxes": "none"}, "boxes: expected true or naive"),
        ({"encoder": EncoderConfig(in_channels=1, levels=(1,), patch_size=4, dim=32, heads=1, ndim=4)}, "2 or 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        build(**fields)


def test_images_of_another_shape_are_refused():
    img, bbox = sample()
    with pytest.raises(ShapeError, match="img: expected shape"):
        build()(img[:, :1], bbox[:, :1])
    assert ClassifierConfig(encoder=ENCODER).num_classes is None
