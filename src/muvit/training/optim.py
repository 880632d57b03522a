"""Optimiser and learning-rate schedule (MuViT supplement B)."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from muvit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a cosine schedule; the defaults are the paper's for segmentation (MuViT supplement B)."""

    lr: float = 1e-4
    """Peak learning rate of the decoder."""
    encoder_lr_factor: float = 0.1
    """Learning rate of the encoder relative to the decoder's."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; biases, norms, level vectors and rotary frequencies have none."""
    warmup_fraction: float = 0.02
    """Share of all steps over which the learning rate rises linearly to its peak."""
    gradient_clip: float = 0.5
    """Largest norm of the gradient."""

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("lr", self.lr > 0, "a positive number"),
            ("encoder_lr_factor", self.encoder_lr_factor >= 0, "a number >= 0"),
            ("weight_decay", self.weight_decay >= 0, "a number >= 0"),
            ("warmup_fraction", 0 <= self.warmup_fraction < 1, "a share in [0, 1)"),
            ("gradient_clip", self.gradient_clip > 0, "a positive number"),
        ):
            if not fits:
                raise InputError(name, expected=expected, got=getattr(self, name))


def build_optimizer(model: nn.Module, encoder: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over the trainable parameters of ``model``, those of its ``encoder`` at their own learning rate."""
    in_encoder = {id(p) for p in encoder.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = []
    for lr, chosen in (
        (config.lr * config.encoder_lr_factor, [p for p in trainable if id(p) in in_encoder]),
        (config.lr, [p for p in trainable if id(p) not in in_encoder]),
    ):
        for decay, members in ((config.weight_decay, _matrices(chosen)), (0.0, _vectors(chosen))):
            groups.append({"params": members, "lr": lr, "weight_decay": decay})
    return AdamW([g for g in groups if g["params"]], fused=torch.cuda.is_available())


def build_schedule(optimizer: torch.optim.Optimizer, num_steps: int, warmup_fraction: float) -> LambdaLR:
    """Linear warm-up over the first share of the steps, then half a cosine down to 0 at ``num_steps``."""
    warmup = max(1, round(num_steps * warmup_fraction))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + cos(pi * min(1.0, (step - warmup) / max(1, num_steps - warmup))))

    return LambdaLR(optimizer, factor)


def _matrices(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.ndim > 1]


def _vectors(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.ndim <= 1]
