"""Masked autoencoders under the names, and with the arguments and results, of release 0.1.0; with ``fit``."""

import copy as copying
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import prod
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from muvit.encoders import check_input_space, check_ndim
from muvit.geometry import PatchSpacing
from muvit.levels import Level, plain_level
from muvit.models.encoder import EncoderConfig
from muvit.models.layers.attention import AttentionMode
from muvit.models.layers.patch import patch_grid
from muvit.models.layers.rope import Periods, RotaryMode, RotaryParam
from muvit.models.mae import NORM_EPS, MAEConfig, MuViTMAE
from muvit.models.masking import TokenMask, draw_consistent_mask, draw_mask
from muvit.pictures import MASK_GREY

__all__ = ["MuViTMAE", "MuViTMAE2d", "MuViTMAE3d", "MuViTMAE4d"]


class _MAE(MuViTMAE):
    """`MuViTMAE` of a fixed number of axes.

    Args:
        in_channels: as in `EncoderConfig` and `MAEConfig`, and so on.
        input_space: space of the patches; ``real`` pixels are the only one.
    """

    ndim: ClassVar[int]

    def __init__(
        self,
        in_channels: int = 1,
        levels: Sequence[Level] = (1, 4),
        patch_size: int | tuple[int, ...] = 8,
        num_layers: int = 12,
        dim: int = 512,
        num_layers_decoder: int = 2,
        dim_decoder: int | None = 256,
        heads: int = 8,
        decoder_mode: Literal["multi", "multi_iso", "single"] = "multi",
        loss: Literal["mse", "norm_mse", "laplacian"] = "mse",
        masking_ratio: float = 0.75,
        use_level_embed: bool = True,
        rotary_mode: RotaryMode = "per_layer",
        rotary_base: float | Periods = 10000.0,
        attention_mode: AttentionMode = "all",
        masking_mode: Literal["dirichlet", "counts", "random"] | tuple[float, ...] = "dirichlet",
        input_space: Literal["real"] = "real",
        dropout: float = 0.0,
        *,
        level_embed_std: float = 1.0,
        rotary_param: RotaryParam = "freq",
        patch_spacing: PatchSpacing = "center",
        decoder_context: Literal["visible", "all"] = "visible",
        loss_average: Literal["level", "token"] = "level",
        share_masking_draw: bool = False,
        fixed_positions: Literal["none", "grid", "scaled"] = "none",
        masking_alpha: float = 0.5,
    ) -> None:
        check_input_space(input_space)
        encoder = EncoderConfig(
            in_channels=in_channels,
            levels=tuple(levels),
            patch_size=patch_size,
            num_layers=num_layers,
            dim=dim,
            heads=heads,
            attention_mode=attention_mode,
            use_level_embed=use_level_embed,
            level_embed_std=level_embed_std,
            rotary_mode=rotary_mode,
            rotary_param=rotary_param,
            rotary_base=rotary_base,
            patch_spacing=patch_spacing,
            fixed_positions=fixed_positions,
            dropout=dropout,
            ndim=self.ndim,
        )
        super().__init__(
            MAEConfig(
                encoder=encoder,
                num_layers_decoder=num_layers_decoder,
                dim_decoder=dim_decoder,
                decoder_mode=decoder_mode,
                decoder_context=decoder_context,
                loss=loss,
                loss_average=loss_average,
                masking_ratio=masking_ratio,
                masking_mode=masking_mode,
                masking_alpha=masking_alpha,
                share_masking_draw=share_masking_draw,
            )
        )

    @property
    def _config(self) -> dict[str, Any]:
        settings = asdict(self.config)
        del settings["encoder"]["coarse_copies"]
        return settings.pop("encoder") | settings | {"input_space": "real"}

    @classmethod
    def _build(cls, config: MAEConfig, source: object) -> Self:
        check_ndim(cls, config.encoder.ndim, source)
        arguments = asdict(config)
        arguments |= arguments.pop("encoder")
        del arguments["ndim"], arguments["coarse_copies"]
        return cls(**arguments)

    def forward(
        self,
        x: Tensor,
        bbox: Tensor | None = None,
        return_all: bool = False,
        eps: float = NORM_EPS,
        consistent_levels: bool = False,
        rng_generator: torch.Generator | None = None,
        masking_mode_is_ratio: bool = False,
        mask: TokenMask | None = None,
    ) -> dict[str, Tensor]:
        """Mask, encode, decode, compare.

        Args:
            x: ``(B, L, C, *space)``.
            bbox: ``(B, L, 2, ndim)``, world pixels, (t)(z)yx; None places all levels around one common centre.
            return_all: also return the intermediate results.
            eps: added to the standard deviation of a patch under ``norm_mse``.
            consistent_levels: mask each level alike, the same tokens in every model that has the level.
            rng_generator: source of the mask, on the device of ``x``.
            masking_mode_is_ratio: the numbers in ``masking_mode`` are masked shares of each level.
            mask: the mask to use, instead of drawing one.

        Returns:
            ``input`` and ``output``: true and predicted patches ``(B, N, P...C)``; ``loss``: scalar;
            ``loss_per_level``: ``(L)``, NaN for a level without masked tokens. ``return_all`` adds ``encoded``
            ``(B, N_vis, D)``; ``decoded`` ``(B, N, D_dec)``; ``reco`` and ``input_masked``: views
            ``(B, L, C, *space)`` whose masked patches are reconstructed or grey; ``mask``: bool, of the same shape.
        """
        self.encoder.check_images(x, len(self.levels))
        if mask is None:
            mask = self._draw(x, consistent_levels, rng_generator, masking_mode_is_ratio)
        result = super().forward(x, bbox, mask=mask, eps=eps)
        if not return_all:
            return {name: result[name] for name in ("input", "output", "loss", "loss_per_level")}
        patches, hidden = result["input"], mask.is_masked[..., None]
        pictures = {
            "reco": self.restored_patches(result["output"], patches, mask, eps),
            "input_masked": patches.masked_fill(hidden, MASK_GREY),
            "mask": hidden.expand_as(patches),
        }
        return result | {name: self.to_views(value, x.shape[3:]) for name, value in pictures.items()}

    def patch_token_to_image(self, x: Tensor, *shape: int) -> Tensor:
        """Views ``(B, L, C, *space)`` of patches ``(B, N, P...C)``; ``shape`` is ``C, *space``."""
        return self.to_views(x, shape[1:])

    def extract_levels(self, levels: Sequence[Level], copy: bool = True) -> Self:
        """A model for some of the levels, with their embeddings and decoders.

        Args:
            levels: levels to keep, in the order that the new model shall take them.
            copy: false returns this very model if it has just these levels.

        Raises:
            InputError: the model does not have one of the levels.
        """
        levels = tuple(map(plain_level, levels))
        if levels == self.levels and not copy:
            return self
        other = copying.deepcopy(self)
        other.encoder = self.encoder.extract_levels(levels)
        other.config = replace(self.config, encoder=other.encoder.config)
        if self.config.decoder_mode != "single":
            chosen = [self.levels.index(level) for level in levels]
            other.decoder = nn.ModuleList(other.decoder[i] for i in chosen)
            other.mask_token = nn.Parameter(other.mask_token.detach()[:, chosen])
        return other

    def fit(self, train_dataloader: Any, val_dataloader: Any, output: Any, **options: Any) -> None:
        """Pre-train with Lightning; options as in `muvit.training.fit.fit_mae`."""
        from muvit.training.fit import fit_mae

        fit_mae(self, train_dataloader, val_dataloader, output, **options)

    def _draw(self, x: Tensor, consistent: bool, generator: torch.Generator | None, is_ratio: bool) -> TokenMask:
        if not consistent and not is_ratio:
            return self.draw_mask(x.shape[0], x.shape[3:], generator, x.device)
        count, config = prod(patch_grid(x.shape[3:], self.config.encoder.patch)), self.config
        if consistent:
            return draw_consistent_mask(
                x.shape[0], self.levels, count, ratio=config.masking_ratio, generator=generator, device=x.device
            )
        return draw_mask(
            len(x),
            len(self.levels),
            count,
            mode=config.masking_mode,
            is_ratio=True,
            generator=generator,
            device=x.device,
        )


class MuViTMAE2d(_MAE):
    """Masked autoencoder for images (yx); arguments: fields of `MAEConfig` and `EncoderConfig`."""

    ndim = 2


class MuViTMAE3d(_MAE):
    """Masked autoencoder for volumes (zyx); arguments: fields of `MAEConfig` and `EncoderConfig`."""

    ndim = 3


class MuViTMAE4d(_MAE):
    """Masked autoencoder for volumes over time (tzyx); arguments: fields of `MAEConfig` and `EncoderConfig`."""

    ndim = 4
