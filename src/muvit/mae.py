"""Masked autoencoders as release 0.1.0 names them, with ``fit``."""

from typing import Any

import muvit.models.mae as models
from muvit.models.mae import MAEConfig

__all__ = ["MAEConfig", "MuViTMAE2d", "MuViTMAE3d", "MuViTMAE4d"]


class _Fit(models.MuViTMAE):
    def fit(self, train_dataloader: Any, val_dataloader: Any, output: Any, **options: Any) -> None:
        """Pre-train with Lightning; options as in `muvit.training.pretrain.fit_mae`."""
        from muvit.training.pretrain import fit_mae

        fit_mae(self, train_dataloader, val_dataloader, output, **options)


class MuViTMAE2d(_Fit, models.MuViTMAE2d):
    """Masked autoencoder for images (yx)."""


class MuViTMAE3d(_Fit, models.MuViTMAE3d):
    """Masked autoencoder for volumes (zyx)."""


class MuViTMAE4d(_Fit, models.MuViTMAE4d):
    """Masked autoencoder for volumes over time (tzyx)."""
