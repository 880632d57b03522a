"""Optimiser and learning-rate schedule (MuViT supplement B)."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import cos, pi, sqrt
from typing import Annotated, Any, Literal

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

from muvit.checks import Bounds, NonNegative, Positive, Share, check_fields, freeze_lists


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a cosine schedule; the defaults are the paper's for segmentation (MuViT supplement B)."""

    lr: Positive = 1e-4
    """Peak learning rate of the decoder."""
    encoder_lr_factor: NonNegative = 0.1
    """Learning rate of the encoder relative to the decoder's."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay of matrices; biases, norms, level vectors and rotary frequencies have none."""
    warmup_fraction: Share = 0.02
    """Share of all steps over which the learning rate rises linearly to its peak."""
    schedule: Literal["cosine", "plateau"] = "cosine"
    """After the warm-up: half a cosine down to 0; or constant, and multiplied by plateau_factor whenever run.monitor
    has not risen by a hundredth of itself for more than plateau_patience validations (Relay Tokens)."""
    plateau_factor: Annotated[float, Bounds(above=0, below=1)] = 0.2
    """Factor of the learning rate at each decay of the plateau schedule."""
    plateau_patience: Annotated[int, Bounds(min=0)] = 4
    """Validations without improvement before the plateau schedule decays."""
    gradient_clip: Positive | None = 0.5
    """Largest norm of the gradient; null does not clip it."""
    zero_nonfinite_gradients: bool = False
    """Replace NaN and infinite entries of the gradient by 0 (Relay Tokens)."""

    def __post_init__(self) -> None:
        check_fields(self, "optim.")


@dataclass(frozen=True, kw_only=True)
class PretrainOptimConfig:
    """AdamW with a cosine schedule; the defaults are the paper's for pre-training (MuViT supplement B)."""

    lr: Positive | None = 6e-5
    """Peak learning rate; unset, 1e-4 * sqrt(samples per step over all devices / 128)."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the running mean of the gradient and of its square."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay of matrices; biases, norms, level vectors, mask tokens and rotary frequencies have
    none."""
    warmup_epochs: NonNegative = 2.0
    """Epochs over which the learning rate rises linearly to its peak."""
    warmup_start: Share = 0.01
    """Share of the peak that it rises from."""
    gradient_clip: Positive | None = 0.5
    """Largest norm of the gradient; null does not clip it."""
    zero_nonfinite_gradients: bool = False
    """Replace NaN and infinite entries of the gradient by 0."""
    ema_decay: Share | None = None
    """Validate and keep an exponential moving average of the weights with this decay per step, 0.999 for example;
    unset, the weights themselves."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_fields(self, "optim.")

    def peak_lr(self, total_batch: int) -> float:
        """Peak learning rate for steps of ``total_batch`` samples over all devices."""
        return 1e-4 * sqrt(total_batch / 128) if self.lr is None else self.lr


def build_optimizer(model: nn.Module, encoder: nn.Module | None, config: OptimConfig) -> AdamW:
    """AdamW over the trainable parameters of ``model``; those of its ``encoder`` have their own learning rate."""
    in_encoder = set() if encoder is None else {id(p) for p in encoder.parameters()}
    named = list(model.named_parameters())
    return _adamw(
        [
            *_groups(((n, p) for n, p in named if id(p) in in_encoder), config.lr * config.encoder_lr_factor, config),
            *_groups(((n, p) for n, p in named if id(p) not in in_encoder), config.lr, config),
        ]
    )


def build_pretrain_optimizer(model: nn.Module, config: PretrainOptimConfig, total_batch: int) -> AdamW:
    """AdamW over all parameters, for steps of ``total_batch`` samples over all devices."""
    return _adamw(_groups(model.named_parameters(), config.peak_lr(total_batch), config), betas=config.betas)


def build_schedule(
    optimizer: torch.optim.Optimizer, num_steps: int, warmup_fraction: float, warmup_start: float = 0.0
) -> LambdaLR:
    """Linear warm-up over the first share of the steps, then half a cosine down to 0 at ``num_steps``.

    The warm-up starts at ``warmup_start`` times the peak; if that is 0, the first step already has one increment.
    """
    warmup = max(1, round(num_steps * warmup_fraction))

    def factor(step: int) -> float:
        if step < warmup:
            risen = step / warmup if warmup_start else (step + 1) / warmup
            return warmup_start + (1 - warmup_start) * risen
        return 0.5 * (1 + cos(pi * min(1.0, (step - warmup) / max(1, num_steps - warmup))))

    return LambdaLR(optimizer, factor)


def build_plateau(
    optimizer: torch.optim.Optimizer, num_steps: int, config: OptimConfig
) -> tuple[LinearLR, ReduceLROnPlateau]:
    """Linear warm-up from 1 % over the first share of the steps, and decay whenever a score stops rising."""
    warmup = max(1, round(num_steps * config.warmup_fraction))
    decay = ReduceLROnPlateau(
        optimizer, "max", factor=config.plateau_factor, patience=config.plateau_patience, threshold=0.01
    )
    return LinearLR(optimizer, 0.01, total_iters=warmup), decay


def _groups(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, config: OptimConfig | PretrainOptimConfig
) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay, the trainable ones of ``named``."""
    trainable = [(name, p) for name, p in named if p.requires_grad]
    matrices = [p for name, p in trainable if _is_matrix(name, p)]
    others = [p for name, p in trainable if not _is_matrix(name, p)]
    return [
        {"params": matrices, "lr": lr, "weight_decay": config.weight_decay},
        {"params": others, "lr": lr, "weight_decay": 0.0},
    ]


_VECTORS = (
    *("level_embed", "mask_token", "queries", "relay_tokens", "relay_positions"),
    *("pos_embed", "cls_token", "reg_token", "relative_position_bias_table"),  # of timm
)
"""Parameters that are vectors, stacked: tables of biases, positions or learnable tokens."""


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and name.rpartition(".")[2] not in _VECTORS


_FUSED = ("cpu", "cuda")
"""Types of device with a fused AdamW."""


def _adamw(groups: list[dict[str, Any]], **options: Any) -> AdamW:
    groups = [g for g in groups if g["params"]]
    parameters = [p for g in groups for p in g["params"]]
    is_fused = all(p.device.type in _FUSED and p.is_floating_point() for p in parameters)
    return AdamW(groups, fused=is_fused, **options)
