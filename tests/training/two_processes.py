"""Trains in as many processes as asked for and leaves gradients and scores; Lightning starts this script once more."""

import json
import sys
from pathlib import Path

import torch
from lightning import Callback

from muvit.models.encoder import EncoderConfig
from muvit.models.mae import MAEConfig
from muvit.models.relay.config import RelayConfig
from muvit.training.fit import pretrain_mae, train_segmenter
from muvit.training.optim import OptimConfig, PretrainOptimConfig
from muvit.training.recipes import DataConfig, LossConfig, PretrainDataConfig, PretrainRecipe, Recipe
from muvit.training.run_config import RunConfig

GLOBAL_BATCH = 4


class Keep(Callback):
    """The gradient of the step, and the scores after it."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, task, *_):
        gradients = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
        if trainer.is_global_zero:
            torch.save(gradients, self.folder / "gradients.pt")

    def on_train_end(self, trainer, task):
        assert trainer.global_step == 1
        if trainer.is_global_zero:
            scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
            (self.folder / "scores.json").write_text(json.dumps(scores))


def recipes(slides, num_processes):
    """One step each; losses are means over as many pixels or tokens in each process, without batch norm or dropout."""
    sizes = {"samples_per_epoch": GLOBAL_BATCH, "batch_size": GLOBAL_BATCH // num_processes, "num_workers": 0}
    folders = {"train": str(slides / "train"), "val": str(slides / "val"), "crop_size": 32}
    run = RunConfig(epochs=1, accelerator="cpu", devices=num_processes, progress=False, pictures=0)
    timm_options = {"depth": 2, "embed_dim": 12, "num_heads": 2}
    yield (
        "train",
        train_segmenter,
        Recipe(
            data=DataConfig(**folders, **sizes, placement="concentric"),
            model=RelayConfig(backbone="vit_tiny_patch16_224", timm_options=timm_options, levels=(1, 4)),
            loss=LossConfig(dice_weight=0),
            optim=OptimConfig(gradient_clip=None),
            run=run,
        ),
    )
    yield (
        "pretrain",
        pretrain_mae,
        PretrainRecipe(
            data=PretrainDataConfig(**folders, **sizes),
            model=MAEConfig(
                encoder=EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=1, heads=2),
                dim_decoder=16,
                loss_average="token",
            ),
            optim=PretrainOptimConfig(gradient_clip=None, ema_decay=0.9),
            run=run,
        ),
    )


def train_all(slides, folder, num_processes):
    for name, function, recipe in recipes(slides, num_processes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        function(recipe, folder / name / "run", callbacks=[Keep(folder / name)])


if __name__ == "__main__":
    train_all(Path(sys.argv[1]), Path(sys.argv[2]), 2)
