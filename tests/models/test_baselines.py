from dataclasses import asdict, replace

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from muvit.errors import CheckpointError, InputError, ShapeError
from muvit.losses import SegmentationLoss
from muvit.models.baselines import Baseline, BaselineConfig
from muvit.models.trained import load_network

SMALL = {
    "unet": {"encoder_name": "resnet18"},
    "deeplabv3": {"encoder_name": "resnet18"},
    "deeplabv3plus": {"encoder_name": "tu-convnext_atto"},
    "upernet": {"encoder_name": "tu-convnext_atto"},
    "fpn": {"encoder_name": "tu-pvt_v2_b0"},
    "segformer": {"encoder_name": "mit_b0"},
    "mask2former": {"encoder_name": "swin_nano", "width": 32},
    "residual_unet": {"width": 4},
    "swinunetr": {"width": 12},
    "unetr": {"encoder_name": "vit_tiny", "width": 8, "size": (64, 64)},
}


def small(network, **changes):
    torch.manual_seed(0)
    fields = {"in_channels": 2, "num_classes": 3, "levels": (1,)} | SMALL[network] | changes
    return Baseline(BaselineConfig(kind=network, **fields)).eval()


def draw(levels=1, space=(64, 64), batch=2, seed=1):
    return torch.randn(batch, levels, 2, *space, generator=torch.Generator().manual_seed(seed))


@pytest.mark.long
@pytest.mark.parametrize(
    "network, published",
    [
        ("unet", 24.4e6),
        ("deeplabv3", 39.6e6),
        ("deeplabv3plus", 26.7e6),
        ("upernet", 97.7e6),
        ("fpn", 15.4e6),
        ("segformer", 24.7e6),
        ("residual_unet", 1.6e6),
        ("swinunetr", 7.2e6),
        ("unetr", 87.3e6),
    ],
)
def test_by_default_a_network_has_the_size_that_its_library_publishes(network, published):
    standard = {"encoder_name": None, "width": None, "in_channels": 1, "num_classes": 2, "size": (256, 256)}
    model = small(network, **standard)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, abs=0.05e6)


