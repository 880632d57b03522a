"""Every model on a GPU that is not there: tensors that have a device and a shape, but no numbers.

An operation between devices raises, as does whatever needs a number on the host (`item`, ``if``, ``nonzero``); copies
for which the host would wait are refused by `NoWaiting`. So forward passes and losses show without a GPU that they run
on one, and that nothing in them waits for it. Backward passes are not run: autograd asks the driver for a device.
"""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from muvit.data.crops.placement import Window
from muvit.encoders import MuViTEncoder2d, MuViTEncoder3d, MuViTEncoder4d
from muvit.inference.run.context import ContextCaching
from muvit.losses import SegmentationLoss
from muvit.mae import MuViTMAE2d
from muvit.models.baselines import Baseline, BaselineConfig
from muvit.models.classifier import Classifier, ClassifierConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.relay import RelayConfig, RelaySegmenter
from muvit.models.segmenter import Segmenter, SegmenterConfig

ENCODER = {"in_channels": 1, "levels": (1, 4), "patch_size": 4, "num_layers": 2, "dim": 16, "heads": 2}
SEGMENTER = {"num_classes": 3, "decoder_widths": (8, 4, 4), "stem_width": 4}
QUERIES = {"decoder": "mask2former", "num_queries": 3, "query_heads": 1}
RELAY = {"in_channels": 1, "num_classes": 3, "levels": (1, 4), "size": (32, 32)}
VIT = {
    "backbone": "vit_tiny_patch16_224",
    "timm_options": {"patch_size": 8, "depth": 3, "embed_dim": 16, "num_heads": 2},
}
SWIN = {
    "backbone": "swinv2_tiny_window8_256",
    "timm_options": {"depths": (2, 2), "embed_dim": 16, "num_heads": (2, 4), "window_size": 4},
}


class NoWaiting(TorchDispatchMode):
    """Refuses copies that the host waits for: all from the device, and those to it that do not say they need not."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = args[0].device.type if args and isinstance(args[0], torch.Tensor) else None
        result = operation(*args, **kwargs)
        name = operation.overloadpacket.__name__
        if name == "_to_copy":
            check_copy(before, result.device.type, kwargs.get("non_blocking"))
        elif name == "copy_":
            check_copy(args[1].device.type, before, kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        return result


def check_copy(source, target, is_asynchronous):
    if source != target and not (target == "cuda" and is_asynchronous):
        raise RuntimeError(f"the host waits for a copy from {source} to {target}")


@contextmanager
def on_fake_gpu(model):
    """The model on the device that is not there; what is computed inside follows its rules."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        model._apply(lambda t: t if isinstance(t, FakeTensor) else mode.from_tensor(t).to("cuda"))
        with NoWaiting():
            yield model


def views(*space, levels=2, batch=2):
    shapes = ((batch, levels, 1, *space), (batch, levels, 2, len(space)))
    return tuple(torch.empty(shape, device="cuda") for shape in shapes)


def check_output(loss, model):
    assert loss.device.type == "cuda"
    assert loss.requires_grad


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: t.tolist(),
        lambda t: bool((t > 0).all()),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.cpu(),
        lambda t: torch.zeros(3).to(t.device),
        lambda t: torch.zeros(3).copy_(t),
        lambda t: t + torch.ones(3),
    ],
)
def test_what_waits_or_mixes_devices_is_found(wait):
    with on_fake_gpu(torch.nn.Linear(3, 3)) as model, pytest.raises(Exception, match=r"aten|device|copy|Dynamic"):
        wait(model.bias)


@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("mode", ["all", "causal", "same", "random", "coarse_to_fine"])
def test_encoders(mode, boxes):
    for build, space in ((MuViTEncoder2d, (8, 8)), (MuViTEncoder3d, (4, 8, 8)), (MuViTEncoder4d, (4, 4, 4, 4))):
        with on_fake_gpu(build(**ENCODER | {"dim": 32}, attention_mode=mode)) as model:
            img, bbox = views(*space)
            tokens, coords, level, kept = model(img, bbox if boxes else None, return_intermediate_idxs=(0,))
            assert {t.device.type for t in (tokens, coords, level, *kept)} == {"cuda"}
            check_output(tokens.sum(), model)


@pytest.mark.parametrize("rotary", [{"rotary_mode": "none"}, {"rotary_mode": "fixed"}, {"rotary_param": "base"}])
def test_rotary_embeddings(rotary):
    with on_fake_gpu(MuViTEncoder2d(**ENCODER | rotary)) as model:
        check_output(model(*views(8, 8))[0].sum(), model)


MAES = {
    "multi": {},
    "multi_iso": {"decoder_mode": "multi_iso"},
    "single": {"decoder_mode": "single"},
    "release": {"decoder_context": "all", "loss_average": "token", "share_masking_draw": True},
    "random": {"masking_mode": "random"},
    "weights": {"masking_mode": (1.0, 2.0)},
    "norm_mse": {"loss": "norm_mse", "attention_mode": "coarse_to_fine"},
}


