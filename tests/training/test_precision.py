"""Every kind of model trains as on a GPU: in bfloat16, with fused steps, through the functions that users call."""

from dataclasses import replace

import pytest
import torch
from lightning import Callback
from small_slides import write_slides

from muvit.models.baselines import BaselineConfig
from muvit.models.classifier import ClassifierConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.mae import MAEConfig
from muvit.models.relay.config import RelayConfig
from muvit.models.segmenter import SegmenterConfig
from muvit.training.fit import pretrain_mae, train_classifier, train_segmenter
from muvit.training.optim import OptimConfig, PretrainOptimConfig
from muvit.training.recipes import (
    ClassifyDataConfig,
    ClassifyRecipe,
    DataConfig,
    PretrainDataConfig,
    PretrainRecipe,
    Recipe,
)
from muvit.training.run_config import RunConfig

ENCODER = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=8, dim=16, num_layers=3, heads=2)
SEGMENTER = SegmenterConfig(
    encoder=ENCODER, num_classes=2, decoder_widths=(4, 4, 4, 4), stem_width=4, num_queries=2, query_heads=1
)
VIT = RelayConfig(
    backbone="vit_tiny_patch16_224",
    timm_options={"depth": 2, "embed_dim": 12, "num_heads": 2},
    relay_tokens=2,
    levels=(1, 4),
)
SWIN = RelayConfig(
    backbone="swinv2_tiny_window8_256",
    timm_options={"depths": (1, 1), "embed_dim": 8, "num_heads": (2, 2), "window_size": 4},
    relay_tokens=2,
    levels=(1, 4),
)
SEGMENTERS = {
    "unetr": {},
    "mask2former": {"model": replace(SEGMENTER, decoder="mask2former")},
    "relay vit": {"model": VIT},
    "relay swin": {"model": SWIN},
    "baseline": {"model": BaselineConfig(kind="unet", encoder_name="mobilenet_v2")},
}
RUN = RunConfig(epochs=1, accelerator="cpu", precision="bf16-mixed", progress=False, pictures=0)
CROPS = {"crop_size": 32, "samples_per_epoch": 4, "val_samples": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return write_slides(tmp_path_factory.mktemp("slides"))


class Watch(Callback):
    """What a run computes with, and its parameters before the first step."""

    def on_train_start(self, trainer, task):
        self.precision, self.is_fused = trainer.precision, trainer.optimizers[0].defaults["fused"]
        self.before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
        self.dtypes, self.norms = set(), []
        for module in task.model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.register_forward_hook(lambda _, __, out: self.dtypes.add(out.dtype))

    def on_train_batch_end(self, trainer, task, *_):
        self.norms.append(float(trainer.callback_metrics["grad_norm"]))
        named = task.model.named_parameters()
        self.idle = [name for name, p in named if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]

    def on_train_end(self, trainer, task):
        self.task, self.metrics, self.steps = task, dict(trainer.callback_metrics), trainer.global_step


def check(watch):
    """Two steps were taken in bfloat16, fused, and each trainable parameter had a gradient and moved."""
    assert (watch.precision, watch.is_fused, watch.steps) == ("bf16-mixed", True, 2)
    assert torch.bfloat16 in watch.dtypes
    assert len(watch.norms) == 2 and all(0 < norm < float("inf") for norm in watch.norms)
    assert not watch.idle  # several processes would wait for the gradient of each parameter
    assert 0 < watch.metrics["val_loss"] < float("inf")
    for name, parameter in watch.task.model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.isfinite().all(), name
    moved = [not torch.equal(p, watch.before[name]) for name, p in watch.task.model.named_parameters()]
    assert sum(moved) > 0.8 * len(moved)


@pytest.mark.parametrize("kind", SEGMENTERS)
def test_segmenters_train_in_bfloat16_with_fused_steps(slides, tmp_path, kind):
    watch = Watch()
    recipe = Recipe(
        data=DataConfig(train=str(slides / "train"), val=str(slides / "val"), **CROPS),
        optim=OptimConfig(lr=1e-2),
        run=RUN,
        **{"model": SEGMENTER} | SEGMENTERS[kind],
    )
    assert train_segmenter(recipe, tmp_path / "run", callbacks=[watch]).is_dir()
    check(watch)


def test_a_masked_autoencoder_with_averaged_weights_trains_in_bfloat16_with_fused_steps(slides, tmp_path):
    watch = Watch()
    recipe = PretrainRecipe(
        data=PretrainDataConfig(train=str(slides / "train"), val=str(slides / "val"), **CROPS),
        model=MAEConfig(encoder=ENCODER, dim_decoder=16),
        optim=PretrainOptimConfig(lr=1e-2, ema_decay=0.9),
        run=RUN,
    )
    assert pretrain_mae(recipe, tmp_path / "run", callbacks=[watch]).is_dir()
    check(watch)


def test_a_classifier_trains_in_bfloat16_with_fused_steps(slides, tmp_path):
    watch = Watch()
    recipe = ClassifyRecipe(
        data=ClassifyDataConfig(
            train=str(slides / "train"), val=str(slides / "val"), classes=str(slides / "slides.csv"), **CROPS
        ),
        model=ClassifierConfig(encoder=ENCODER),
        optim=OptimConfig(lr=1e-2),
        run=RUN,
    )
    assert train_classifier(recipe, tmp_path / "run", callbacks=[watch]).is_dir()
    check(watch)
