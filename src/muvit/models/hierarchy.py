"""The two Vision Transformers of HIPT, one over the patches of a region and one over the region (MuViT, table 7).

The first makes a vector of every patch of a large region (4096 px in patches of 256), the second one of the grid of
these vectors. They are built from timm and take weights that the user has; none come with this package.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from muvit.checks import PositiveInt, check_fields
from muvit.errors import InputError, ShapeError, require_package
from muvit.levels import Level
from muvit.models.folder import FolderModel, load_into
from muvit.models.relay.weights import read_weights


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """Sizes of a `RegionEncoder`; the defaults are those of HIPT."""

    kind: ClassVar[str] = "region"

    in_channels: PositiveInt = 3
    """Channels of the images."""
    grid: PositiveInt = 16
    """Patches along each side of a region."""
    patch_size: PositiveInt = 256
    """Side of such a patch in pixels."""
    token_size: PositiveInt = 16
    """Side of a token of a patch in pixels."""
    dim: PositiveInt = 384
    """Width of the transformer over a patch, and of its vector."""
    num_layers: PositiveInt = 12
    """Blocks of that transformer."""
    heads: PositiveInt = 6
    """Attention heads of that transformer."""
    region_dim: PositiveInt = 192
    """Width of the transformer over a region, and of its vector."""
    region_layers: PositiveInt = 6
    """Blocks of that transformer."""
    region_heads: PositiveInt = 6
    """Attention heads of that transformer."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.patch_size % self.token_size:
            raise InputError("patch_size", expected=f"a multiple of {self.token_size}", got=self.patch_size)


class RegionEncoder(FolderModel):
    """One vector of a region from the class tokens of its patches: ``region([patch(x_11) ... patch(x_nn)])``.

    Args:
        config: sizes.

    Raises:
        InputError: timm is not installed.
    """

    config: RegionConfig
    levels: tuple[Level, ...] = (1,)
    """The one level that it takes."""

    def __init__(self, config: RegionConfig) -> None:
        super().__init__(config)
        require_package("timm", "a region encoder", package="timm", install="'muvit[relay]'")
        self.patch = _transformer(
            config.patch_size, config.token_size, config.in_channels, config.dim, config.num_layers, config.heads
        )
        self.region = _transformer(
            config.grid, 1, config.dim, config.region_dim, config.region_layers, config.region_heads
        )
        self.region.patch_embed = nn.Sequential(nn.Linear(config.dim, config.region_dim), nn.GELU())

    @classmethod
    def from_files(cls, patch: Path | str, region: Path | str, config: RegionConfig | None = None) -> Self:
        """The encoder with weights from two files, ``.safetensors`` or ``.pth`` with tensors alone.

        Names may begin with ``module.`` or ``backbone.``, as after training with DINO, whose ``head`` is left out.
        Position tables of another size are resampled.

        Args:
            patch: weights of the transformer over a patch, by timm's names.
            region: those of the transformer over a region, whose embedding is called ``phi``.
            config: sizes.

        Raises:
            CheckpointError: a file cannot be read, or its weights are of other names or sizes.
        """
        encoder = cls(RegionConfig() if config is None else config)
        for model, file in ((encoder.patch, Path(patch)), (encoder.region, Path(region))):
            load_into(model, _renamed(read_weights(file), model), file)
        return encoder.eval()

    def forward(self, img: Tensor, bbox: Tensor | None = None) -> tuple[Tensor]:
        """Encode regions, as `MuViTEncoder` does.

        Args:
            img: ``(B, 1, C, y, x)`` with sides of ``grid * patch_size``.
            bbox: not looked at: a region knows no place.

        Returns:
            The vector of each region as its one token, ``(B, 1, region_dim)``.

        Raises:
            ShapeError: the images have another shape.
        """
        config, n = self.config, self.config.grid
        expected = (1, config.in_channels, *(n * config.patch_size,) * 2)
        if tuple(img.shape[1:]) != expected:
            raise ShapeError("img", expected=f"shape (B, {', '.join(map(str, expected))})", got=tuple(img.shape))
        # (B, 1, C, n * p, n * p) -> (B, n * n, C, p, p), row-major
        patches = img[:, 0].unflatten(3, (n, -1)).unflatten(2, (n, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        vectors = torch.stack([self.patch(region) for region in patches])  # a region at a time: it has many patches
        return (self.region(vectors)[:, None],)

    def extract_levels(self, levels: Sequence[Level]) -> Self:
        """The encoder itself, if these are its levels.

        Raises:
            InputError: they are others.
        """
        if tuple(levels) != self.levels:
            raise InputError("levels", expected=f"{self.levels}, the one that a region encoder has", got=tuple(levels))
        return self


def _transformer(size: int, patch: int, channels: int, dim: int, depth: int, heads: int) -> Any:
    """A plain Vision Transformer of timm, whose output is its class token after the last norm."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=size,
        patch_size=patch,
        in_chans=channels,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        global_pool="token",
    )


def _renamed(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights by the names of a model, and with a position table of its size."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    found = {}
    for name, value in state.items():
        plain = name.removeprefix("module.").removeprefix("backbone.").replace("phi.0.", "patch_embed.0.")
        if not plain.startswith("head."):
            found[plain] = value
    table = found.get("pos_embed")
    if table is not None and table.ndim == 3 and table.shape[1] != model.pos_embed.shape[1]:
        side = round((model.pos_embed.shape[1] - 1) ** 0.5)
        found["pos_embed"] = resample_abs_pos_embed(table, [side, side])
    return found
