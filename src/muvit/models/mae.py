"""Multi-resolution masked autoencoder: hide most patches of all views, reconstruct them from the rest."""

import copy as copying
from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from math import prod
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from muvit.errors import InputError
from muvit.geometry import PatchSpacing
from muvit.levels import Level, plain_level
from muvit.models.encoder import EncoderConfig, MuViTEncoder, MuViTEncoder2d, MuViTEncoder3d, MuViTEncoder4d, RotaryMode
from muvit.models.folder import FolderModel
from muvit.models.layers.attention import AttentionMode, level_mask
from muvit.models.layers.patch import patch_grid, unpatchify
from muvit.models.mae_decoder import MuViTDecoder, MuViTDecoder2d, MuViTDecoder3d, MuViTDecoder4d
from muvit.models.masking import TokenMask, draw_consistent_mask, draw_mask

DecoderMode = Literal["multi", "multi_iso", "single"]

MASK_GREY = 0.5
"""What stands for masked patches in pictures, as in the paper's figure 2."""


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """Sizes and choices of a `MuViTMAE`; the defaults are the paper's."""

    in_channels: int = 1
    """Channels of the images."""
    levels: tuple[Level, ...] = (1, 4)
    """Downsampling factor of each view, finest first: one number, or one per axis, such as [1, 4, 4]."""
    patch_size: int | tuple[int, ...] = 8
    """Side of a patch in pixels of its level: one number, or one per axis."""
    num_layers: int = 12
    """Transformer blocks of the encoder."""
    dim: int = 512
    """Token width of the encoder."""
    num_layers_decoder: int = 2
    """Transformer blocks of each decoder."""
    dim_decoder: int | None = 256
    """Token width of the decoders; None: that of the encoder."""
    heads: int = 8
    """Attention heads of encoder and decoders."""
    decoder_mode: DecoderMode = "multi"
    """A decoder per level that looks at the context (multi) or at its own level only (multi_iso), or one for all."""
    loss: Literal["mse", "norm_mse"] = "mse"
    """Squared error of the pixels, or of the pixels normalised per patch."""
    masking_ratio: float = 0.75
    """Share of all tokens that is masked."""
    use_level_embed: bool = True
    """Add a learnable vector per level to its tokens."""
    rotary_mode: RotaryMode = "per_layer"
    """Rotary frequencies: none, fixed, learnable and shared by all blocks, or learnable in each block."""
    rotary_base: float = 10000.0
    """Initial base of the frequencies."""
    attention_mode: AttentionMode = "all"
    """Levels that a token sees in the encoder."""
    masking_mode: Literal["dirichlet", "random"] | tuple[float, ...] = "dirichlet"
    """How the visible tokens are shared out between the levels; numbers are weights of the levels."""
    input_space: Literal["real"] = "real"
    """Space of the patches; ``real`` pixels are the only one (kept from release 0.1.0)."""
    dropout: float = 0.0
    """Dropout inside the feed-forward networks."""
    level_embed_std: float = 1.0
    """Standard deviation of the level vectors at initialisation."""
    patch_spacing: PatchSpacing = "center"
    """Coordinates of patches: true centres (paper), or spread from corner to corner of the box (release 0.1.0)."""
    decoder_context: Literal["visible", "all"] = "visible"
    """What decoders look at: the encoded visible tokens (paper), or all tokens with mask tokens (release 0.1.0)."""
    loss_average: Literal["level", "token"] = "level"
    """Mean over the masked tokens of each level, then over the levels (paper), or over all masked tokens at once
    (release 0.1.0)."""
    share_masking_draw: bool = False
    """One Dirichlet draw for the whole batch (release 0.1.0) instead of one per sample."""
    ndim: int = 2
    """Spatial axes: 2 (yx), 3 (zyx) or 4 (tzyx)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(map(plain_level, self.levels)))
        for name in ("patch_size", "masking_mode"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _ = self.encoder  # which checks what encoder and model share
        if not 0 < self.masking_ratio < 1:
            raise InputError("masking_ratio", expected="a share between 0 and 1", got=self.masking_ratio)
        for name, allowed in (
            ("decoder_mode", ("multi", "multi_iso", "single")),
            ("loss", ("mse", "norm_mse")),
            ("decoder_context", ("visible", "all")),
            ("loss_average", ("level", "token")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(name, expected=" or ".join(allowed), got=repr(getattr(self, name)))

    @property
    def encoder(self) -> EncoderConfig:
        """Settings of the encoder."""
        shared = {f.name for f in fields_of(EncoderConfig)} & {f.name for f in fields_of(self)}
        return EncoderConfig(**{name: getattr(self, name) for name in shared})

    @property
    def patch(self) -> tuple[int, ...]:
        """Patch side along each axis."""
        return self.encoder.patch


class MuViTMAE(FolderModel):
    """Encoder for the visible tokens of all views, light decoders for the masked ones.

    Args:
        **fields: the fields of `MAEConfig` but ``ndim``, which the class binds.
    """

    config: MAEConfig
    encoder_class: ClassVar[type[MuViTEncoder]]
    decoder_class: ClassVar[type[MuViTDecoder]]
    legacy_settings: ClassVar[dict[str, Any]] = {
        "patch_spacing": "corner",
        "decoder_context": "all",
        "loss_average": "token",
        "share_masking_draw": True,
    }

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        if self.ndim is None:
            raise TypeError("build MuViTMAE2d, MuViTMAE3d or MuViTMAE4d")
        self.config = config = MAEConfig(ndim=self.ndim, **fields)
        self.encoder = self.encoder_class(**_without_ndim(config.encoder))
        decoders = [self._build_decoder() for _ in range(1 if config.decoder_mode == "single" else len(config.levels))]
        self.decoder = nn.ModuleList(decoders)
        self.mask_token = nn.Parameter(torch.randn(1, len(decoders), config.dim))
        width = prod(config.patch) * config.in_channels
        self.final = nn.Linear(decoders[0].config.dim, width)

    @property
    def levels(self) -> tuple[Level, ...]:
        """Downsampling factor of each view that the model takes, in token order."""
        return self.config.levels

    def forward(
        self,
        x: Tensor,
        bbox: Tensor | None = None,
        return_all: bool = False,
        eps: float = 0.01,
        consistent_levels: bool = False,
        rng_generator: torch.Generator | None = None,
        masking_mode_is_ratio: bool = False,
        mask: TokenMask | None = None,
    ) -> dict[str, Tensor]:
        """Mask, encode, decode, compare.

        Args:
            x: ``(B, L, C, *space)``.
            bbox: ``(B, L, 2, ndim)``, world pixels, (t)(z)yx; None places all levels around one common centre.
            return_all: also return what pictures and studies need.
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
        tokens, patches = (t.flatten(1, 2) for t in self.encoder.embed(x))
        positions = self.encoder.token_positions(x, bbox)
        if mask is None:
            mask = self._draw(
                x.shape[0],
                tokens.shape[1] // len(self.levels),
                x.device,
                rng_generator,
                consistent_levels,
                masking_mode_is_ratio,
            )
        encoded = self.encode_visible(tokens, positions, mask)
        decoded = self.decode(encoded, positions, mask)
        output = self.final(decoded)
        target, mean, scale = self._target(patches, eps)
        error = (output.float() - target).square().mean(-1)
        per_level, loss = self.average(*self._summed(error, mask.is_masked))
        result = {"input": patches, "output": output, "loss": loss, "loss_per_level": per_level}
        if not return_all:
            return result
        hidden = mask.is_masked[..., None]
        restored = torch.where(hidden, output.float() * scale + mean, patches)
        greyed = patches.masked_fill(hidden, MASK_GREY)
        views = {"reco": restored, "input_masked": greyed, "mask": hidden.expand_as(patches)}
        images = {name: self.patch_token_to_image(value, *x.shape[2:]) for name, value in views.items()}
        return result | images | {"encoded": encoded, "decoded": decoded}

    def draw_mask(self, batch: int, space: Sequence[int], generator: torch.Generator) -> TokenMask:
        """Mask for ``batch`` samples of views of ``space`` pixels, as `forward` draws it, on the generator's device."""
        per_level = prod(patch_grid(space, self.config.patch))
        return self._draw(batch, per_level, generator.device, generator)

    def average(self, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each level ``(L)`` and of all, from the summed errors and the number of its masked tokens ``(L)``."""
        per_level = total / count
        if self.config.loss_average == "token":
            return per_level, total.sum() / count.sum()
        has_any = count > 0
        return per_level, torch.where(has_any, total / count.clamp(min=1), 0).sum() / has_any.sum()

    def encode_visible(self, tokens: Tensor, positions: Tensor, mask: TokenMask) -> Tensor:
        """Encode the visible ones of tokens ``(B, N, D)`` at ``positions`` ``(B, N, ndim)``: ``(B, N_vis, D)``."""
        seen = mask.visible
        per_level = tokens.shape[1] // len(self.levels)
        may_see = level_mask(self.config.attention_mode, seen // per_level, seen // per_level)
        return self.encoder.run_blocks(_take(tokens, seen), _take(positions, seen), may_see)[0]

    def decode(self, encoded: Tensor, positions: Tensor, mask: TokenMask) -> Tensor:
        """Decoded tokens ``(B, N, D_dec)`` of all levels from the encoded visible ones ``(B, N_vis, D)``."""
        per_level = positions.shape[1] // len(self.levels)
        repeats = positions.shape[1] // self.mask_token.shape[1]
        blank = self.mask_token.to(encoded.dtype).repeat_interleave(repeats, dim=1).expand(encoded.shape[0], -1, -1)
        tokens = blank.scatter(1, mask.visible[..., None].expand_as(encoded), encoded)
        if self.config.decoder_mode == "single":
            return self.decoder[0](tokens, positions)
        context: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.config.decoder_mode == "multi":
            shows_all = self.config.decoder_context == "all"
            context = (tokens, positions) if shows_all else (encoded, _take(positions, mask.visible))
        own = zip(tokens.split(per_level, 1), positions.split(per_level, 1), strict=True)
        return torch.cat([dec(x, at, *context) for dec, (x, at) in zip(self.decoder, own, strict=True)], dim=1)

    def patch_token_to_image(self, x: Tensor, *shape: int) -> Tensor:
        """Views ``(B, L, C, *space)`` of patches ``(B, N, P...C)``; ``shape`` is ``C, *space``."""
        patch = self.encoder.config.patch
        return unpatchify(x.unflatten(1, (len(self.levels), -1)), patch_grid(shape[1:], patch), patch)

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
        other.config = replace(self.config, levels=levels)
        if self.config.decoder_mode != "single":
            chosen = [self.levels.index(level) for level in levels]
            other.decoder = nn.ModuleList(other.decoder[i] for i in chosen)
            other.mask_token = nn.Parameter(other.mask_token.detach()[:, chosen])
        return other

    def _build_decoder(self) -> MuViTDecoder:
        config = self.config
        return self.decoder_class(
            in_channels=config.dim,
            dim=config.dim_decoder or config.dim,
            num_layers=config.num_layers_decoder,
            heads=config.heads,
            rotary_mode=config.rotary_mode,
            rotary_base=config.rotary_base,
            dropout=config.dropout,
        )

    def _draw(
        self,
        batch: int,
        tokens_per_level: int,
        device: torch.device,
        generator: torch.Generator | None,
        is_consistent: bool = False,
        is_ratio: bool = False,
    ) -> TokenMask:
        ratio = self.config.masking_ratio
        if is_consistent:
            return draw_consistent_mask(
                batch, self.levels, tokens_per_level, ratio=ratio, generator=generator, device=device
            )
        return draw_mask(
            batch,
            len(self.levels),
            tokens_per_level,
            ratio=ratio,
            mode=self.config.masking_mode,
            is_ratio=is_ratio,
            share_draw=self.config.share_masking_draw,
            generator=generator,
            device=device,
        )

    def _target(self, patches: Tensor, eps: float) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """What the output is compared with, and the mean and scale that lead back to pixels."""
        patches = patches.float()
        if self.config.loss == "mse":
            return patches, 0.0, 1.0
        mean, scale = patches.mean(-1, keepdim=True), patches.std(-1, keepdim=True) + eps
        return (patches - mean) / scale, mean, scale

    def _summed(self, error: Tensor, is_masked: Tensor) -> tuple[Tensor, Tensor]:
        """Error of the masked tokens ``(B, N)`` and their number, summed over each level ``(L)``."""
        shape = (error.shape[0], len(self.levels), -1)
        weight = is_masked.to(error.dtype)
        return (error * weight).reshape(shape).sum((0, 2)), weight.reshape(shape).sum((0, 2))


class MuViTMAE2d(MuViTMAE):
    """`MuViTMAE` for images (yx)."""

    ndim: ClassVar[int] = 2
    encoder_class = MuViTEncoder2d
    decoder_class = MuViTDecoder2d


class MuViTMAE3d(MuViTMAE):
    """`MuViTMAE` for volumes (zyx)."""

    ndim: ClassVar[int] = 3
    encoder_class = MuViTEncoder3d
    decoder_class = MuViTDecoder3d


class MuViTMAE4d(MuViTMAE):
    """`MuViTMAE` for volumes over time (tzyx)."""

    ndim: ClassVar[int] = 4
    encoder_class = MuViTEncoder4d
    decoder_class = MuViTDecoder4d


MAES: dict[int, type[MuViTMAE]] = {2: MuViTMAE2d, 3: MuViTMAE3d, 4: MuViTMAE4d}
"""The model for each number of spatial axes."""


def build_mae(config: MAEConfig) -> MuViTMAE:
    """The model of a config, for its number of axes.

    Raises:
        InputError: there is no model for so many axes.
    """
    if config.ndim not in MAES:
        raise InputError("ndim", expected=f"one of {sorted(MAES)}", got=config.ndim)
    return MAES[config.ndim](**_without_ndim(config))


def _without_ndim(config: EncoderConfig | MAEConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields_of(config) if f.name != "ndim"}


def _take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Tokens ``(B, M, D)`` at ``indices`` ``(B, M)`` of ``(B, N, D)``."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))