@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("name", MAES)
def test_masked_autoencoders(name, boxes):
    with on_fake_gpu(MuViTMAE2d(**ENCODER, dim_decoder=16, **MAES[name])) as model:
        img, bbox = views(16, 16)
        result = model(img, bbox if boxes else None, return_all=True)
        check_output(result["loss"], model)


def test_shares_masked_of_each_level():
    with on_fake_gpu(MuViTMAE2d(**ENCODER, dim_decoder=16, masking_mode=(0.5, 0.8))) as model:
        check_output(model(*views(16, 16), masking_mode_is_ratio=True)["loss"], model)


def train(model, *space, levels=2, loss=None):
    """One training step but for the optimiser, and the logits of an evaluation."""
    loss = loss or SegmentationLoss(class_weights=(1.0, 2.0, 1.0))
    with on_fake_gpu(torch.nn.ModuleList([model, loss])):
        img, bbox = views(*space, levels=levels)
        labels = torch.empty(2, levels, *space, dtype=torch.int64, device="cuda")
        batch = {"img": img, "bbox": bbox, "label": labels[:, 0], "labels": labels}
        total, logits = model.train().training_loss(batch, loss)
        assert logits.shape == (2, 3, *space)
        check_output(total, model)
        with torch.no_grad():
            assert model.eval().label_logits(img, bbox).device.type == "cuda"
            assert model.label_logits(img).device.type == "cuda"


SEGMENTERS = {
    "unetr": {},
    "unetr, all levels": {"decode": "all"},
    "unetr, naive boxes": {"boxes": "naive"},
    "mask2former": QUERIES,
    "mask2former, all levels": QUERIES | {"decode": "all", "mask_key_rope": False},
}


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters(name):
    train(Segmenter(SegmenterConfig(encoder=EncoderConfig(**ENCODER), **SEGMENTER | SEGMENTERS[name])), 8, 8)


def test_segmenters_of_volumes():
    train(Segmenter(SegmenterConfig(encoder=EncoderConfig(**ENCODER | {"ndim": 3, "dim": 32}), **SEGMENTER)), 4, 8, 8)


RELAYS = {
    "vit": VIT,
    "vit, mean": VIT | {"update": "mean", "share_patch_embed": True},
    "vit, decision": VIT | {"fusion": "decision"},
    "vit, full targets": VIT | {"context_target": "full"},
    "vit, unetr": VIT | {"decoder": "unetr", "decoder_widths": (8, 8, 4, 4)},
    "swin": SWIN,
    "swin, mask2former": SWIN | {"decoder": "mask2former", "decoder_widths": (32, 8, 4, 4), "num_queries": 3},
}


@pytest.mark.parametrize("name", RELAYS)
def test_relay_tokens(name):
    train(RelaySegmenter(RelayConfig(**RELAY | RELAYS[name])), 32, 32)


BASELINES = {
    "unet": {"network": "unet", "encoder_name": "resnet18"},
    "deeplabv3": {"network": "deeplabv3", "encoder_name": "resnet18"},
    "segformer": {"network": "segformer", "encoder_name": "mit_b0"},
    "residual_unet": {"network": "residual_unet", "width": 2},
    "swinunetr": {"network": "swinunetr", "width": 12},
    "unetr": {"network": "unetr", "width": 2, "encoder_name": "vit_tiny", "size": (64, 64)},
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(name):
    task = {"in_channels": 1, "num_classes": 3, "levels": (1, 4), "views": "stacked"}
    train(Baseline(BaselineConfig(**task, **BASELINES[name])), 64, 64)


@pytest.mark.parametrize("pooling", ["mean", "levels", "attention"])
def test_classifiers(pooling):
    config = ClassifierConfig(encoder=EncoderConfig(**ENCODER), num_classes=3, pooling=pooling)
    with on_fake_gpu(Classifier(config)) as model:
        classes = torch.empty(2, dtype=torch.int64, device="cuda")
        check_output(torch.nn.functional.cross_entropy(model(*views(8, 8)), classes), model)


@pytest.mark.parametrize("settings", [{}, QUERIES, {"boxes": "naive"}])
def test_cached_contexts(settings):
    encoder = EncoderConfig(**ENCODER | {"levels": (1, 4, 16), "attention_mode": "coarse_to_fine"})
    with (
        on_fake_gpu(Segmenter(SegmenterConfig(encoder=encoder, **SEGMENTER | settings)).eval()) as model,
        torch.no_grad(),
    ):
        img, bbox = views(8, 8, levels=3)
        windows = [[Window(1, (i, 0), (8, 8)), Window(4, (0, 0), (8, 8)), Window(16, (0, 0), (8, 8))] for i in range(2)]
        logits = ContextCaching(model).label_logits(img, bbox, windows)
        assert logits.device.type == "cuda"
        assert logits.shape == (2, 3, 8, 8)
