"""Every model on an accelerator that is not there: tensors that have a device and a shape, but no numbers.

An operation between devices raises, as does whatever needs a number on the host (`item`, ``if``, ``nonzero``); copies
for which the host would wait are refused by `NoWaiting`. So losses and training steps show without a GPU that they run
on one, and that nothing in them waits for it.

Forward passes and steps of the optimizer run on ``cuda``. There autograd asks the driver for a thread of the device, so
backward passes run on ``lazy``, a kind of device that it serves from the thread of the host; that is the same code of
ours, but for the choice of fused steps. Not covered are kernels, mixed precision, Lightning's loop, the loaders' copies
and the masks of pre-training, as a generator of random numbers needs a device that is there.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from lightning import Trainer
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from muvit.data.crops.defects import Defects
from muvit.data.crops.placement import Window
from muvit.data.crops.stored import DTYPES, Look
from muvit.encoders import MuViTEncoder2d, MuViTEncoder3d, MuViTEncoder4d
from muvit.inference.run.context import ContextCaching
from muvit.losses import SegmentationLoss
from muvit.mae import MuViTMAE2d
from muvit.models.baselines import Baseline, BaselineConfig
from muvit.models.classifier import Classifier, ClassifierConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.masking import TokenMask
from muvit.models.relay.config import RelayConfig
from muvit.models.relay.segmenter import RelaySegmenter
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.training.optim import OptimConfig, PretrainOptimConfig, build_optimizer, build_pretrain_optimizer
from muvit.training.tasks import ClassificationTask, PretrainTask, SegmentationTask

ENCODER = {"in_channels": 1, "levels": (1, 4), "patch_size": 4, "num_layers": 2, "dim": 16, "heads": 2}
SEGMENTER = {"num_classes": 3, "decoder_widths": (8, 4, 4), "stem_width": 4}
COPIES = {"attention_mode": "coarse_to_fine", "coarse_copies": "under"}
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


def segmenter(encoder=ENCODER, **settings):
    return Segmenter(SegmenterConfig(encoder=EncoderConfig(**encoder), **SEGMENTER | settings))


def classifier(**settings):
    return Classifier(ClassifierConfig(encoder=EncoderConfig(**ENCODER), num_classes=3, **settings))


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


class HostWaits(Exception):
    pass


def check_copy(source, target, is_asynchronous):
    if source != target and not (source == "cpu" and is_asynchronous):
        raise HostWaits(f"from {source} to {target}")


@contextmanager
def on_fake(device, model):
    """The model on a device that is not there; what is computed inside follows its rules."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        model._apply(lambda t: t if isinstance(t, FakeTensor) else mode.from_tensor(t).to(device))
        with NoWaiting():
            yield model


def views(*space, levels=2, batch=2, device="cuda"):
    shapes = ((batch, levels, 1, *space), (batch, levels, 2, len(space)))
    return tuple(torch.empty(shape, device=device) for shape in shapes)


def check_gradients(model, loss):
    """Backward and clipping leave gradients where the parameters are."""
    loss.backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    assert parameters
    assert {p.grad.device.type for p in parameters} == {norm.device.type} == {"lazy"}