@pytest.mark.parametrize("network", SMALL)
def test_every_trainable_parameter_gets_a_gradient(network):
    model = small(network).train()
    logits = model(draw())
    assert logits.shape == (2, 3, 64, 64)
    logits.square().mean().backward()
    # deformable attention begins with weights of 0, so that the level of a query plays no part in the first step
    late = ("pixel_level_module.decoder.level_embed",)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and not name.endswith(late)]
    assert [name for name, p in trained if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("network", SMALL)
def test_a_saved_baseline_comes_back_equal(tmp_path, network):
    model, img = small(network), draw(batch=1)
    model.train()(draw())  # gives batch normalisation some statistics to keep
    model.eval().save(tmp_path / "model")
    assert yaml.safe_load((tmp_path / "model" / "config.yaml").read_text())["kind"] == network
    back = load_network(tmp_path / "model").eval()
    assert isinstance(back, Baseline)
    assert asdict(back.config) == asdict(model.config)
    assert torch.equal(back(img), model(img))
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("network", SMALL)
def test_a_stacked_baseline_sees_every_view(network):
    model, img = small(network, levels=(1, 4, 16)), draw(levels=3)
    with torch.inference_mode():
        logits = model(img)
        for level in range(3):
            other = img.clone()
            other[:, level] = other[:, level].flip(-1)
            assert not torch.allclose(model(other), logits, atol=1e-4)


def test_stacked_views_are_the_channels_of_one_image():
    model, img = small("residual_unet", levels=(1, 4)), draw(levels=2)
    expected = model.network(torch.cat([img[:, 0], img[:, 1]], dim=1))
    assert torch.equal(model(img), expected)


def test_boxes_change_nothing():
    model, img = small("residual_unet"), draw()
    bbox = torch.tensor([[0.0, 0.0], [64.0, 64.0]]).expand(2, 1, 2, 2)
    assert torch.equal(model.label_logits(img, bbox), model(img))


@pytest.mark.parametrize("network, space", [("residual_unet", (16, 32, 16)), ("swinunetr", (32, 32, 64))])
def test_volumes_are_labelled_too(network, space):
    model = small(network, ndim=3)
    with torch.inference_mode():
        assert model(draw(space=space, batch=1)).shape == (1, 3, *space)


def test_unetr_labels_volumes_of_its_size_alone():
    model = small("unetr", ndim=3, size=(16, 32, 32))
    with torch.inference_mode():
        assert model(draw(space=(16, 32, 32))).shape == (2, 3, 16, 32, 32)
    with pytest.raises(InputError, match=r"img: expected \(16, 32, 32\), for which the model was built"):
        model(draw(space=(16, 32, 16)))


def test_an_encoder_of_timm_with_windows_is_built_for_one_size():
    fixed = small("upernet", encoder_name="tu-swin_tiny_patch4_window7_224", size=(32, 64))
    assert fixed.views.size == (32, 64)
    assert fixed(draw(space=(32, 64))).shape == (2, 3, 32, 64)
    with pytest.raises(InputError, match=r"img: expected \(32, 64\), for which the model was built"):
        fixed(draw())


def test_the_view_says_what_the_network_takes():
    views = small("segformer", size=(96, 96)).views
    assert (views.levels, views.in_channels, views.ndim) == ((1,), 2, 2)
    assert (views.multiple, views.size) == ((32, 32), None)
    assert small("deeplabv3")(draw(space=(40, 56))).shape == (2, 3, 40, 56)
    assert small("unet", num_classes=5).num_classes == 5


@pytest.mark.parametrize(
    "network, side", [("unet", 32), ("fpn", 32), ("deeplabv3", 64), ("deeplabv3plus", 64), ("upernet", 64)]
)
def test_one_value_cannot_be_normalised(network, side):
    model, img = small(network), draw(space=(side, side), batch=1)
    assert model(img).shape == (1, 3, side, side)
    with pytest.raises(InputError, match=f"batch_size: expected at least 2 to train {network}"):
        model.train()(img)
    assert model(torch.cat([img, img])).isfinite().all()


@pytest.mark.parametrize("network, side", [("residual_unet", 16), ("swinunetr", 32)])
def test_one_cell_cannot_be_normalised(network, side):
    model = small(network)
    with pytest.raises(InputError, match="more than one cell"):
        model(draw(space=(side, side)))
    assert model(draw(space=(side, 2 * side))).shape == (2, 3, side, 2 * side)


def test_training_steps_lower_the_loss():
    model, img = small("residual_unet").train(), draw()
    batch = {"img": img, "bbox": torch.zeros(2, 1, 2, 2), "label": (img[:, 0].sum(1) > 0).long()}
    optimizer, loss, values = torch.optim.AdamW(model.parameters(), lr=1e-2), SegmentationLoss(), []
    for _ in range(30):
        optimizer.zero_grad()
        values.append(model.training_loss(batch, loss)[0])
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.5 * values[0]


def test_published_weights_are_fetched_for_a_new_model_only(tmp_path, monkeypatch):
    import segmentation_models_pytorch as smp

    fetched = []

    def fetch(repo, filename, revision):
        fetched.append(filename)
        if filename.endswith("safetensors"):
            weights = smp.encoders.get_encoder("resnet18").state_dict()
            save_file({name: torch.full_like(value, 0.5) for name, value in weights.items()}, tmp_path / filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(smp.encoders, "hf_hub_download", fetch)
    model = small("unet", encoder_weights="imagenet")
    assert "model.safetensors" in fetched
    assert model.backbone is model.network.encoder
    assert torch.equal(model.backbone.layer1[0].bn1.weight, torch.full((64,), 0.5))
    assert small("unet").backbone is None
    fetched.clear()
    model.save(tmp_path / "model")
    back = load_network(tmp_path / "model")
    assert fetched == []
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))

    def offline(*args, **kwargs):
        raise OSError("no route to the host")

    monkeypatch.setattr(smp.encoders, "hf_hub_download", offline)
    with pytest.raises(InputError, match="a connection to fetch the weights imagenet of resnet18"):
        small("unet", encoder_weights="imagenet")


