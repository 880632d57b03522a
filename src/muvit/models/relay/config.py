"""Settings of a model with relay tokens."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from muvit.checks import Bounds, NonNegative, PositiveInt, Share, check_fields, freeze_lists
from muvit.errors import InputError
from muvit.levels import check_levels

_SET_BY_US = {
    "img_size": "size",
    "in_chans": "in_channels",
    "num_classes": "num_classes",
    "drop_path_rate": "drop_path",
    "pretrained": "pretrained",
}
_UNFIT = (
    "dynamic_img_size",
    "dynamic_img_pad",
    "strict_img_size",
    "patch_drop_rate",
    "features_only",
    "use_naflex",
    "checkpoint_path",
)
"""Arguments of timm that would leave tokens out, or change what its models are made of."""


@dataclass(frozen=True, kw_only=True)
class RelayConfig:
    """A timm backbone and the coupling of its passes over the views; the defaults are the paper's (Relay Tokens).

    With one level it is the plain backbone with the same head; with several, the finest view is the local branch and
    each coarser one a context branch.
    """

    kind: Literal["relay"] = "relay"
    """A Vision Transformer or Swin Transformer of timm with relay tokens."""
    backbone: str
    """Name of a Vision Transformer (also DeiT, DINOv2, DINOv3, EVA) or Swin Transformer (V1, V2) of timm, such as
    vit_small_patch16_224, deit3_small_patch16_224, vit_small_patch16_dinov3 or swinv2_small_window8_256."""
    relay_tokens: Annotated[int, Bounds(min=0)] = 4
    """Relay tokens that carry information between the branches; 0 leaves the branches independent."""
    update: Literal["sequential", "mean"] = "sequential"
    """In each block the tokens pass the coarsest branch first and the local one last (sequential, the paper), or all
    branches take the same tokens and the results are averaged (mean, the released code)."""
    share_patch_embed: bool = False
    """All branches use one patch embedding and one position table; else each context branch has its own, which start as
    copies of the local ones."""
    share_blocks: bool = True
    """All branches run through the same blocks (the paper), or each context branch through a copy of its own, which
    starts equal: the paper's control with a backbone for each branch."""
    fusion: Literal["relay", "decision"] = "relay"
    """Path of the context to the local prediction: relay tokens, or the paper's control without them, whose context
    logits are up-sampled and added to the local ones (decision)."""
    exchange: Literal["none", "world", "context", "cells", "late"] = "none"
    """Paths beside the relay tokens, which know no places: none (the paper); or before every second block the tokens of
    all views attend to a grid of each view, rotated by world coordinates (world). Controls after other papers: the
    local view attends to grids of the context views, once in each stage (context, after CASWiT); grids of all views
    attend to each other (cells, after GLAM); blocks over the tokens of all views end the backbone (late, after xT)."""
    exchange_cells: PositiveInt = 8
    """Most cells of a grid along each axis: means of equal groups of tokens."""
    pretrained: bool | str = False
    """Weights that the backbone starts from: those that timm publishes for it (true; fetched once, for a new model,
    never for one that is loaded from its folder), or a local file .safetensors or .pth with them; loaded strictly."""
    class_token: bool = True
    """Keep the class token that the backbone was trained with (true), or take it out after the weights are loaded, as
    the released code of Relay Tokens, whose Vision Transformer has none (false)."""
    final_norm: bool = True
    """Keep the backbone's norm after the last block (true), or leave it out, as the released Vision Transformer
    (false)."""
    timm_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm's model, such as depth or window_size."""
    drop_path: Share | None = None
    """Highest rate of stochastic depth; unset, timm's default for the backbone."""
    decoder: Literal["linear", "unetr", "mask2former"] = "linear"
    """From tokens to logits, the same for all branches: one transposed convolution (the paper), or a decoder of MuViT
    on the maps of the branch."""
    decoder_widths: Literal["paper", "slim"] | tuple[PositiveInt, ...] = "slim"
    """Channels of the stages of unetr and mask2former from the token grid to the pixels: slim, paper (256 in every
    stage), or one number for each."""
    num_queries: PositiveInt = 16
    """Queries of mask2former, at least one for each class."""
    context_weight: NonNegative = 0.1
    """Weight of the context branches' loss against the labels."""
    consistency_weight: NonNegative = 0.1
    """Weight of the context branches' loss against the local prediction."""
    context_target: Literal["center", "full"] = "center"
    """Labels of the context branches: those of the finest view, pooled, where it lies in the context view (center), or
    those of the whole context view (full; needs data.label_levels all)."""
    in_channels: PositiveInt | None = None
    """Channels of every view; unset in a recipe, those of the slides."""
    num_classes: Annotated[int, Bounds(min=2)] | None = None
    """Classes, background (class 0) included; unset in a recipe, those of the labels."""
    levels: tuple[float, ...]
    """Downsampling factor of each view, finest first."""
    size: tuple[PositiveInt, PositiveInt] | None = None
    """Side of a view in pixels, yx; unset in a recipe, data.crop_size."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_fields(self)
        check_levels(self.levels, self.ndim)
        if self.exchange != "none" and self.fusion == "decision":
            expected = "none with fusion decision, which keeps branches apart"
            raise InputError("exchange", expected=expected, got=self.exchange)
        for name in self.timm_options:
            if name in _SET_BY_US:
                raise InputError(f"timm_options.{name}", expected=f"the setting {_SET_BY_US[name]} instead", got=name)
            if name in _UNFIT:
                raise InputError(
                    f"timm_options.{name}", expected="an argument that keeps every token in its place", got=name
                )

    @property
    def ndim(self) -> int:
        """Spatial axes: the backbones are two-dimensional."""
        return 2

    @property
    def needs_concentric_views(self) -> bool:
        """Whether no path between views knows places, as relay tokens do not."""
        is_coupled = self.fusion == "relay" and (self.relay_tokens > 0 or self.exchange != "none")
        return is_coupled and len(self.levels) > 1 and self.exchange not in ("world", "late")
