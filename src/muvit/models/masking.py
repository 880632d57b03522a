"""Visible tokens of a masked autoencoder: Dirichlet budgets over the levels, uniform choice within a level.

Every mode is one draw of keys: a token of weight ``w`` gets the key ``Exponential(1) / w``, and the tokens with the
smallest keys are visible. That is weighted sampling without replacement, for the whole batch at once. Under ``counts``
the draw instead says how many tokens of each level are visible, and the keys say which.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor

from muvit.errors import InputError
from muvit.levels import Level

MaskingMode = Literal["dirichlet", "counts", "random"] | Sequence[float]
"""``dirichlet``: levels weighted by a draw from a Dirichlet distribution; ``counts``: such a draw is the share of the
visible tokens that each level gets (MultiMAE); ``random``: all tokens alike; numbers: the weight of each level, or with
``is_ratio`` the share of each level that is masked."""


@dataclass(frozen=True)
class TokenMask:
    """Order of the tokens of each sample, ``(B, N)`` int64, the visible ones first."""

    order: Tensor
    num_visible: int
    """Visible tokens of each sample; the same for all, so that shapes are fixed."""

    @property
    def visible(self) -> Tensor:
        """Indices of the visible tokens, ``(B, num_visible)``."""
        return self.order[:, : self.num_visible]

    @property
    def masked(self) -> Tensor:
        """Indices of the masked tokens, ``(B, N - num_visible)``."""
        return self.order[:, self.num_visible :]

    @property
    def is_masked(self) -> Tensor:
        """Whether each token is masked, ``(B, N)`` bool, in token order."""
        return torch.ones_like(self.order, dtype=torch.bool).scatter(1, self.visible, False)


def draw_mask(
    batch: int,
    num_levels: int,
    tokens_per_level: int,
    *,
    ratio: float = 0.75,
    mode: MaskingMode = "dirichlet",
    is_ratio: bool = False,
    alpha: float = 0.5,
    share_draw: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> TokenMask:
    """Choose visible tokens (MuViT, multi-resolution masked autoencoding).

    Args:
        batch: samples.
        num_levels: views of each sample.
        tokens_per_level: tokens of each view.
        ratio: share of all tokens that is masked; ``int((1 - ratio) * N)`` stay visible.
        mode: how the visible tokens are shared out between the levels.
        is_ratio: the numbers in ``mode`` are masked shares of each level, and ``ratio`` is not used.
        alpha: concentration of the Dirichlet distribution.
        share_draw: one Dirichlet draw for the whole batch instead of one per sample.
        generator: source of randomness, on ``device``.
        device: where the mask lives.

    Raises:
        InputError: a ratio is not in [0, 1), or the mode does not fit the levels.
    """
    shape = (batch, num_levels, tokens_per_level)
    log_weights = _log_weights(mode, batch, num_levels, is_ratio, alpha, share_draw, generator, device)
    # in logarithms, as a Dirichlet weight may underflow
    keys = _exponential(shape, generator, device).log() - log_weights[..., None]
    if not is_ratio:
        _check_ratio("masking_ratio", ratio)
        num_visible = int(num_levels * tokens_per_level * (1 - ratio))
        if mode == "counts":
            counts = (num_visible * log_weights.softmax(dim=1)).round()
            is_left_out = keys.argsort(dim=-1).argsort(dim=-1) >= counts[..., None]
            # rounded counts may sum to a few more or less, as do those beyond a level's tokens: chance decides on these
            keys = is_left_out + torch.rand(shape, generator=generator, device=device)
        return TokenMask(keys.flatten(1).argsort(dim=1), num_visible)
    assert not isinstance(mode, str)
    return _mask_by_ratios(keys, mode)


def draw_consistent_mask(
    batch: int,
    levels: Sequence[Level],
    tokens_per_level: int,
    *,
    ratio: float = 0.75,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> TokenMask:
    """Mask each level alike, the same tokens in every model that has the level.

    The mask of a level depends on the generator's state, the sample's place in the batch and the value of the level
    alone, so that models with different sets of levels are compared on common ground. Drawn on the CPU.
    """
    _check_ratio("masking_ratio", ratio)
    base = int(torch.randint(2**31, (1,), generator=generator, device=generator.device if generator else "cpu"))
    keys = torch.stack(
        [
            torch.rand(
                batch, tokens_per_level, generator=torch.Generator().manual_seed(base * 1009 + _level_seed(level))
            )
            for level in levels
        ],
        dim=1,
    )
    return _mask_by_ratios(keys.to(device), [ratio] * len(levels))


def _level_seed(level: Level) -> int:
    factors = (level,) if isinstance(level, int | float) else level
    return sum(round(factor * 1000) * 31**axis for axis, factor in enumerate(factors))


def _mask_by_ratios(keys: Tensor, ratios: Sequence[float]) -> TokenMask:
    """Keep the tokens with the smallest keys of each level; keys ``(B, L, n)``."""
    num_tokens = keys.shape[-1]
    kept = [int(num_tokens * (1 - ratio)) for ratio in ratios]
    ranks = keys.argsort(dim=-1).argsort(dim=-1)
    is_visible = torch.stack([ranks[:, i] < count for i, count in enumerate(kept)], dim=1)
    order = (~is_visible).flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
    return TokenMask(order, sum(kept))


def _log_weights(
    mode: MaskingMode,
    batch: int,
    num_levels: int,
    is_ratio: bool,
    alpha: float,
    share_draw: bool,
    generator: torch.Generator | None,
    device: torch.device | str,
) -> Tensor:
    """Logarithm of the weight of each level in each sample, ``(B, L)``, up to a constant of the sample."""
    if mode == "random" or is_ratio:
        if is_ratio:
            _check_numbers(mode, num_levels)
            for number in mode:
                _check_ratio("masking_mode", float(number))
        return torch.zeros(batch, num_levels, device=device)
    if mode in ("dirichlet", "counts"):
        shape = (1 if share_draw else batch, num_levels)
        # Gamma(alpha) = Gamma(alpha + 1) * U ** (1 / alpha), whose logarithm is finite for any alpha
        gamma = torch._standard_gamma(torch.full(shape, float(alpha + 1), device=device), generator)
        logs = gamma.log() - _exponential(shape, generator, device) / alpha
        return (logs - logs.amax(dim=1, keepdim=True)).expand(batch, -1)
    _check_numbers(mode, num_levels)
    # filled on the device: copying numbers there would wait for it
    least = torch.finfo(torch.float32).tiny
    logs_of = (log(max(float(number), least)) for number in mode)
    return torch.stack([torch.full((batch,), value, device=device) for value in logs_of], dim=1)


def _check_numbers(mode: MaskingMode, num_levels: int) -> None:
    if isinstance(mode, str) or len(mode) != num_levels or min(mode) < 0 or max(mode) == 0:
        raise InputError(
            "masking_mode",
            expected=f"'dirichlet', 'counts', 'random', or {num_levels} numbers >= 0, not all 0",
            got=repr(mode),
        )


def _check_ratio(name: str, ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise InputError(name, expected="a share from 0 to 1", got=ratio)


def _exponential(shape: Sequence[int], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    # the smallest positive float keeps the logarithm finite
    draws = torch.empty(tuple(shape), device=device).exponential_(generator=generator)
    return draws.clamp_(min=torch.finfo(torch.float32).tiny)