def test_published_weights_of_timm_are_fetched_for_a_new_model_only(tmp_path, monkeypatch):
    import timm.models._builder as builder

    fetched = []

    def fetch(model_id, filename=None, **kwargs):
        fetched.append(model_id)
        return {
            name: torch.full_like(value, 0.5) for name, value in timm.create_model("pvt_v2_b0").state_dict().items()
        }

    monkeypatch.setattr(builder, "load_state_dict_from_hf", fetch)
    model = small("fpn", in_channels=3, encoder_weights="timm")
    assert fetched == ["timm/pvt_v2_b0.in1k"]
    assert all((value == 0.5).all() for value in model.backbone.state_dict().values())
    model.save(tmp_path / "model")
    back = load_network(tmp_path / "model")
    assert len(fetched) == 1
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("muvit.errors.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'muvit\[baselines\]'"):
        small("unet")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "vgg"}, "kind: expected unet or deeplabv3 or"),
        ({"levels": (4, 1)}, "levels: expected different levels in ascending order"),
        ({"ndim": 3}, "kind: expected residual_unet, swinunetr or unetr for volumes"),
        ({"ndim": 4, "kind": "residual_unet"}, "ndim: expected a whole number >= 2 and <= 3"),
        ({"width": 16}, "width: expected none, as unet has no such choice"),
        ({"kind": "swinunetr", "encoder_name": "resnet18"}, "encoder_name: expected none"),
        ({"kind": "swinunetr", "width": 16}, "width: expected a multiple of 12"),
        ({"kind": "mask2former", "ndim": 3}, "kind: expected residual_unet, swinunetr or unetr for volumes"),
        ({"kind": "mask2former", "width": 16}, "width: expected a multiple of 32"),
        ({"kind": "mask2former", "encoder_name": "resnet18"}, "encoder_name: expected swin_nano or swin_tiny or"),
        ({"kind": "unetr", "encoder_weights": "imagenet"}, "encoder_weights: expected none"),
        ({"kind": "unetr", "encoder_name": "resnet18"}, "encoder_name: expected vit_tiny or vit_small or vit_base"),
        ({"num_classes": 1}, "num_classes: expected a whole number >= 2"),
        ({"in_channels": 0}, "in_channels: expected a whole number >= 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        BaselineConfig(**{"kind": "unet"} | changes)


@pytest.mark.parametrize(
    "network, changes, message",
    [
        ("unet", {"in_channels": None}, "in_channels: expected a value"),
        ("unet", {"encoder_name": "resnet17"}, "encoder_name: expected an encoder of segmentation-models-pytorch"),
        ("deeplabv3", {"encoder_name": "densenet121"}, "encoder_name: expected one that deeplabv3 can use"),
        ("deeplabv3plus", {"encoder_name": "tu-pvt_v2_b0"}, "encoder_name: expected one that deeplabv3plus can use"),
        ("upernet", {"encoder_name": "tu-vit_tiny_patch16_224", "size": (64, 64)}, "one that upernet can use.*pattern"),
        ("upernet", {"encoder_name": "tu-convnext"}, "encoder_name: expected tu- and the name of a model of timm"),
        ("upernet", {"encoder_name": "tu-convnext_atto.moon"}, "encoder_name: expected tu- and the name"),
        ("upernet", {"encoder_name": "tu-swin_tiny_patch4_window7_224"}, "size: expected a value, to build upernet"),
        ("unet", {"encoder_weights": "moon"}, "encoder_weights: expected imagenet.*published for resnet18"),
        ("fpn", {"encoder_weights": "imagenet"}, "encoder_weights: expected timm.*published for tu-pvt_v2_b0"),
        ("unet", {"size": (48, 64)}, r"size: expected multiples of \(32, 32\)"),
        ("unetr", {"size": None}, "size: expected a value, to build unetr"),
        ("unetr", {"size": (60, 64)}, r"size: expected multiples of \(16, 16\)"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(network, changes, message):
    with pytest.raises(InputError, match=message):
        small(network, **changes)


def test_a_recipe_fills_in_what_the_task_says():
    config = BaselineConfig(kind="unet", encoder_name="resnet18")
    filled = replace(config, in_channels=2, num_classes=3, levels=[1], size=[64, 64])
    assert (filled.levels, filled.size) == ((1,), (64, 64))
    assert Baseline(BaselineConfig(**asdict(filled)))(draw(batch=2)).shape == (2, 3, 64, 64)


def test_images_of_another_shape_are_refused():
    model = small("unet")
    with pytest.raises(ShapeError, match=r"img: expected shape \(B, 1, 2, y, x\), got \(2, 2, 2, 64, 64\)"):
        model(draw(levels=2))
    with pytest.raises(ShapeError):
        model(draw()[:, 0])
    with pytest.raises(InputError, match="img: expected multiples of"):
        model(draw(space=(48, 64)))


def test_the_folder_of_another_model_is_refused(tmp_path):
    small("residual_unet").save(tmp_path / "model")
    (tmp_path / "model" / "config.yaml").write_text("network: unet\nheads: 4\n")
    with pytest.raises(CheckpointError, match="expected settings of Baseline"):
        Baseline.from_folder(tmp_path / "model")
