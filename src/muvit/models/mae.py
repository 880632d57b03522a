"""Masked autoencoder over several resolutions: visible tokens, light decoders, reconstruction (MuViT, section 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from muvit.checks import Bounds, NonNegative, Positive, PositiveInt, Share, check_fields, freeze_lists
from muvit.errors import InputError
from muvit.levels import Level
from muvit.models.encoder import EncoderConfig, MuViTEncoder
from muvit.models.folder import FolderModel
from muvit.models.layers.attention import Block, level_mask
from muvit.models.layers.patch import patch_grid, unpatchify
from muvit.models.layers.rope import FixedPositions, RotaryBase, RotaryMode, build_ropes
from muvit.models.masking import TokenMask, draw_mask


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and choices of a `MuViTDecoder`."""

    kind: ClassVar[str] = "decoder"

    in_channels: PositiveInt
    """Width of the tokens that come in."""
    dim: PositiveInt = 256
    """Token width inside."""
    num_layers: PositiveInt = 2
    """Transformer blocks."""
    heads: PositiveInt = 8
    """Attention heads."""
    rotary_mode: RotaryMode = "per_layer"
    """As in the encoder."""
    rotary_base: RotaryBase = 10000.0
    """As in the encoder."""
    dropout: Share = 0.0
    """Dropout inside the feed-forward networks."""
    ndim: Annotated[int, Bounds(min=2, max=4)] = 2
    """Spatial axes: 2 (yx), 3 (zyx) or 4 (tzyx)."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_fields(self, prefix="decoder ")


class MuViTDecoder(FolderModel):
    """Projection, then transformer blocks; the first block attends to the context instead of to its own tokens.

    Args:
        config: sizes and choices.
    """

    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.proj = nn.Sequential(nn.Linear(config.in_channels, config.dim), nn.GELU(), nn.LayerNorm(config.dim))
        ropes = build_ropes(
            config.rotary_mode, config.num_layers, config.dim // config.heads, config.ndim, config.rotary_base
        )
        self.layers = nn.ModuleList(Block(config.dim, config.heads, rope, config.dropout) for rope in ropes)

    def forward(
        self,
        x: Tensor,
        coords: Tensor | None = None,
        context: Tensor | None = None,
        context_coords: Tensor | None = None,
    ) -> Tensor:
        """Decode tokens.

        Args:
            x: ``(B, N, in_channels)``.
            coords: coordinates ``(B, N, ndim)`` in world pixels, best near the origin; None leaves the tokens without
                position.
            context: tokens ``(B, M, in_channels)`` that the first block attends to; None: ``x`` itself.
            context_coords: coordinates ``(B, M, ndim)`` of the context, from the same origin.

        Returns:
            ``(B, N, dim)``.
        """
        projected = None if context is None else self.proj(context)
        return self.run_blocks(self.proj(x), coords, projected, context_coords)

    def run_blocks(
        self, x: Tensor, coords: Tensor | None, context: Tensor | None, context_coords: Tensor | None
    ) -> Tensor:
        """Send tokens through the blocks; as `forward`, of tokens and context that are projected, ``(B, N, dim)``."""
        for i, block in enumerate(self.layers):
            assert isinstance(block, Block)
            rotation = None if coords is None else block.rotation(coords)
            context_kv = None
            if i == 0 and context is not None:
                seen = None if context_coords is None else block.rotation(context_coords)
                context_kv = block.attn.keys_values(context, seen)
            x = block(x, rotation, context_kv=context_kv)
        return x


NORM_EPS = 0.01
"""Added to the standard deviation of a patch before it divides."""


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """Sizes and choices of a `MuViTMAE`; the defaults are the paper's."""

    kind: ClassVar[str] = "mae"

    encoder: EncoderConfig
    """The multi-resolution encoder."""
    num_layers_decoder: PositiveInt = 2
    """Transformer blocks of each decoder."""
    dim_decoder: PositiveInt | None = 256
    """Token width of the decoders; None: that of the encoder."""
    decoder_mode: Literal["multi", "multi_iso", "single"] = "multi"
    """A decoder per level that looks at the context (multi) or at its own level only (multi_iso), or one for all."""
    decoder_context: Literal["visible", "all"] = "visible"
    """Tokens that decoders look at: the encoded visible ones (paper), or all with mask tokens (older checkpoints)."""
    loss: Literal["mse", "norm_mse", "laplacian"] = "mse"
    """Squared error of the pixels (mse), or of the pixels normalised per patch (norm_mse); or squared error of the mean
    of each patch plus absolute error of what its pixels differ from it by (laplacian, after Scale-MAE)."""
    loss_average: Literal["level", "token"] = "level"
    """Mean over the masked tokens of each level, then over the levels (paper), or over all masked tokens at once
    (older checkpoints)."""
    masking_ratio: Annotated[float, Bounds(above=0, below=1)] = 0.75
    """Share of all tokens that is masked."""
    masking_mode: Literal["dirichlet", "counts", "random"] | tuple[NonNegative, ...] = "dirichlet"
    """Allocation of the visible tokens to the levels: a draw from a Dirichlet distribution gives each level its weight
    (dirichlet), or its share of the visible tokens (counts, as MultiMAE); random treats all tokens alike; numbers are
    weights of the levels."""
    masking_alpha: Positive = 0.5
    """Concentration of that distribution: the lower, the more uneven; MultiMAE has 1."""
    share_masking_draw: bool = False
    """One Dirichlet draw for the whole batch (older checkpoints) instead of one per sample."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_fields(self)
        if self.encoder.coarse_copies != "none":  # a copy of a masked patch would show it
            hint = "Set them in the training that starts from this encoder."
            raise InputError("encoder.coarse_copies", expected="none", got=repr(self.encoder.coarse_copies), hint=hint)

    @property
    def decoder(self) -> DecoderConfig:
        """Settings of each decoder: beside its own, those of the encoder."""
        encoder = self.encoder
        return DecoderConfig(
            in_channels=encoder.dim,
            dim=self.dim_decoder or encoder.dim,
            num_layers=self.num_layers_decoder,
            heads=encoder.heads,
            rotary_mode=encoder.rotary_mode,
            rotary_base=encoder.rotary_base,
            dropout=encoder.dropout,
            ndim=encoder.ndim,
        )


class MuViTMAE(FolderModel):
    """Encoder for the visible tokens of all views, light decoders for the masked ones.

    Args:
        config: sizes and choices.
    """

    config: MAEConfig

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        encoder = config.encoder
        self.encoder = MuViTEncoder(encoder)
        num_decoders = 1 if config.decoder_mode == "single" else len(encoder.levels)
        self.decoder = nn.ModuleList(MuViTDecoder(config.decoder) for _ in range(num_decoders))
        self.mask_token = nn.Parameter(torch.randn(1, num_decoders, encoder.dim))
        has_fixed = encoder.fixed_positions != "none"
        self.fixed_positions = FixedPositions(config.decoder.dim, encoder.patch) if has_fixed else None
        self.final = nn.Linear(config.decoder.dim, prod(encoder.patch) * encoder.channels)

    @property
    def levels(self) -> tuple[Level, ...]:
        """Downsampling factor of each view that the model takes, in token order."""
        return self.config.encoder.levels

    def forward(
        self, x: Tensor, bbox: Tensor | None = None, *, mask: TokenMask | None = None, eps: float = NORM_EPS
    ) -> dict[str, Tensor]:
        """Mask, encode, decode, compare.

        Args:
            x: ``(B, L, C, *space)``.
            bbox: ``(B, L, 2, ndim)``, world pixels, (t)(z)yx; None places all levels around one common centre.
            mask: tokens to hide; unset, `draw_mask` chooses them.
            eps: added to the standard deviation of a patch under ``norm_mse``.

        Returns:
            ``input`` and ``output``: true and predicted patches ``(B, N, P...C)``; ``encoded`` ``(B, N_vis, D)``;
            ``decoded`` ``(B, N, D_dec)``; ``loss``: scalar; ``loss_per_level``: ``(L)``, NaN for a level without masked
            tokens.
        """
        patches = self.encoder.patches(x)
        mask = self.draw_mask(x.shape[0], x.shape[3:], device=x.device) if mask is None else mask
        offsets = self.encoder.offsets(x, bbox)
        tokens = self.encoder.embed(patches, offsets)
        _, positions = self.encoder.place(x, bbox)
        encoded = self.encode_visible(tokens, positions, mask)
        decoded = self.decode(encoded, positions, mask, offsets)
        output, truth = self.final(decoded), patches.flatten(1, 2)
        per_level, loss = self.loss(output, truth, mask, eps)
        result = {"input": truth, "output": output, "encoded": encoded, "decoded": decoded}
        return result | {"loss": loss, "loss_per_level": per_level}

    # -- the stages ----------------------------------------------------------------------------------------------------

    def draw_mask(
        self,
        batch: int,
        space: Sequence[int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> TokenMask:
        """Choose the tokens that are hidden.

        Args:
            batch: number of samples.
            space: pixels of every view along each axis.
            generator: source of randomness.
            device: place of the mask; unset, that of the generator, else the CPU.
        """
        config = self.config
        if device is None:
            device = "cpu" if generator is None else generator.device
        return draw_mask(
            batch,
            len(self.levels),
            prod(patch_grid(space, config.encoder.patch)),
            ratio=config.masking_ratio,
            mode=config.masking_mode,
            alpha=config.masking_alpha,
            share_draw=config.share_masking_draw,
            generator=generator,
            device=device,
        )

    def encode_visible(self, tokens: Tensor, positions: Tensor, mask: TokenMask) -> Tensor:
        """Encode the visible ones of tokens ``(B, N, D)`` at ``positions`` ``(B, N, ndim)``: ``(B, N_vis, D)``."""
        seen = mask.visible
        per_level = tokens.shape[1] // len(self.levels)
        may_see = level_mask(self.config.encoder.attention_mode, seen // per_level, seen // per_level)
        return self.encoder.run_blocks(_take(tokens, seen), _take(positions, seen), may_see)[0]

    def decode(self, encoded: Tensor, positions: Tensor, mask: TokenMask, offsets: Tensor | None = None) -> Tensor:
        """Decoded tokens ``(B, N, D_dec)`` of all levels from the encoded visible ones ``(B, N_vis, D)``.

        ``positions`` as of `MuViTEncoder.place`, ``offsets`` as of `MuViTEncoder.offsets`.
        """
        fixed = None if self.fixed_positions is None else self.fixed_positions(offsets).to(encoded.dtype)
        sees_all = self.config.decoder_mode == "multi" and self.config.decoder_context == "all"
        seen_at, per_decoder = _take(positions, mask.visible), positions.shape[1] // len(self.decoder)
        decoded = []
        for i, decoder in enumerate(self.decoder):
            assert isinstance(decoder, MuViTDecoder)
            own = slice(i * per_decoder, (i + 1) * per_decoder)
            tokens, seen = self._projected(decoder, encoded, mask, own)
            if fixed is not None:
                tokens, seen = tokens + fixed[:, own], seen + (fixed if sees_all else _take(fixed, mask.visible))
            context: tuple[Tensor | None, Tensor | None] = (None, None)
            if self.config.decoder_mode == "multi":
                context = (seen, positions if sees_all else seen_at)
            decoded.append(decoder.run_blocks(tokens, positions[:, own], *context))
        return torch.cat(decoded, dim=1)

    def _projected(self, decoder: MuViTDecoder, encoded: Tensor, mask: TokenMask, own: slice) -> tuple[Tensor, Tensor]:
        """Tokens ``(B, n, D_dec)`` of a decoder's own levels, and its context, as its projection leaves them.

        The visible tokens are projected once for both, and one mask token stands for all that are like it.
        """
        count, seen = own.stop - own.start, decoder.proj(encoded)
        mask_tokens = self.mask_token.to(encoded.dtype)
        if self.config.decoder_mode == "multi" and self.config.decoder_context == "all":
            whole = _put(seen, mask.visible, decoder.proj(mask_tokens).repeat_interleave(count, dim=1))
            return whole[:, own], whole
        blank = decoder.proj(mask_tokens[:, own.start // count, None])
        places = mask.visible - own.start
        # those of other levels go into one more place, which is then left out
        places = places.where((places >= 0) & (places < count), count)
        return _put(seen, places, blank.expand(-1, count + 1, -1))[:, :count], seen

    def loss(self, output: Tensor, patches: Tensor, mask: TokenMask, eps: float = NORM_EPS) -> tuple[Tensor, Tensor]:
        """Mean squared error of the masked patches.

        Args:
            output: predicted patches ``(B, N, P...C)``.
            patches: true ones, alike.
            mask: the hidden tokens.
            eps: as in `forward`.

        Returns:
            The loss of each level ``(L)``, NaN where none of its tokens is masked, and that of all, scalar.
        """
        target = patches.float()
        if self.config.loss == "norm_mse":
            mean, scale = patch_statistics(patches, eps)
            target = (target - mean) / scale
        error = self._error(output.float() - target)
        by_level = (error.shape[0], len(self.levels), -1)
        weight = mask.is_masked.to(error.dtype)
        total = (error * weight).reshape(by_level).sum((0, 2))
        return self.average(total, weight.reshape(by_level).sum((0, 2)))

    def _error(self, difference: Tensor) -> Tensor:
        """Error of each patch ``(B, N)`` from what its prediction is off by ``(B, N, P...C)``."""
        if self.config.loss != "laplacian":
            return difference.square().mean(-1)
        # squared in the low band and absolute in the high one; low is the area mean of a patch, as at 1/P of the pixels
        by_channel = difference.unflatten(-1, (-1, self.config.encoder.channels))
        low = by_channel.mean(-2, keepdim=True)
        return low.square().mean((-2, -1)) + (by_channel - low).abs().mean((-2, -1))

    def average(self, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each level ``(L)`` and of all, from the summed errors and the number of its masked tokens ``(L)``."""
        per_level = total / count
        if self.config.loss_average == "token":
            return per_level, total.sum() / count.sum()
        has_any = count > 0
        return per_level, torch.where(has_any, total / count.clamp(min=1), 0).sum() / has_any.sum()

    def restored_patches(self, output: Tensor, patches: Tensor, mask: TokenMask, eps: float = NORM_EPS) -> Tensor:
        """Patches ``(B, N, P...C)`` as they were where visible, else as predicted; arguments as in `loss`."""
        predicted = output.float()
        if self.config.loss == "norm_mse":
            mean, scale = patch_statistics(patches, eps)
            predicted = predicted * scale + mean
        return torch.where(mask.is_masked[..., None], predicted, patches)

    def to_views(self, patches: Tensor, space: Sequence[int]) -> Tensor:
        """Views ``(B, L, C, *space)`` of patches ``(B, N, P...C)``."""
        patch = self.config.encoder.patch
        return unpatchify(patches.unflatten(1, (len(self.levels), -1)), patch_grid(space, patch), patch)


def patch_statistics(patches: Tensor, eps: float = NORM_EPS) -> tuple[Tensor, Tensor]:
    """Mean, and unbiased standard deviation plus ``eps``, of each of the patches ``(B, N, P...C)``: ``(B, N, 1)``."""
    patches = patches.float()
    return patches.mean(-1, keepdim=True), patches.std(-1, keepdim=True) + eps


def _take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Tokens ``(B, M, D)`` at ``indices`` ``(B, M)`` of ``(B, N, D)``."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def _put(tokens: Tensor, indices: Tensor, blank: Tensor) -> Tensor:
    """Of each sample, ``blank`` ``(1, N, D)`` with the tokens ``(B, M, D)`` at ``indices`` ``(B, M)``."""
    return blank.expand(tokens.shape[0], -1, -1).scatter(1, indices[..., None].expand_as(tokens), tokens)
