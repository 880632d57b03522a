"""The multi-resolution encoder: one transformer over the patches of all views, placed by world coordinates."""

import copy as copying
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf, prod
from typing import Any, ClassVar, Literal, Self, get_args, get_type_hints

import torch
from torch import Tensor, nn

from muvit.errors import InputError, ShapeError
from muvit.geometry import PatchSpacing, naive_boxes, patch_centers, recenter
from muvit.levels import Level, level_factors, plain_level
from muvit.models.folder import FolderModel
from muvit.models.layers.attention import AttentionMode, KeysValues, Spans, level_spans, random_key_mask
from muvit.models.layers.block import Block
from muvit.models.layers.patch import patch_grid, patchify
from muvit.models.layers.rope import AxialRope, Rotation

RotaryMode = Literal["none", "fixed", "shared", "per_layer"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes and choices of a `MuViTEncoder`; the defaults are the paper's (MuViT sections 3.1 and 3.2)."""

    in_channels: int
    """Channels of the images."""
    levels: tuple[Level, ...]
    """Downsampling factor of each view, finest first: one number, or one per axis, such as [1, 4, 4]."""
    patch_size: int | tuple[int, ...] = 8
    """Side of a patch in pixels of its level: one number, or one per axis."""
    num_layers: int = 12
    """Transformer blocks."""
    dim: int = 512
    """Token width."""
    heads: int = 8
    """Attention heads."""
    attention_mode: AttentionMode = "all"
    """Levels that a token sees: all; causal (own and finer); same; random; coarse_to_fine (own and coarser)."""
    use_level_embed: bool = True
    """Add a learnable vector per level to its tokens."""
    level_embed_std: float = 1.0
    """Standard deviation of the level vectors at initialisation; small models learn faster from 0.02."""
    rotary_mode: RotaryMode = "per_layer"
    """Rotary frequencies: none, fixed, learnable and shared by all blocks, or learnable in each block."""
    rotary_param: Literal["freq", "base"] = "freq"
    """What is learnable of them: every frequency, or one base per axis."""
    rotary_base: float = 10000.0
    """Initial base of the frequencies, made for worlds of 1e5 px; about 100 suits worlds of 1e3 px."""
    patch_spacing: PatchSpacing = "center"
    """Coordinates of patches: true centres (paper), or spread from corner to corner of the box (release 0.1.0)."""
    input_space: Literal["real"] = "real"
    """Space of the patches; ``real`` pixels are the only one (kept from release 0.1.0)."""
    dropout: float = 0.0
    """Dropout inside the feed-forward networks."""
    ndim: int = field(default=2)
    """Spatial axes: 2 (yx), 3 (zyx) or 4 (tzyx)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(map(plain_level, self.levels)))
        patch = self.patch_size
        if not isinstance(patch, int):
            object.__setattr__(self, "patch_size", tuple(patch))
        for name in ("in_channels", "num_layers", "dim", "heads"):
            if getattr(self, name) < 1:
                raise InputError(name, expected="a positive number", got=getattr(self, name))
        for level in self.levels:
            level_factors(level, self.ndim)
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise InputError("levels", expected="distinct positive downsampling factors", got=self.levels)
        if len(self.patch) != self.ndim or min(self.patch) < 1:
            raise InputError("patch_size", expected=f"a positive number, or {self.ndim} of them", got=patch)
        for name in ("attention_mode", "rotary_mode", "rotary_param", "patch_spacing", "input_space"):
            allowed = get_args(get_type_hints(EncoderConfig)[name])
            if getattr(self, name) not in allowed:
                raise InputError(name, expected=" or ".join(allowed), got=repr(getattr(self, name)))
        for name, fits, expected in (
            ("level_embed_std", 0 <= self.level_embed_std < inf, "a number >= 0"),
            ("rotary_base", 1 < self.rotary_base < inf, "a number above 1"),
            ("dropout", 0 <= self.dropout < 1, "a share in [0, 1)"),
        ):
            if not fits:
                raise InputError(name, expected=expected, got=getattr(self, name))

    @property
    def patch(self) -> tuple[int, ...]:
        """Patch side along each axis."""
        return (self.patch_size,) * self.ndim if isinstance(self.patch_size, int) else self.patch_size


@dataclass(frozen=True, kw_only=True)
class EncodedContext:
    """What the coarse views of a scene leave for the finer ones, under the attention pattern ``coarse_to_fine``.

    There no coarse token depends on a finer one. So the coarse views are encoded once, and everything inside them is
    encoded against their keys and values, with the outputs that all views together would give.
    """

    keys_values: tuple[KeysValues, ...]
    """Of every block: rotated keys and values ``(B, heads, n, head_dim)`` of one coarse level's tokens."""
    tokens: Tensor
    """These tokens after the last block, ``(B, n, D)``."""
    coords: Tensor
    """World coordinates ``(B, n, ndim)`` of their patch centres."""
    origin: Tensor
    """World coordinates ``(B, ndim)`` that rotations count from: the lower corner of the coarsest view."""
    outer: "EncodedContext | None" = None
    """What the still coarser levels leave."""

    @property
    def levels(self) -> "tuple[EncodedContext, ...]":
        """This and all outer contexts, one for each coarse level, finest first."""
        return (self,) if self.outer is None else (self, *self.outer.levels)

    def expand(self, batch: int) -> "EncodedContext":
        """The context of one sample for a batch of samples that share it, without a copy.

        Raises:
            ShapeError: it is one of several samples, and not of so many.
        """
        if self.tokens.shape[0] not in (1, batch):
            raise ShapeError("context", expected=f"1 sample or {batch}", got=self.tokens.shape[0])
        return EncodedContext(
            keys_values=tuple((k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in self.keys_values),
            tokens=self.tokens.expand(batch, -1, -1),
            coords=self.coords.expand(batch, -1, -1),
            origin=self.origin.expand(batch, -1),
            outer=None if self.outer is None else self.outer.expand(batch),
        )


class MuViTEncoder(FolderModel):
    """Transformer over the patches of several views of one scene (MuViT sections 3.1 and 3.2).

    Every patch becomes a token through its level's own embedding; all tokens attend to each other, rotated by the world
    coordinates of their patch centres. Tokens are ordered by level (in the order of ``levels``), then row-major.

    Args:
        **fields: the fields of `EncoderConfig` but ``ndim``, which the class binds.
    """

    config: EncoderConfig
    legacy_settings: ClassVar[dict[str, Any]] = {"patch_spacing": "corner"}

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        if self.ndim is None:
            raise TypeError("build MuViTEncoder2d, MuViTEncoder3d or MuViTEncoder4d")
        self.config = config = EncoderConfig(ndim=self.ndim, **fields)
        num_levels, width = len(config.levels), prod(config.patch) * config.in_channels
        self.proj = nn.ModuleList(
            nn.Sequential(nn.Linear(width, config.dim), nn.LayerNorm(config.dim)) for _ in config.levels
        )
        self.level_embed = (
            nn.Parameter(config.level_embed_std * torch.randn(num_levels, config.dim))
            if config.use_level_embed
            else None
        )
        ropes = build_ropes(
            config.rotary_mode,
            config.num_layers,
            config.dim // config.heads,
            self.ndim,
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
        tokens, coords = self.embed(x)[0].flatten(1, 2), self.patch_coords(x, bbox)
        wanted = () if return_intermediate_idxs is None else return_intermediate_idxs
        tokens, kept = self.run_blocks(tokens, self.token_positions(x, bbox), self._level_mask(tokens), wanted)
        level_idx = torch.arange(len(self.levels), device=x.device).repeat_interleave(
            tokens.shape[1] // len(self.levels)
        )
        outputs = (tokens, coords, level_idx.expand(x.shape[0], -1))
        return outputs if return_intermediate_idxs is None else (*outputs, kept)

    def encode_finest(self, x: Tensor, bbox: Tensor | None, keep: Sequence[int]) -> tuple[Tensor, ...]:
        """Encode the views of each sample as `forward` does, but return the tokens of the finest view alone.

        In the last block only these are computed: nobody reads the others.

        Args:
            x: ``(B, L, C, *space)``.
            bbox: as in `forward`.
            keep: indices of the blocks (0-based) whose outputs to return.

        Returns:
            Outputs of these blocks, each ``(B, n, D)``, in block order.

        Raises:
            ShapeError: images or boxes have the wrong shape.
        """
        tokens = self.embed(x)[0].flatten(1, 2)
        finest = slice(tokens.shape[1] // len(self.levels))
        mask, positions = self._level_mask(tokens), self.token_positions(x, bbox)
        kept = self.run_blocks(tokens, positions, mask, keep, queries=finest)[1]
        return tuple(tokens[:, finest] for tokens in kept)

    def encode_together(
        self, x: Tensor, bbox: Tensor, keep: Sequence[int], *, with_coarse: bool = False
    ) -> tuple[Tensor, ...]:
        """Encode several samples of a scene that share their coarse views, and these but once.

        A finest view attends to itself and to the coarse ones, as it does alone; the coarse ones attend to each other
        and to all finest views, where alone they see only one. For a single sample, this is `encode_finest`.

        Args:
            x: ``(B, L, C, *space)``; of the coarse views those of the first sample are taken for all.
            bbox: ``(B, L, 2, ndim)``, world pixels, (t)(z)yx, alike.
            keep: indices of the blocks (0-based) whose outputs to return.
            with_coarse: also return the tokens of the coarse views; else the last block does not compute them.

        Returns:
            Outputs of these blocks, each ``(B, n, D)``, or ``(B, N, D)`` with the coarse ones, in block order.

        Raises:
            ShapeError: images or boxes have the wrong shape.
            InputError: attention is not full.
        """
        if self.config.attention_mode != "all":
            got = repr(self.config.attention_mode)
            raise InputError("attention_mode", expected="'all' to encode samples together", got=got)
        self._check_images(x, len(self.levels))
        bbox = self._checked_boxes(x, bbox)
        boxes = bbox - bbox[:1, :1, :1]
        finest = self._embed_level(0, patchify(x[:, :1], self.config.patch)[:, 0])
        patches = patchify(x[:1, 1:], self.config.patch)
        coarse = torch.cat([self._embed_level(1 + i, p) for i, p in enumerate(patches.unbind(1))], dim=1)
        places = self._centers(x[:, 0], boxes[:, 0]).float()
        coarse_places = self._centers(x[:1, 1:].flatten(0, 1), boxes[0, 1:]).flatten(0, 1)[None].float()
        kept = []
        rotations = zip(self._rotated_blocks(places), self._rotated_blocks(coarse_places), strict=True)
        for i, ((block, rotation), (_, coarse_rotation)) in enumerate(rotations):
            own, shared = block.keys_values(finest, rotation), block.keys_values(coarse, coarse_rotation)
            seen = [torch.cat([a, b.expand(x.shape[0], -1, -1, -1)], dim=2) for a, b in zip(own, shared, strict=True)]
            if with_coarse or i < len(self.layers) - 1:
                every = [torch.cat([*a.split(1), b], dim=2) for a, b in zip(own, shared, strict=True)]
                coarse = block(coarse, coarse_rotation, context_kv=(every[0], every[1]))
            finest = block(finest, rotation, context_kv=(seen[0], seen[1]))
            if i in keep:
                kept.append(torch.cat([finest, coarse.expand(x.shape[0], -1, -1)], dim=1) if with_coarse else finest)
        return tuple(kept)

    def encode_context(self, x: Tensor, bbox: Tensor, context: EncodedContext | None = None) -> EncodedContext:
        """Encode the coarse views of scenes once for all finer views, under ``coarse_to_fine``.

        Views may come all at once, or level by level, from the coarsest: crops of level 8 that share one crop of level
        32 are encoded one by one in its context.

        Args:
            x: ``(B, l, C, *space)``, the coarsest ``l`` levels; with ``context``, the ``l`` levels before its own.
            bbox: ``(B, l, 2, ndim)``, world pixels, (t)(z)yx.
            context: of the still coarser levels, of the same samples or of a single one that all of them share.

        Returns:
            The context that views of the next finer level need.

        Raises:
            ShapeError: images or boxes have the wrong shape.
            InputError: the attention pattern is another one, or there are too many levels.
        """
        self._check_cachable()
        self._check_images(x, x.shape[1])
        bbox = self._checked_boxes(x, bbox)
        first = len(self.levels) - (0 if context is None else len(context.levels)) - x.shape[1]
        if first < 0:
            raise InputError("img", expected=f"at most {x.shape[1] + first} views beside the context", got=x.shape[1])
        for i in reversed(range(x.shape[1])):
            outputs, own = zip(*self._run_level(first + i, x[:, i], bbox[:, i], context), strict=True)
            context = EncodedContext(
                keys_values=own,
                tokens=outputs[-1],
                coords=self._centers(x[:, i], bbox[:, i]),
                origin=bbox[:, i, 0] if context is None else context.origin.expand(x.shape[0], -1),
                outer=context,
            )
        assert context is not None
        return context

    def forward_in_context(
        self, x: Tensor, bbox: Tensor, context: EncodedContext, keep: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Encode the finest views of scenes in the context of their coarse views, under ``coarse_to_fine``.

        Args:
            x: ``(B, 1, C, *space)``.
            bbox: ``(B, 1, 2, ndim)``, world pixels, (t)(z)yx.
            context: of all coarse levels, of the same samples or of a single one that all of them share.
            keep: indices of blocks (0-based) whose outputs to return as well.

        Returns:
            Tokens ``(B, n, D)`` of the finest views; world coordinates of their patch centres ``(B, n, ndim)``; outputs
            of the given blocks, each ``(B, n, D)``, in block order.

        Raises:
            ShapeError: images or boxes have the wrong shape.
            InputError: the attention pattern is another one, or the context lacks a level.
        """
        self._check_cachable()
        self._check_images(x, 1)
        x, bbox = x[:, 0], self._checked_boxes(x, bbox)[:, 0]
        if len(context.levels) != len(self.levels) - 1:
            raise InputError("context", expected=f"{len(self.levels) - 1} coarse levels", got=len(context.levels))
        outputs = [tokens for tokens, _ in self._run_level(0, x, bbox, context)]
        return outputs[-1], self._centers(x, bbox), tuple(outputs[i] for i in sorted(set(keep)))

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``(B, L, n, D)`` before the first block, and the patches ``(B, L, n, P...C)`` they come from."""
        self._check_images(x, len(self.levels))
        patches = patchify(x, self.config.patch)
        return torch.stack([self._embed_level(i, patches[:, i]) for i in range(len(self.proj))], dim=1), patches

    def patch_coords(self, x: Tensor, bbox: Tensor | None = None) -> Tensor:
        """World coordinates ``(B, N, ndim)`` of the patch centres of all views (MuViT section 3.1)."""
        space = x.shape[3:]
        grid = patch_grid(space, self.config.patch)
        boxes = self._naive_boxes(x) if bbox is None else self._checked_boxes(x, bbox)
        return patch_centers(boxes, grid, self.config.patch_spacing).flatten(1, 2)

    def token_positions(self, x: Tensor, bbox: Tensor | None) -> Tensor:
        """Coordinates that are rotated: `patch_coords`, but with each sample's first view at the origin, float32."""
        return self.patch_coords(x, None if bbox is None else recenter(self._checked_boxes(x, bbox))).float()

    def run_blocks(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | Spans | None,
        keep: Sequence[int] = (),
        queries: slice | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Send tokens ``(B, N, D)`` at ``positions`` ``(B, N, ndim)`` through all blocks, keeping some outputs.

        With ``queries``, the tokens of the first level, only these are computed in the last block.
        """
        kept = []
        last = len(self.layers) - 1
        for i, (block, rotation) in enumerate(self._rotated_blocks(positions)):
            if i == last and queries is not None:
                may_see = mask[:, :, queries] if isinstance(mask, Tensor) else mask and mask[:1]
                tokens = block(tokens, rotation, mask=may_see, queries=queries)
            else:
                tokens = block(tokens, rotation, mask=mask)
            if i in keep:
                kept.append(tokens)
        return tokens, tuple(kept)

    def compute_features(self, x: Tensor, bbox: Tensor | None = None) -> Tensor:
        """Features as maps, ``(B, L, D, *grid)``; arguments as in `forward`."""
        return self.to_maps(self(x, bbox)[0], x.shape[3:])

    def to_maps(self, tokens: Tensor, space: Sequence[int]) -> Tensor:
        """Arrange tokens ``(B, N, D)`` of L views of shape ``space`` as maps ``(B, L, D, *grid)``."""
        grid = patch_grid(space, self.config.patch)
        return tokens.unflatten(1, (-1, *grid)).movedim(-1, 2)

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
        return other

    def _embed_level(self, level: int, patches: Tensor) -> Tensor:
        tokens = self.proj[level](patches)
        return tokens if self.level_embed is None else tokens + self.level_embed[level]

    def _rotated_blocks(self, positions: Tensor) -> Iterator[tuple[Block, Rotation | None]]:
        """Every block with its angles for tokens at ``positions`` ``(B, N, ndim)``."""
        rotations: dict[int, Rotation | None] = {}
        for block in self.layers:
            assert isinstance(block, Block)
            rope = id(block.rotary_pos_embs)
            if rope not in rotations:  # shared frequencies are evaluated once
                rotations = {rope: block.rotation(positions)}
            yield block, rotations[rope]

    def _run_level(
        self, level: int, x: Tensor, bbox: Tensor, context: EncodedContext | None
    ) -> Iterator[tuple[Tensor, KeysValues]]:
        """Outputs of each block for views ``(B, C, *space)`` of one level, and the keys and values of their tokens."""
        outer = () if context is None else context.expand(x.shape[0]).levels
        tokens = self._embed_level(level, patchify(x[:, None], self.config.patch)[:, 0])
        origin = bbox[:, 0] if context is None else context.origin
        positions = self._centers(x, bbox - origin[:, None]).float()
        for i, (block, rotation) in enumerate(self._rotated_blocks(positions)):
            own = block.keys_values(tokens, rotation)
            keys, values = zip(own, *(coarse.keys_values[i] for coarse in outer), strict=True)
            tokens = block(tokens, rotation, context_kv=(torch.cat(keys, dim=2), torch.cat(values, dim=2)))
            yield tokens, own

    def _centers(self, x: Tensor, bbox: Tensor) -> Tensor:
        """Centres ``(B, n, ndim)`` of the patches of views ``(B, C, *space)``."""
        return patch_centers(bbox, patch_grid(x.shape[2:], self.config.patch), self.config.patch_spacing)

    def _level_mask(self, tokens: Tensor) -> Tensor | Spans | None:
        mode, count = self.config.attention_mode, tokens.shape[1]
        if mode == "random":
            return random_key_mask(count, count, tokens.device)
        return level_spans(mode, len(self.levels), count // len(self.levels))

    def _check_cachable(self) -> None:
        mode = self.config.attention_mode
        if mode != "coarse_to_fine":
            raise InputError("attention_mode", expected="'coarse_to_fine' for a context of its own", got=repr(mode))

    def _check_images(self, x: Tensor, num_levels: int) -> None:
        expected = (num_levels, self.config.in_channels)
        if x.ndim != 3 + self.config.ndim or tuple(x.shape[1:3]) != expected:
            axes = ", ".join("tzyx"[-self.config.ndim :])
            raise ShapeError("img", expected=f"shape (B, L={expected[0]}, C={expected[1]}, {axes})", got=tuple(x.shape))

    def _checked_boxes(self, x: Tensor, bbox: Tensor) -> Tensor:
        expected = (*x.shape[:2], 2, self.config.ndim)
        if tuple(bbox.shape) != expected:
            raise ShapeError("bbox", expected=f"shape (B, L, 2, ndim) = {expected}", got=tuple(bbox.shape))
        return bbox if bbox.is_floating_point() else bbox.double()

    def _naive_boxes(self, x: Tensor) -> Tensor:
        boxes = naive_boxes(self.levels, x.shape[3:], self.config.patch_spacing)
        return boxes.to(x.device, non_blocking=True).expand(x.shape[0], *boxes.shape)


class MuViTEncoder2d(MuViTEncoder):
    """`MuViTEncoder` for images (yx)."""

    ndim: ClassVar[int] = 2


class MuViTEncoder3d(MuViTEncoder):
    """`MuViTEncoder` for volumes (zyx)."""

    ndim: ClassVar[int] = 3


class MuViTEncoder4d(MuViTEncoder):
    """`MuViTEncoder` for volumes over time (tzyx)."""

    ndim: ClassVar[int] = 4


def build_ropes(
    mode: RotaryMode,
    num_layers: int,
    head_dim: int,
    ndim: int,
    base: float,
    param: Literal["freq", "base"] = "freq",
) -> list[AxialRope | None]:
    """One rotary embedding per block: none, all the same object, or each its own."""
    if mode == "none":
        return [None] * num_layers
    learn: Literal["freq", "base", "none"] = "none" if mode == "fixed" else param
    count = num_layers if mode == "per_layer" else 1
    ropes = [AxialRope(head_dim, ndim, base, learn) for _ in range(count)]
    return [ropes[i % count] for i in range(num_layers)]
