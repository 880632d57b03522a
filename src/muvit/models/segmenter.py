"""The segmentation model: views and boxes in, logits of the finest view out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn

from muvit.checks import Bounds, Positive, PositiveInt, check_fields, freeze_lists
from muvit.errors import InputError
from muvit.geometry import check_boxes
from muvit.levels import Level
from muvit.models.encoder import EncoderConfig, MuViTEncoder
from muvit.models.layers.conv import conv
from muvit.models.layers.rope import RotaryMode, build_ropes
from muvit.models.mask2former import QueryDecoder, query_masks
from muvit.models.segmentation_model import Criterion, SegmentationModel, Views, encoder_views
from muvit.models.unetr import Fusion, LevelAdapter, PixelDecoder, skip_layers, stage_widths, upsampling_steps


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """Sizes and choices of a `Segmenter`; the defaults are the paper's (MuViT section 3.4, supplement C.2)."""

    kind: Literal["muvit"] = "muvit"
    """A multi-resolution vision transformer."""
    encoder: EncoderConfig
    """The multi-resolution encoder."""
    num_classes: Annotated[int, Bounds(min=2)] | None = None
    """Classes, background (class 0) included; unset in a recipe, those of the labels."""
    decoder: Literal["unetr", "mask2former"] = "unetr"
    """From pixel features to classes: a linear layer, or learnable queries that look at the tokens of all levels."""
    boxes: Literal["true", "naive"] = "true"
    """Positions that the model sees: the true boxes, or one set of centred boxes for all (the paper's control)."""
    decode: Literal["finest", "all"] = "finest"
    """Views that get logits: the finest one, or each level its own (for deep supervision)."""
    deep_supervision: Positive = 0.5
    """With decode all, the weight of the mean loss of the coarse levels beside the loss of the finest."""
    decoder_widths: Literal["paper", "slim"] | tuple[PositiveInt, ...] = "paper"
    """Channels of the decoder's stages from the token grid to the pixels: the paper's 256 in every stage; slim, falling
    to 64 at the pixels, for a sixth of the cost; or one number for each stage."""
    fusion: Fusion = "add"
    """Joining of the up-sampled features and the skip of each stage: added (the paper's supplement and its parameter
    counts) or concatenated (its main text; 1.77 million parameters more in the paper's widths)."""
    stem_width: PositiveInt | None = None
    """Channels of the convolutions on the image; unset, 64, and 32 if the decoder is slim."""
    num_queries: PositiveInt = 16
    """Queries of the mask2former decoder, at least one for each class; they are as wide as the first stage."""
    query_layers: PositiveInt = 2
    """Layers that the queries pass."""
    query_heads: PositiveInt = 8
    """Attention heads of these layers."""
    mask_key_rope: bool = True
    """Rotate the keys that the queries look at by the world coordinates of their tokens."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_fields(self)
        if self.encoder.ndim > 3:
            raise InputError("encoder.ndim", expected="2 or 3 for segmentation", got=self.encoder.ndim)
        if self.decoder == "mask2former" and self.num_queries < (self.num_classes or 0):
            raise InputError(
                "num_queries", expected=f"at least one for each of the {self.num_classes} classes", got=self.num_queries
            )

    @property
    def in_channels(self) -> int | None:
        """Channels of every view."""
        return self.encoder.in_channels

    @property
    def levels(self) -> tuple[Level, ...]:
        """Downsampling factor of each view, finest first."""
        return self.encoder.levels

    @property
    def ndim(self) -> int:
        """Spatial axes."""
        return self.encoder.ndim

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the decoder's stages, one more than there are up-sampling steps, token grid first."""
        if isinstance(self.decoder_widths, tuple):
            return self.decoder_widths
        return stage_widths(self.decoder_widths, len(upsampling_steps(self.encoder.patch)))


class Encoded(NamedTuple):
    """Outputs of the encoder that the decoder reads."""

    maps: list[Tensor]
    """Outputs of some blocks, each ``(B, L, D, *grid)``, the last block first. Of the first map all levels are read, of
    the others only those that are decoded."""
    positions: Tensor
    """Places ``(B, N, ndim)`` of the tokens of the first map, level-major: world pixels from a common origin."""


