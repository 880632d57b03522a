"""The segmentation model: views and boxes in, logits of the finest view out."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from muvit.encoders import EncoderConfig, MuViTEncoder, MuViTEncoder2d, MuViTEncoder3d
from muvit.errors import InputError
from muvit.geometry import check_boxes
from muvit.layers.conv import conv
from muvit.segmentation.model import SegmentationModel, Views
from muvit.segmentation.unetr import LevelAdapter, PixelDecoder, skip_layers, upsampling_steps

_ENCODERS: dict[int, type[MuViTEncoder]] = {2: MuViTEncoder2d, 3: MuViTEncoder3d}


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """Sizes and choices of a `Segmenter`; the defaults are the paper's (MuViT section 3.4, supplement C.2)."""

    encoder: EncoderConfig
    """The multi-resolution encoder."""
    num_classes: int
    """Classes, background (class 0) included."""
    boxes: Literal["true", "naive"] = "true"
    """Positions that the encoder sees: the true boxes, or one set of centred boxes for all (the paper's control)."""
    decode: Literal["finest", "all"] = "finest"
    """Views that get logits: the finest one, or each level its own (for deep supervision)."""
    decoder_widths: tuple[int, ...] | None = None
    """Channels of the decoder's stages from the token grid to the pixels; unset, the paper's 256 in every stage."""
    stem_width: int = 64
    """Channels of the convolutions on the image."""

    def __post_init__(self) -> None:
        if isinstance(self.encoder, dict):  # as it comes from a checkpoint's YAML
            object.__setattr__(self, "encoder", EncoderConfig(**self.encoder))
        if self.decoder_widths is not None:
            object.__setattr__(self, "decoder_widths", tuple(self.decoder_widths))
        if self.num_classes < 2:
            raise InputError("num_classes", expected="at least 2, background included", got=self.num_classes)
        if self.stem_width < 1:
            raise InputError("stem_width", expected="a positive number", got=self.stem_width)
        if self.encoder.ndim not in _ENCODERS:
            raise InputError("encoder.ndim", expected="2 or 3 for segmentation", got=self.encoder.ndim)
        for name, allowed in (("boxes", ("true", "naive")), ("decode", ("finest", "all"))):
            if getattr(self, name) not in allowed:
                raise InputError(name, expected=" or ".join(allowed), got=repr(getattr(self, name)))


class Segmenter(SegmentationModel):
    """Multi-resolution encoder with a UNETR-style decoder.

    Every level owns an adapter of the decoder (the paper's parameter count says so). With ``decode="finest"`` only the
    finest level's adapter works; those of the coarse levels then rest, without gradient.

    Args:
        **fields: the fields of `SegmenterConfig`.
    """

    config: SegmenterConfig
    ndim: ClassVar[int | None] = None

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = config = SegmenterConfig(**fields)
        enc = config.encoder
        widths = config.decoder_widths or (256,) * (len(upsampling_steps(enc.patch)) + 1)
        encoder_fields = {name: getattr(enc, name) for name in EncoderConfig.__dataclass_fields__ if name != "ndim"}
        self.encoder = _ENCODERS[enc.ndim](**encoder_fields)
        self.trunk = PixelDecoder(enc.ndim, enc.in_channels, enc.patch, widths, config.stem_width)
        skip_widths = widths[:-1] or widths
        self.adapters = nn.ModuleList(LevelAdapter(enc.ndim, enc.dim, skip_widths) for _ in enc.levels)
        self.skips = skip_layers(enc.num_layers, len(skip_widths))
        self.head = conv(enc.ndim, widths[-1], config.num_classes, 1)
        for adapter in self.adapters[self.num_decoded :]:
            adapter.requires_grad_(False)

    @property
    def views(self) -> Views:
        """The views that the model takes."""
        encoder = self.config.encoder
        return Views(
            levels=encoder.levels, in_channels=encoder.in_channels, ndim=encoder.ndim, multiple=encoder.patch
        )

    @property
    def num_classes(self) -> int:
        """Classes, background included."""
        return self.config.num_classes

    @property
    def backbone(self) -> MuViTEncoder:
        """The encoder."""
        return self.encoder

    def label_logits(self, img: Tensor, bbox: Tensor | None = None) -> Tensor:
        """Logits ``(B, K, *space)`` of the finest view, also with ``decode="all"``."""
        return self.decode(self.encode(img, bbox), img, 0)

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
        maps = self.encode(img, bbox)
        logits = [self.decode(maps, img, level) for level in range(self.num_decoded)]
        return logits[0] if self.config.decode == "finest" else torch.stack(logits, dim=1)

    def encode(self, img: Tensor, bbox: Tensor | None) -> list[Tensor]:
        """Encoder maps ``(B, L, D, *grid)`` that the decoder reads, deepest block first."""
        if bbox is not None and bbox.device.type == "cpu":
            check_boxes(bbox)
        bbox = bbox if self.config.boxes == "true" else None
        kept = self.encoder(img, bbox, return_intermediate_idxs=self.skips)[3]
        return [self.encoder.to_maps(tokens, img.shape[3:]) for tokens in reversed(kept)]

    def decode(self, maps: list[Tensor], img: Tensor, level: int) -> Tensor:
        """Logits ``(B, K, *space)`` of the view with index ``level``."""
        skips = self.adapters[level]([m[:, level] for m in maps])
        return self.head(self.trunk(skips, img[:, level]))
