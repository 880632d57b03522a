"""Light decoders of the branches, and the losses of the context branches (Relay Tokens)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from muvit.errors import InputError
from muvit.geometry import patch_centers
from muvit.labels import IGNORE
from muvit.models.layers.conv import conv
from muvit.models.layers.rope import build_ropes
from muvit.models.mask2former import QueryDecoder, query_masks
from muvit.models.relay.backbones import Backbone
from muvit.models.relay.config import RelayConfig
from muvit.models.relay.placement import pool
from muvit.models.unetr import LevelAdapter, PixelDecoder, skip_layers, stage_widths, upsampling_steps

_QUERY_LAYERS, _QUERY_HEADS, _ROTARY_BASE = 2, 8, 10000.0
"""As in the decoder of MuViT."""


class BranchDecoder(nn.Module):
    """Decoder from the maps of a branch to logits."""

    taps: tuple[tuple[int, int], ...] = ()
    """Blocks, as (stage, index), whose maps it reads beside the output of the backbone."""

    def forward(self, maps: Sequence[Tensor], view: Tensor, box: Tensor) -> Tensor:
        """Logits ``(B, K, *space)`` of a branch.

        Args:
            maps: ``(B, D, *grid)`` each, the output of the backbone first, then those of the taps, last block first.
            view: ``(B, C, *space)``.
            box: ``(B, 2, 2)``, world pixels, yx.
        """
        raise NotImplementedError


class LinearDecoder(BranchDecoder):
    """One transposed convolution whose kernel and stride are a token's pixels: a linear map from token to pixels.

    Args:
        backbone: the backbone.
        num_classes: classes.
    """

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.head = nn.ConvTranspose2d(backbone.widths[-1], num_classes, backbone.stride, backbone.stride)

    def forward(self, maps: Sequence[Tensor], view: Tensor, box: Tensor) -> Tensor:
        """Logits from the output of the backbone alone."""
        return self.head(maps[0])


class ConvDecoder(BranchDecoder):
    """The UNETR-style or Mask2Former-style decoder of MuViT on the maps of one branch.

    The skips of a Vision Transformer come from evenly spaced blocks, those of a Swin Transformer from its stages.

    Args:
        backbone: the backbone.
        config: the settings; channels and classes must be known.
    """

    def __init__(self, backbone: Backbone, config: RelayConfig) -> None:
        super().__init__()
        assert config.in_channels is not None and config.num_classes is not None
        num_steps = len(upsampling_steps(backbone.stride))
        is_slim = config.decoder_widths == "slim"
        widths = (
            stage_widths(config.decoder_widths, num_steps)
            if isinstance(config.decoder_widths, str)
            else config.decoder_widths
        )
        self.trunk = PixelDecoder(2, config.in_channels, backbone.stride, widths, 32 if is_slim else 64)
        self.sources = _sources(backbone, max(1, num_steps))
        self.taps = tuple(sorted(set(self.sources[1:])))
        self.adapter = LevelAdapter(2, [backbone.widths[stage] for stage, _ in self.sources], widths[:-1] or widths)
        self.queries = _queries(config, widths) if config.decoder == "mask2former" else None
        masks = widths[-1] if self.queries is None else config.num_queries
        self.head = conv(2, masks, config.num_classes, 1)

    def forward(self, maps: Sequence[Tensor], view: Tensor, box: Tensor) -> Tensor:
        """Logits from skips and pixels; queries look at the branch's tokens, placed by its box."""
        tapped = dict(zip(reversed(self.taps), maps[1:], strict=True))
        skips = [maps[0], *(tapped[source] for source in self.sources[1:])]
        features = self.trunk(self.adapter(skips), view)
        if self.queries is None:
            return self.head(features)
        places = patch_centers(box, maps[0].shape[2:])
        embeddings = self.queries(self.adapter.context(maps[0]), places)
        return self.head(query_masks(embeddings, features))


def build_decoder(backbone: Backbone, config: RelayConfig) -> BranchDecoder:
    """The decoder that the settings name.

    Raises:
        InputError: it does not fit the backbone or the classes.
    """
    assert config.num_classes is not None
    if config.decoder == "linear":
        return LinearDecoder(backbone, config.num_classes)
    if any(s & (s - 1) for s in backbone.stride):
        raise InputError(
            f"decoder {config.decoder}",
            expected="a backbone whose patches are powers of two",
            got=f"{config.backbone} with patches of {backbone.stride}",
            hint="Take the linear decoder.",
        )
    if config.decoder == "mask2former" and config.num_queries < config.num_classes:
        raise InputError(
            "num_queries", expected=f"at least one for each of the {config.num_classes} classes", got=config.num_queries
        )
    return ConvDecoder(backbone, config)


def _sources(backbone: Backbone, count: int) -> tuple[tuple[int, int], ...]:
    """Sources of the skips of the stages, as (stage, index) of a block, deepest first."""
    if len(backbone.depths) == 1:
        return tuple((0, index) for index in reversed(skip_layers(backbone.depths[0], count)))
    ends = [(stage, depth - 1) for stage, depth in enumerate(backbone.depths)]
    return tuple(ends[max(0, len(ends) - 1 - i)] for i in range(count))


def _queries(config: RelayConfig, widths: Sequence[int]) -> QueryDecoder:
    dim = widths[0]
    if dim % (4 * _QUERY_HEADS):
        raise InputError("decoder_widths", expected=f"a multiple of {4 * _QUERY_HEADS} first", got=dim)
    ropes = build_ropes("per_layer", _QUERY_LAYERS, dim // _QUERY_HEADS, 2, _ROTARY_BASE)
    return QueryDecoder(config.num_queries, dim, widths[-1], _QUERY_HEADS, ropes)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """``- sum_c t_c log softmax(z)_c``, mean over batch and pixels; a target of zeros costs nothing, but counts.

    Args:
        logits: ``(B, K, *space)``.
        target: ``(B, K, *space)``, shares of the classes.
    """
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def pooled_labels(label: Tensor, num_classes: int, cells: Sequence[int]) -> Tensor:
    """Shares ``(B, K, *cells)`` of the classes in cells of labels ``(B, *space)``; all 0 where a pixel is ignored."""
    ignored = label == IGNORE
    shares = pool(one_hot(label.where(~ignored, 0), num_classes).movedim(-1, 1).float(), cells)
    return shares * (pool(ignored[:, None].float(), cells) == 0)


def pooled_prediction(logits: Tensor, cells: Sequence[int]) -> Tensor:
    """Mean probabilities ``(B, K, *cells)`` in the cells of logits ``(B, K, *space)``; gradients flow through them."""
    return pool(logits.softmax(dim=1), cells)


def labelled_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of ``(B, K, *space)``, mean over the labelled pixels of ``(B, *space)``; 0 if there are none."""
    total = cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
    return total / torch.count_nonzero(label != IGNORE).clamp(min=1)
