"""Heads that say one thing about a whole sample: classification of crops, and of slides by their crops."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from muvit.checks import Bounds, check_fields
from muvit.errors import InputError
from muvit.models.encoder import EncoderConfig, MuViTEncoder
from muvit.models.folder import FolderModel

Pooling = Literal["mean", "levels", "attention"]
"""From tokens to one vector: their mean; the mean of each level, one after the other; a learnt weighted mean."""


def mean_tokens(tokens: Tensor, num_levels: int, pooling: Literal["mean", "levels"]) -> Tensor:
    """Mean of tokens ``(B, N, D)``, level-major: ``(B, D)``, or with ``levels`` of each level, ``(B, L * D)``."""
    return tokens.mean(1) if pooling == "mean" else tokens.unflatten(1, (num_levels, -1)).mean(2).flatten(1)


class AttentionPool(nn.Module):
    """Weighted mean of tokens, the weights a softmax over learnt scores (attention-based multiple-instance learning,
    Ilse et al. 2018).

    Args:
        dim: width of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(dim, max(1, dim // 4)), nn.Tanh(), nn.Linear(max(1, dim // 4), 1))

    def weights(self, tokens: Tensor) -> Tensor:
        """Weight of each of the tokens ``(B, N, D)``: ``(B, N)``, of sum 1."""
        return self.score(tokens).squeeze(-1).softmax(dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(B, N, D)`` to one vector of each sample ``(B, D)``."""
        return torch.einsum("bn,bnd->bd", self.weights(tokens), tokens)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Sizes and choices of a `Classifier`."""

    kind: ClassVar[str] = "classifier"

    encoder: EncoderConfig
    """The multi-resolution encoder."""
    num_classes: Annotated[int, Bounds(min=2)] | None = None
    """Classes; in a recipe, unset, those of its table."""
    pooling: Pooling = "mean"
    """From tokens to one vector: mean of all; mean of each level, one after the other; a learnt weighted mean
    (attention)."""
    boxes: Literal["true", "naive"] = "true"
    """Positions that the encoder sees: the true boxes, or one set of centred boxes for all (the paper's control)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.encoder.ndim > 3:
            raise InputError("encoder.ndim", expected="2 or 3 for classification", got=self.encoder.ndim)


class Classifier(FolderModel):
    """Multi-resolution encoder, pooled tokens, a linear layer: one class for each sample.

    Args:
        config: sizes and choices; ``num_classes`` must be set.
    """

    config: ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        if config.num_classes is None:
            raise InputError("num_classes", expected="a number of at least 2", got=None)
        enc = config.encoder
        self.encoder = MuViTEncoder(enc)
        self.pool = AttentionPool(enc.dim) if config.pooling == "attention" else None
        width = enc.dim * (len(enc.levels) if config.pooling == "levels" else 1)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.num_classes)

    def features(self, img: Tensor, bbox: Tensor | None = None) -> Tensor:
        """Pooled tokens of each sample, ``(B, D)``, or ``(B, L * D)`` with ``pooling="levels"``; arguments as in
        `forward`."""
        tokens = self.encoder(img, bbox if self.config.boxes == "true" else None)[0]
        if self.pool is not None:
            return self.pool(tokens)
        assert self.config.pooling != "attention"
        return mean_tokens(tokens, len(self.config.encoder.levels), self.config.pooling)

    def forward(self, img: Tensor, bbox: Tensor | None = None) -> Tensor:
        """Classify samples.

        Args:
            img: ``(B, L, C, *space)``.
            bbox: ``(B, L, 2, ndim)``, world pixels, (t)(z)yx; None places all levels around one common centre.

        Returns:
            Logits ``(B, K)``.

        Raises:
            ShapeError: images or boxes have the wrong shape.
        """
        return self.head(self.norm(self.features(img, bbox)))