DEVICES = ["cuda", "lazy"]
WAITS = {
    "item": (lambda t: t.sum().item(), DataDependentOutputException, "_local_scalar_dense"),
    "list": (lambda t: t.tolist(), DataDependentOutputException, "_local_scalar_dense"),
    "if": (lambda t: bool((t > 0).all()), DataDependentOutputException, "_local_scalar_dense"),
    "nonzero": (lambda t: t.nonzero(), DynamicOutputShapeException, "nonzero"),
    "index by mask": (lambda t: t[t > 0], DynamicOutputShapeException, "nonzero|index"),
    "to the host": (lambda t: t.cpu(), HostWaits, "to cpu"),
    "from the host": (lambda t: torch.zeros(3).to(t.device), HostWaits, "from cpu"),
    "into a tensor of the host": (lambda t: torch.zeros(3).copy_(t), HostWaits, "to cpu"),
    "sum of two devices": (lambda t: t + torch.ones(3), RuntimeError, "two (different )?devices"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WAITS)
def test_what_waits_or_mixes_devices_is_found(name, device):
    wait, error, words = WAITS[name]
    with on_fake(device, torch.nn.Linear(3, 3)) as model, pytest.raises(error, match=words):
        wait(model.bias)


@pytest.mark.parametrize("device", DEVICES)
def test_copies_that_need_no_waiting_pass(device):
    with on_fake(device, torch.nn.Linear(3, 3)) as model:
        assert torch.zeros(3).to(device, non_blocking=True).device == model.bias.device
        model.bias.detach().copy_(torch.zeros(3), non_blocking=True)


@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("mode", ["all", "causal", "same", "random", "copies"])
def test_encoders(mode, boxes):
    attention = COPIES if mode == "copies" else {"attention_mode": mode}
    for build, space, device in (
        (MuViTEncoder4d, (4, 4, 4, 4), "cuda"),
        (MuViTEncoder3d, (4, 8, 8), "cuda"),
        (MuViTEncoder2d, (8, 8), "cuda"),
        (MuViTEncoder2d, (8, 8), "lazy"),
    ):
        with on_fake(device, build(**ENCODER | {"dim": 32} | attention)) as model:
            img, bbox = views(*space, device=device)
            tokens, coords, level, kept = model(img, bbox if boxes else None, return_intermediate_idxs=(0,))
            assert {t.device.type for t in (tokens, coords, level, *kept)} == {device}
    check_gradients(model, tokens.sum())


@pytest.mark.parametrize("rotary", [{"rotary_mode": "none"}, {"rotary_mode": "fixed"}, {"rotary_param": "base"}])
def test_rotary_embeddings(rotary):
    """A power of a learnt base is not there on ``lazy``: its gradients are not followed."""
    devices = DEVICES[:1] if "rotary_param" in rotary else DEVICES
    for device in devices:
        with on_fake(device, MuViTEncoder2d(**ENCODER | rotary)) as model:
            tokens = model(*views(8, 8, device=device))[0]
            assert tokens.device.type == device
    if device == "lazy":
        check_gradients(model, tokens.sum())


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
    """Masks are drawn on ``cuda``, and given on ``lazy``, which has not all random numbers.

    Nor can autograd there run back through the mean over levels, so that the loss is the one over all tokens.
    """
    for device in DEVICES:
        settings = MAES[name] | ({} if device == "cuda" else {"loss_average": "token"})
        with on_fake(device, MuViTMAE2d(**ENCODER, dim_decoder=16, **settings)) as model:
            img, bbox = views(16, 16, device=device)
            order = torch.empty(2, 32, dtype=torch.int64, device=device)
            mask = None if device == "cuda" else TokenMask(order, num_visible=8)
            result = model(img, bbox if boxes else None, mask=mask, return_all=True)
            assert result["loss"].device.type == device
    check_gradients(model, result["loss"])


def test_shares_masked_of_each_level():
    with on_fake("cuda", MuViTMAE2d(**ENCODER, dim_decoder=16, masking_mode=(0.5, 0.8))) as model:
        assert model(*views(16, 16), masking_mode_is_ratio=True)["loss"].device.type == "cuda"


def batch_of(*space, levels=2, device):
    img, bbox = views(*space, levels=levels, device=device)
    labels = torch.empty(2, levels, *space, dtype=torch.int64, device=device)
    classes = torch.empty(2, dtype=torch.int64, device=device)
    return {"img": img, "bbox": bbox, "label": labels[:, 0], "labels": labels, "class": classes, "slide": classes}


def segment(model, *space, devices=DEVICES):
    """Loss and logits on the devices, with gradients on the one that has them."""
    module = torch.nn.ModuleList([model, SegmentationLoss(class_weights=(1.0, 2.0, 1.0))])
    for device in devices:
        with on_fake(device, copy.deepcopy(module)) as (found, loss):
            batch = batch_of(*space, device=device)
            total, logits = found.train().training_loss(batch, loss)
            assert logits.shape == (2, 3, *space)
            assert total.device.type == logits.device.type == device
            assert total.requires_grad
            with torch.no_grad():
                assert found.eval().label_logits(batch["img"], batch["bbox"]).device.type == device
                assert found.label_logits(batch["img"]).device.type == device
    if "lazy" in devices:
        check_gradients(found, total)


SEGMENTERS = {
    "unetr": {},
    "unetr, all levels": {"decode": "all"},
    "unetr, naive boxes": {"boxes": "naive"},
    "mask2former": QUERIES,
    "mask2former, all levels": QUERIES | {"decode": "all", "mask_key_rope": False},
}


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters(name):
    segment(segmenter(**SEGMENTERS[name]), 8, 8)


def test_segmenters_of_volumes():
    segment(segmenter(ENCODER | {"ndim": 3, "dim": 32}), 4, 8, 8)


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
    """Forward alone: an operation of their loss is not there on ``lazy``."""
    segment(RelaySegmenter(RelayConfig(**RELAY | RELAYS[name])), 32, 32, devices=["cuda"])


BASELINES = {
    "unet": {"kind": "unet", "encoder_name": "resnet18"},
    "deeplabv3": {"kind": "deeplabv3", "encoder_name": "resnet18"},
    "deeplabv3plus": {"kind": "deeplabv3plus", "encoder_name": "tu-convnext_atto"},
    "upernet": {"kind": "upernet", "encoder_name": "tu-convnext_atto"},
    "fpn": {"kind": "fpn", "encoder_name": "tu-pvt_v2_b0"},
    "segformer": {"kind": "segformer", "encoder_name": "mit_b0"},
    "residual_unet": {"kind": "residual_unet", "width": 2},
    "swinunetr": {"kind": "swinunetr", "width": 12},
    "unetr": {"kind": "unetr", "width": 2, "encoder_name": "vit_tiny", "size": (64, 64)},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name != "unet")) for name in BASELINES]
)
def test_baselines(name):
    """All but mask2former, whose queries are matched with masks on the host."""
    task = {"in_channels": 1, "num_classes": 3, "levels": (1, 4)}
    segment(Baseline(BaselineConfig(**task, **BASELINES[name])), 64, 64)


