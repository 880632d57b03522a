"""The multi-resolution encoder: one transformer over the patches of all views, placed by world coordinates."""

import copy as copying
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from muvit.checks import Bounds, NonNegative, PositiveInt, Share, check_fields, freeze_lists
from muvit.errors import InputError, ShapeError
from muvit.geometry import PatchSpacing, naive_boxes, patch_centers
from muvit.levels import Level, level_factors, plain_level
from muvit.models.folder import FolderModel
from muvit.models.layers.attention import AttentionMode, Block, Spans, level_spans, mask_of_queries, random_key_mask
from muvit.models.layers.copies import CopiedPatches, TokenCopies, copied_tokens
from muvit.models.layers.patch import patch_grid, patchify
from muvit.models.layers.rope import (
    FixedPositions,
    RotaryBase,
    RotaryMode,
    RotaryParam,
    Rotation,
    build_ropes,
)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes and choices of a `MuViTEncoder`; the defaults are the paper's (MuViT sections 3.1 and 3.2)."""

    kind: ClassVar[str] = "encoder"

    in_channels: PositiveInt | None = None
    """Channels of the images; unset in a recipe, those of the slides."""
    levels: tuple[Level, ...]
    """Downsampling factor of each view, finest first: one number, or one per axis, such as [1, 4, 4]."""
    patch_size: PositiveInt | tuple[PositiveInt, ...] = 8
    """Side of a patch in pixels of its level: one number, or one per axis."""
    num_layers: PositiveInt = 12
    """Transformer blocks."""
    dim: PositiveInt = 512
    """Token width."""
    heads: PositiveInt = 8
    """Attention heads."""
    attention_mode: AttentionMode = "all"
    """Levels that a token sees: all; causal (own and finer); same; random; coarse_to_fine (own and coarser)."""
    coarse_copies: CopiedPatches = "none"
    """Under coarse_to_fine, coarse patches with a second token that sees finer ones too: none; under, those that the
    finest view can meet; ring, also those around them."""
    use_level_embed: bool = True
    """Add a learnable vector per level to its tokens."""
    level_embed_std: NonNegative = 1.0
    """Standard deviation of the level vectors at initialisation; small models learn faster from 0.02."""
    rotary_mode: RotaryMode = "per_layer"
    """Rotary frequencies: none, fixed, learnable and shared by all blocks, or learnable in each block."""
    rotary_param: RotaryParam = "freq"
    """Learnable parameters of the rotation: every frequency, or one base per axis."""
    rotary_base: RotaryBase = 10000.0
    """Initial base of the frequencies, made for worlds of 1e5 px; about 100 suits worlds of 1e3 px. Or the shortest and
    longest period in world pixels, such as [16, 512], with the others evenly between them on a logarithmic scale."""
    fixed_positions: Literal["none", "grid", "scaled"] = "none"
    """Sines and cosines added to the tokens, for controls without world coordinates (rotary_mode none): none (paper);
    place of a patch in the grid of its own view, alike at all levels (grid, as MultiMAE); or the same times the size of
    the view's pixels (scaled, as Scale-MAE)."""
    patch_spacing: PatchSpacing = "center"
    """Coordinates of patches: true centres (paper), or spread from corner to corner of the box (older checkpoints)."""
    dropout: Share = 0.0
    """Dropout inside the feed-forward networks."""
    ndim: Annotated[int, Bounds(min=2, max=4)] = 2
    """Spatial axes: 2 (yx), 3 (zyx) or 4 (tzyx)."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_fields(self)
        object.__setattr__(self, "levels", tuple(map(plain_level, self.levels)))
        for level in self.levels:
            level_factors(level, self.ndim)
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise InputError("levels", expected="distinct positive downsampling factors", got=self.levels)
        if isinstance(self.rotary_base, tuple) and self.rotary_base[0] >= self.rotary_base[1]:
            raise InputError("rotary_base", expected="a shorter and a longer period", got=self.rotary_base)
        if self.coarse_copies != "none" and self.attention_mode != "coarse_to_fine":
            expected = f"none, as attention_mode is {self.attention_mode}"
            raise InputError("coarse_copies", expected=expected, got=repr(self.coarse_copies))
        if self.fixed_positions != "none" and self.attention_mode == "coarse_to_fine":
            got = f"{self.fixed_positions} with attention_mode coarse_to_fine, whose levels are placed in the world"
            raise InputError("fixed_positions", expected="none", got=got)
        if len(self.patch) != self.ndim:
            raise InputError("patch_size", expected=f"a number, or {self.ndim} of them", got=self.patch_size)

    @property
    def channels(self) -> int:
        """Channels of the images.

        Raises:
            InputError: they are not set.
        """
        if self.in_channels is None:
            raise InputError("in_channels", expected="the number of channels, to build a model", got="none")
        return self.in_channels

    @property
    def patch(self) -> tuple[int, ...]:
        """Patch side along each axis."""
        return (self.patch_size,) * self.ndim if isinstance(self.patch_size, int) else self.patch_size


class Encoding(NamedTuple):
    """Tokens of all views, or of the finest alone."""

    tokens: Tensor
    """``(B, N, D)`` after the last block."""
    kept: tuple[Tensor, ...]
    """``(B, N, D)`` after some blocks, in their order."""
    coords: Tensor
    """World coordinates ``(B, N, ndim)`` of the patch centres of all views."""
    positions: Tensor
    """The same in float32 from an origin within the sample, as they are rotated by."""


class MuViTEncoder(FolderModel):
    """Transformer over the patches of several views of one scene (MuViT sections 3.1 and 3.2).

    Every patch becomes a token through its level's own embedding; all tokens attend to each other, rotated by the world
    coordinates of their patch centres. Tokens are ordered by level (in the order of ``levels``), then row-major.

    Args:
        config: sizes and choices.
    """

    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        num_levels, width = len(config.levels), prod(config.patch) * config.channels
        self.proj = nn.ModuleList(
            nn.Sequential(nn.Linear(width, config.dim), nn.LayerNorm(config.dim)) for _ in config.levels
        )
        self.level_embed = (
            nn.Parameter(config.level_embed_std * torch.randn(num_levels, config.dim))
            if config.use_level_embed
            else None
        )
        self.copies = TokenCopies(config.dim) if config.coarse_copies != "none" and num_levels > 1 else None
        has_fixed = config.fixed_positions != "none"
        self.fixed_positions = FixedPositions(config.dim, config.patch) if has_fixed else None
        ropes = build_ropes(
            config.rotary_mode,
            config.num_layers,
            config.dim // config.heads,
            config.ndim,
            config.rotary_base,
            config.rotary_param,
        )
        self.layers = nn.ModuleList(Block(config.dim, config.heads, rope, config.dropout) for rope in ropes)

    @property
    def levels(self) -> tuple[Level, ...]:
        """Downsampling factor of each view that the encoder takes, in token order."""
        return self.config.levels

    def forward(
        self, x: Tensor, bbox: Tensor | None = None, return_intermediate_idxs: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Encode the views of each sample.

        Args:
            x: ``(B, L, C, *space)``.
            bbox: ``(B, L, 2, ndim)``, world pixels, (t)(z)yx; None places all levels around one common centre, whatever
                was cropped (the paper's naive boxes).
            return_intermediate_idxs: indices of blocks (0-based) whose outputs to return as well.

        Returns:
            Tokens ``(B, N, D)``; world coordinates of their patch centres ``(B, N, ndim)``; their level indices
            ``(B, N)``; and, if asked for, the outputs of the given blocks, each ``(B, N, D)``, in block order.

        Raises:
            ShapeError: images or boxes have the wrong shape.
        """
        found = self.encode(x, bbox, return_intermediate_idxs or ())
        level_idx = torch.arange(len(self.levels), device=x.device).repeat_interleave(
            found.tokens.shape[1] // len(self.levels)
        )
        outputs = (found.tokens, found.coords, level_idx.expand(x.shape[0], -1))
        return outputs if return_intermediate_idxs is None else (*outputs, found.kept)

    def encode(
        self, x: Tensor, bbox: Tensor | None = None, keep: Sequence[int] = (), *, only_finest: bool = False
    ) -> Encoding:
        """Embed, place, and send through the blocks.

        Args:
            x: as in `forward`.
            bbox: as in `forward`.
            keep: indices of blocks (0-based) whose outputs to return as well.
            only_finest: return tokens of the finest view alone; in the last block only these are computed.

        Raises:
            ShapeError: images or boxes have the wrong shape.
        """
        tokens = self.embed(self.patches(x), self.offsets(x, bbox))
        coords, positions = self.place(x, bbox)
        queries = slice(tokens.shape[1] // len(self.levels)) if only_finest else None
        if self.copies is None:
            tokens, kept = self.run_blocks(tokens, positions, self.level_mask(tokens), keep, queries)
            return Encoding(tokens, kept, coords, positions)
        added, at = self.copies(tokens, positions, self.copied_tokens(x, self.boxes(x, bbox)))
        mask = self.level_mask(tokens, added.shape[1])
        both = torch.cat([tokens, added], dim=1), torch.cat([positions, at], dim=1)
        tokens, kept = self.run_blocks(*both, mask, keep, queries or slice(tokens.shape[1]))
        return Encoding(tokens, kept, coords, positions)

    def compute_features(self, x: Tensor, bbox: Tensor | None = None) -> Tensor:
        """Features as maps, ``(B, L, D, *grid)``; arguments as in `forward`."""
        return self.to_maps(self(x, bbox)[0], x.shape[3:])

    # -- the stages ----------------------------------------------------------------------------------------------------

    def patches(self, x: Tensor) -> Tensor:
        """Patches ``(B, L, n, P...C)`` of views ``(B, L, C, *space)``.

        Raises:
            ShapeError: the views are others than the encoder takes.
        """
        self.check_images(x, len(self.levels))
        return patchify(x, self.config.patch)

    def embed(self, patches: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Tokens ``(B, N, D)`` before the first block, from the `patches` of all levels and their `offsets`."""
        tokens = torch.cat([self.embed_level(i, level) for i, level in enumerate(patches.unbind(1))], dim=1)
        return tokens if self.fixed_positions is None else tokens + self.fixed_positions(offsets).to(tokens.dtype)

    def embed_level(self, level: int, patches: Tensor) -> Tensor:
        """Tokens ``(B, n, D)`` of the patches ``(B, n, P...C)`` of the level with index ``level``."""
        tokens = self.proj[level](patches)
        return tokens if self.level_embed is None else tokens + self.level_embed[level]

    def place(self, x: Tensor, bbox: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Places of the tokens of views ``(B, L, C, *space)``, arguments as in `forward` (MuViT section 3.1).

        Returns:
            World coordinates ``(B, N, ndim)`` of the patch centres; and the same in float32 from an origin within the
            sample, as they are rotated by: attention sees differences only, so it is the same wherever a sample lies.

        Raises:
            ShapeError: the boxes have the wrong shape.
        """
        boxes = self.boxes(x, bbox)
        if bbox is None:
            coords = self.centers(x, boxes).flatten(1, 2)
            return coords, coords.float()
        origin = boxes[:, :1, :1]
        # subtracted before the division by patches, corners are whole pixels and the difference is exact
        local = self.centers(x, boxes - origin).flatten(1, 2)
        return local + origin[:, 0], local.float()

    def offsets(self, x: Tensor, bbox: Tensor | None = None) -> Tensor | None:
        """Places of patches in their own views, as fixed positions count them; None without these.

        Pixels ``(B, N, ndim)`` from the lower corner of the view to the centre of the patch: those of the view (grid),
        or of the world (scaled, so times ``g / G``, the size of the view's pixels over that of level 1); arguments as
        in `forward`.
        """
        if self.fixed_positions is None:
            return None
        is_grid = self.config.fixed_positions == "grid"
        boxes = self._naive_boxes(x, (1,) * len(self.levels)) if is_grid else self.boxes(x, bbox)
        return self.centers(x, boxes - boxes[..., :1, :]).flatten(1, 2)

    def centers(self, x: Tensor, bbox: Tensor) -> Tensor:
        """Patch centres ``(..., n, ndim)`` of views ``(..., C, *space)`` in boxes ``(..., 2, ndim)``."""
        return patch_centers(
            bbox, patch_grid(x.shape[-self.config.ndim :], self.config.patch), self.config.patch_spacing
        )

    def copied_tokens(self, x: Tensor, boxes: Tensor) -> Tensor:
        """Indices ``(B, c)`` of the coarse tokens that `copies` copies, of views in ``boxes`` ``(B, L, 2, ndim)``."""
        grid = patch_grid(x.shape[-self.config.ndim :], self.config.patch)
        return copied_tokens(self.config.coarse_copies, self.levels, grid, boxes)

    def run_blocks(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | Spans | None,
        keep: Sequence[int] = (),
        queries: slice | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Send tokens through all blocks, and keep the outputs of some.

        Args:
            tokens: ``(B, N, D)``.
            positions: ``(B, N, ndim)``, see `place`.
            mask: keys that each query may see.
            keep: indices of blocks (0-based).
            queries: the only tokens that are returned, and computed in the last block, from the first on; unset, all.

        Returns:
            Tokens ``(B, N, D)`` after the last block, and after each of the blocks in ``keep``, in block order.
        """
        kept = []
        last = len(self.layers) - 1
        for i, (block, rotation) in enumerate(self.rotated_blocks(positions)):
            if i == last and queries is not None:
                tokens = block(tokens, rotation, mask=mask_of_queries(mask, queries), queries=queries)
            else:
                tokens = block(tokens, rotation, mask=mask)
            if i in keep:
                kept.append(tokens if queries is None else tokens[:, queries])
        return tokens, tuple(kept)

    def rotated_blocks(self, positions: Tensor) -> Iterator[tuple[Block, Rotation | None]]:
        """Every block with its angles for tokens at ``positions`` ``(B, N, ndim)``."""
        rotations: dict[int, Rotation | None] = {}
        for block in self.layers:
            assert isinstance(block, Block)
            rope = id(block.rotary_pos_embs)
            if rope not in rotations:  # shared frequencies are evaluated once
                rotations = {rope: block.rotation(positions)}
            yield block, rotations[rope]

    def level_mask(self, tokens: Tensor, num_copies: int = 0) -> Tensor | Spans | None:
        """Keys that each of the tokens ``(B, N, D)`` of all levels may see, and copies after them; None where each sees
        all."""
        mode, count = self.config.attention_mode, tokens.shape[1]
        if mode == "random":
            return random_key_mask(count, count, tokens.device)
        return level_spans(mode, len(self.levels), count // len(self.levels), num_copies)

    def to_maps(self, tokens: Tensor, space: Sequence[int]) -> Tensor:
        """Arrange tokens ``(B, N, D)`` of L views of shape ``space`` as maps ``(B, L, D, *grid)``."""
        grid = patch_grid(space, self.config.patch)
        return tokens.unflatten(1, (-1, *grid)).movedim(-1, 2)

    # -- levels and checks ---------------------------------------------------------------------------------------------

    def extract_levels(self, levels: Sequence[Level], copy: bool = True) -> Self:
        """An encoder for some of the levels, with their embeddings and all blocks.

        Args:
            levels: levels to keep, in the order that the new encoder shall take them.
            copy: false returns this very encoder if it has just these levels.

        Raises:
            InputError: the encoder does not have one of the levels.
        """
        levels = tuple(map(plain_level, levels))
        if levels == self.levels and not copy:
            return self
        for level in levels:
            if level not in self.levels:
                raise InputError(f"Level {level} not found", expected=f"levels out of {self.levels}", got=levels)
        chosen = [self.levels.index(level) for level in levels]
        other = copying.deepcopy(self)
        other.config = replace(self.config, levels=levels)
        other.proj = nn.ModuleList(other.proj[i] for i in chosen)
        if other.level_embed is not None:
            other.level_embed = nn.Parameter(other.level_embed.detach()[chosen])
        if len(levels) == 1:
            other.copies = None
        return other

    def check_images(self, x: Tensor, num_levels: int) -> None:
        """Refuse images that are no views of ``num_levels`` levels.

        Raises:
            ShapeError: they have other levels, channels or axes.
        """
        expected = (num_levels, self.config.channels)
        if x.ndim != 3 + self.config.ndim or tuple(x.shape[1:3]) != expected:
            axes = ", ".join("tzyx"[-self.config.ndim :])
            raise ShapeError("img", expected=f"shape (B, L={expected[0]}, C={expected[1]}, {axes})", got=tuple(x.shape))

    def check_boxes(self, x: Tensor, bbox: Tensor) -> Tensor:
        """Boxes of the views ``(B, L, C, *space)``, as floating-point numbers.

        Raises:
            ShapeError: their shape is not ``(B, L, 2, ndim)``.
        """
        expected = (*x.shape[:2], 2, self.config.ndim)
        if tuple(bbox.shape) != expected:
            raise ShapeError("bbox", expected=f"shape (B, L, 2, ndim) = {expected}", got=tuple(bbox.shape))
        return bbox if bbox.is_floating_point() else bbox.double()

    def boxes(self, x: Tensor, bbox: Tensor | None) -> Tensor:
        """Boxes ``(B, L, 2, ndim)`` of views ``(B, L, C, *space)``, arguments as in `forward`.

        Raises:
            ShapeError: the boxes have the wrong shape.
        """
        return self._naive_boxes(x, self.levels) if bbox is None else self.check_boxes(x, bbox)

    def _naive_boxes(self, x: Tensor, levels: Sequence[Level]) -> Tensor:
        boxes = naive_boxes(levels, x.shape[3:], self.config.patch_spacing)
        return boxes.to(x.device, non_blocking=True).expand(x.shape[0], *boxes.shape)