class Segmenter(SegmentationModel):
    """Multi-resolution encoder with a UNETR-style or Mask2Former-style decoder.

    Every level owns an adapter of the decoder (the paper's parameter count says so). With ``decode="finest"`` those of
    the coarse levels rest, without gradient, but for the projections of the context that queries look at.

    Args:
        config: sizes and choices.
    """

    config: SegmenterConfig

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__(config)
        enc, widths = config.encoder, config.widths
        self.encoder = MuViTEncoder(enc)
        stem_width = config.stem_width or (32 if config.decoder_widths == "slim" else 64)
        self.trunk = PixelDecoder(enc.ndim, enc.channels, enc.patch, widths, stem_width, config.fusion)
        skip_widths = widths[:-1] or widths
        self.adapters = nn.ModuleList(LevelAdapter(enc.ndim, enc.dim, skip_widths) for _ in enc.levels)
        self.skips = skip_layers(enc.num_layers, len(skip_widths))
        self.query_decoder = self._build_queries() if config.decoder == "mask2former" else None
        masks = widths[-1] if self.query_decoder is None else config.num_queries
        self.head = conv(enc.ndim, masks, self.num_classes, 1)
        for adapter in self.adapters[self.num_decoded :]:
            assert isinstance(adapter, LevelAdapter)
            adapter.rest(but_context=self.query_decoder is not None)

    @property
    def views(self) -> Views:
        """The views that the model takes."""
        return encoder_views(self.config.encoder)

    @property
    def num_classes(self) -> int:
        """Classes, background included."""
        if self.config.num_classes is None:
            raise InputError("num_classes", expected="the number of classes, to build a model", got="none")
        return self.config.num_classes

    @property
    def backbone(self) -> MuViTEncoder:
        """The encoder."""
        return self.encoder

    def label_logits(self, img: Tensor, bbox: Tensor | None = None) -> Tensor:
        """Logits ``(B, K, *space)`` of the finest view, also with ``decode="all"``."""
        return self.decode(self.encode(img, bbox, num_decoded=1), img, 0)

    @property
    def num_decoded(self) -> int:
        """Number of levels that get logits."""
        return 1 if self.config.decode == "finest" else len(self.config.encoder.levels)

    def forward(self, img: Tensor, bbox: Tensor | None = None) -> Tensor:
        """Segment the finest view of each sample.

        Args:
            img: ``(B, L, C, *space)``.
            bbox: ``(B, L, 2, ndim)``, world pixels, (t)(z)yx; None places all levels around one common centre.

        Returns:
            Logits ``(B, K, *space)`` of the finest view; with ``decode="all"``, ``(B, L, K, *space)``.

        Raises:
            ShapeError: images or boxes have the wrong shape.
            InputError: a box on the CPU is not finite or not of positive extent; on a GPU its values are taken as they
                are, since looking at them would make the device wait.
        """
        encoded = self.encode(img, bbox, num_decoded=self.num_decoded)
        embeddings = self.mask_embeddings(encoded)
        logits = [self._decode(encoded, embeddings, img, level) for level in range(self.num_decoded)]
        return logits[0] if self.config.decode == "finest" else torch.stack(logits, dim=1)

    def encode(self, img: Tensor, bbox: Tensor | None, *, num_decoded: int | None = None) -> Encoded:
        """Encode views for the decoder.

        Args:
            img: as in `forward`.
            bbox: as in `forward`.
            num_decoded: levels that are to be decoded, finest first; unset, all. Where it is the finest one, and no
                queries look at the others, the maps are of this level, and the last block computes no more.
        """
        if bbox is not None:
            check_boxes(bbox)
        bbox = bbox if self.config.boxes == "true" else None
        only_finest = num_decoded == 1 and self.query_decoder is None
        found = self.encoder.encode(img, bbox, self.skips, only_finest=only_finest)
        maps = [self.encoder.to_maps(tokens, img.shape[3:]) for tokens in reversed(found.kept)]
        return Encoded(maps, found.positions)

    def mask_embeddings(self, encoded: Encoded) -> Tensor | None:
        """Mask embeddings ``(B, num_queries, width)`` from the tokens of all levels; None without queries."""
        if self.query_decoder is None:
            return None
        context = []
        for level, adapter in enumerate(self.adapters):
            assert isinstance(adapter, LevelAdapter)
            context.append(adapter.context(encoded.maps[0][:, level]))
        return self.query_decoder(torch.cat(context, dim=1), encoded.positions)

    def decode(self, encoded: Encoded, img: Tensor, level: int) -> Tensor:
        """Logits ``(B, K, *space)`` of the view with index ``level``.

        Args:
            encoded: from `encode`.
            img: ``(B, L, C, *space)``, of which only the view at ``level`` is read.
            level: index of a level.
        """
        return self._decode(encoded, self.mask_embeddings(encoded), img, level)

    def _decode(self, encoded: Encoded, embeddings: Tensor | None, img: Tensor, level: int) -> Tensor:
        skips = self.adapters[level]([m[:, level] for m in encoded.maps])
        features = self.trunk(skips, img[:, level])
        return self.head(features if embeddings is None else query_masks(embeddings, features))

    def training_loss(self, batch: Mapping[str, Tensor], criterion: Criterion) -> tuple[Tensor, Tensor]:
        """Loss of a batch, and the logits ``(B, K, *space)`` of its finest views.

        With ``decode="all"`` the coarse views count too: the loss of the finest one plus ``deep_supervision`` times the
        mean loss of the others.

        Args:
            batch: as in `SegmentationModel.training_loss`; ``decode="all"`` needs ``labels``.
            criterion: the loss of the recipe.

        Raises:
            InputError: coarse views are decoded, but the batch has labels of the finest only.
        """
        if self.num_decoded == 1:
            return super().training_loss(batch, criterion)
        if "labels" not in batch:
            raise InputError(
                "labels",
                expected="those of every view, as model.decode is all",
                got="those of the finest view only",
                hint="Set data.label_levels to all, or model.decode to finest.",
            )
        logits = self(batch["img"], batch["bbox"])
        pairs = zip(logits.unbind(1), batch["labels"].unbind(1), strict=True)
        finest, *coarse = (criterion(predicted, truth) for predicted, truth in pairs)
        return finest + self.config.deep_supervision * torch.stack(coarse).mean(), logits[:, 0]

    def _build_queries(self) -> QueryDecoder:
        config, enc = self.config, self.config.encoder
        dim, heads = config.widths[0], config.query_heads
        if dim % (2 * heads) or dim // heads < 2 * enc.ndim:
            expected = f"heads that split the first stage's {dim} channels into even parts of at least {2 * enc.ndim}"
            raise InputError("query_heads", expected=expected, got=heads)
        rotary: RotaryMode = "per_layer" if config.mask_key_rope else "none"
        ropes = build_ropes(rotary, config.query_layers, dim // heads, enc.ndim, enc.rotary_base, enc.rotary_param)
        return QueryDecoder(config.num_queries, dim, config.widths[-1], heads, ropes)