@pytest.mark.parametrize("pooling", ["mean", "levels", "attention"])
def test_classifiers(pooling):
    for device in DEVICES:
        with on_fake(device, classifier(pooling=pooling)) as model:
            batch = batch_of(8, 8, device=device)
            loss = cross_entropy(model(batch["img"], batch["bbox"]), batch["class"])
            assert loss.device.type == device
    check_gradients(model, loss)


@pytest.mark.parametrize("settings", [{}, QUERIES, {"boxes": "naive"}])
def test_cached_contexts(settings):
    encoder = ENCODER | {"levels": (1, 4, 16)} | COPIES
    with on_fake("cuda", segmenter(encoder, **settings).eval()) as model, torch.no_grad():
        img, bbox = views(8, 8, levels=3)
        windows = [[Window(1, (i, 0), (8, 8)), Window(4, (0, 0), (8, 8)), Window(16, (0, 0), (8, 8))] for i in range(2)]
        logits = ContextCaching(model).label_logits(img, bbox, windows)
        assert logits.device.type == "cuda"
        assert logits.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("space", [(8, 8), (4, 8, 8)])
def test_stored_pixels_are_finished_where_they_are(dtype, space):
    tasks = segmentation_task(), pretrain_task()
    for device in DEVICES:
        with on_fake(device, torch.nn.Linear(1, 1)):
            numbers = torch.empty(2, 2, device=device)
            channels = torch.empty(2, 2, 3, device=device)
            defects = Defects(
                torch.empty(2, 2, 5, device=device), numbers, numbers, numbers.int(), torch.empty_like(channels).bool()
            )
            img = torch.empty(2, 2, 3, *space, dtype=dtype, device=device)
            inside = torch.empty(2, 2, *space, dtype=torch.bool, device=device)
            look = Look(channels, channels, numbers, numbers, defects)
            for task in tasks:
                batch = task.on_after_batch_transfer({"img": img, "look": look, "inside": inside}, 0)
                assert batch.keys() == {"img"} and batch["img"].dtype == torch.float32
                assert batch["img"].device.type == device and batch["img"].shape == img.shape


CLIPPED = {"gradient_clip": 0.5, "zero_nonfinite_gradients": True}


def segmentation_task():
    return SegmentationTask(segmenter(), SegmentationLoss(), OptimConfig(**CLIPPED), ("a", "b", "c"))


def classification_task():
    return ClassificationTask(classifier(), OptimConfig(**CLIPPED))


def pretrain_task():
    optim = PretrainOptimConfig(**CLIPPED, ema_decay=0.9)
    return PretrainTask(MuViTMAE2d(**ENCODER, dim_decoder=16), optim, batch_size=2)


def keep_logged(task):
    """The task with a trainer that is not running, and what it logs."""
    logged = {}
    task.log = lambda name, value, **_: logged.update({name: value})
    task.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return logged


@pytest.mark.parametrize("build", [segmentation_task, classification_task])
def test_tasks_step_and_validate(build):
    """Loss, backward, clipping, step, and what a validation keeps of a batch."""
    task = build()
    logged = keep_logged(task)
    with on_fake("lazy", task):
        optimizer = build_optimizer(task.model, task.encoder, task.optim)
        task.training_step(batch_of(16, 16, device="lazy"), 0).backward()
        task.on_before_optimizer_step(optimizer)
        optimizer.step()
        with torch.no_grad():
            task.eval().validation_step(batch_of(16, 16, device="lazy"), 0)
    assert logged.keys() == {"train_loss", "grad_norm"}
    assert {value.device.type for value in logged.values()} == {"lazy"}


@pytest.mark.parametrize("build", [segmentation_task, classification_task, pretrain_task])
def test_gpus_are_stepped_fused(build):
    """Clipping, step and averaged weights, from gradients that are given."""
    task = build()
    logged = keep_logged(task)
    with on_fake("cuda", task):
        for parameter in task.model.parameters():
            parameter.grad = torch.empty_like(parameter)
        if isinstance(task, PretrainTask):
            optimizer = build_pretrain_optimizer(task.model, task.optim, total_batch=2)
        else:
            optimizer = build_optimizer(task.model, task.encoder, task.optim)
        assert optimizer.defaults["fused"]
        task.on_before_optimizer_step(optimizer)
        optimizer.step()
        task.on_train_batch_end(None, None, 0)
    assert {value["exp_avg"].device.type for value in optimizer.state.values()} == {"cuda"}
    assert logged["grad_norm"].device.type == "cuda"
