"""The segmentation model with relay tokens: local and context views in, logits of the local view out."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from muvit.errors import InputError, ShapeError
from muvit.geometry import check_boxes, naive_boxes
from muvit.models.relay.backbones import Backbone, RelayTrunk
from muvit.models.relay.config import RelayConfig
from muvit.models.relay.decoders import (
    build_decoder,
    labelled_cross_entropy,
    pooled_labels,
    pooled_prediction,
    soft_cross_entropy,
)
from muvit.models.relay.exchange import build_exchanges
from muvit.models.relay.placement import cells_of, read_cells, spread
from muvit.models.relay.weights import build_backbone
from muvit.models.segmentation_model import Criterion, SegmentationModel, Views


class RelaySegmenter(SegmentationModel):
    """A local and one or more context branches of one timm backbone, coupled by relay tokens (Relay Tokens).

    Args:
        config: the backbone and its coupling; channels, classes and size must be known.

    Raises:
        InputError: a setting does not fit, or timm is not installed.
        CheckpointError: pre-trained weights do not fit the backbone.
    """

    config: RelayConfig

    def __init__(self, config: RelayConfig) -> None:
        super().__init__(config)
        for name in ("in_channels", "num_classes", "size"):
            if getattr(config, name) is None:
                raise InputError(name, expected=f"a value, to build {config.backbone}", got="none")
        assert config.size is not None
        num_contexts = len(config.levels) - 1
        num_relay = config.relay_tokens if num_contexts and config.fusion == "relay" else 0
        is_coupled = num_relay > 0 or config.exchange != "none"
        if num_contexts and not is_coupled and not self._reads_context:
            raise InputError("relay_tokens", expected="at least 1, or a weight of the context branches' losses", got=0)
        backbone = build_backbone(config, num_relay, 0 if config.share_patch_embed else num_contexts)
        if not config.share_blocks:
            backbone.unshare(num_contexts)
            for level in range(1, len(config.levels)) if not self._reads_context else ():
                backbone.branch(level).timm.norm.requires_grad_(False)  # only relay tokens come out of these branches
        self.trunk = RelayTrunk(backbone, num_relay, config.update, build_exchanges(backbone, config))
        self.decoder = build_decoder(backbone, config)
        self.cells = [cells_of(config.size, config.levels[0], level) for level in config.levels[1:]]
        """Cells of the local view that are as large as the pixels of each context level."""

    @property
    def views(self) -> Views:
        """The views that the model takes."""
        config = self.config
        assert config.in_channels is not None
        return Views(
            levels=config.levels,
            in_channels=config.in_channels,
            ndim=2,
            multiple=self.trunk.backbone.stride,
            size=config.size,
        )

    @property
    def num_classes(self) -> int:
        """Classes, background included."""
        assert self.config.num_classes is not None
        return self.config.num_classes

    @property
    def backbone(self) -> Backbone:
        """timm's model, with the embeddings of the context branches that were copied from it."""
        return self.trunk.backbone

    @property
    def config_to_save(self) -> RelayConfig:
        """The configuration without weights to start from: none are read for a model that is loaded."""
        return replace(self.config, pretrained=False)

    def forward(self, img: Tensor, bbox: Tensor | None = None) -> Tensor:
        """Segment the local view of each sample.

        Args:
            img: ``(B, L, C, *space)``, the local view first.
            bbox: ``(B, L, 2, 2)``, world pixels, yx; None places all views around one common centre.

        Returns:
            Logits ``(B, K, *space)`` of the local view.

        Raises:
            ShapeError: images or boxes have the wrong shape.
            InputError: a box on the CPU is not finite or not of positive extent.
        """
        return self.branch_logits(img, bbox, local_only=self.config.fusion == "relay")[0]

    def branch_logits(self, img: Tensor, bbox: Tensor | None = None, *, local_only: bool = False) -> list[Tensor]:
        """Logits ``(B, K, *space)`` of every branch, or of the local one only; arguments as in `forward`.

        In decision fusion the local ones are those after fusion.
        """
        bbox = self._checked_boxes(img, bbox)
        if local_only and not self.trunk.is_coupled:
            img = img[:, :1]  # nothing comes from the other views
        branches = self.trunk(img, bbox, self.decoder.taps)[: 1 if local_only else None]
        logits = [self.decoder(maps, img[:, i], bbox[:, i]) for i, maps in enumerate(branches)]
        if self.config.fusion == "decision":
            for level in range(1, len(logits)):
                logits[0] = logits[0] + self._at_local(logits[level], bbox, level)
        return logits

    def training_loss(self, batch: Mapping[str, Tensor], criterion: Criterion) -> tuple[Tensor, Tensor]:
        """Loss of a batch, and the logits ``(B, K, *space)`` of its local views.

        ``criterion(z_l, y) + context_weight * CE(z_g, pooled y) + consistency_weight * CE(z_g, pooled softmax(z_l))``,
        the last two summed over the context branches, ``z_g`` read where the local view lies in the context view.

        Args:
            batch: as in `SegmentationModel.training_loss`; ``context_target="full"`` needs ``labels``.
            criterion: the loss of the recipe.

        Raises:
            InputError: the labels of whole context views are asked for, but the batch has those of the finest only.
        """
        logits = self.branch_logits(batch["img"], batch["bbox"], local_only=not self._reads_context)
        loss = criterion(logits[0], batch["label"])
        # shares and log-probabilities want full precision
        with torch.autocast(logits[0].device.type, enabled=False):
            full = [x.float() for x in logits]
            for level in range(1, len(full)):
                loss = loss + self._context_loss(full[0], full[level], batch, level)
        return loss, logits[0]

    @property
    def _reads_context(self) -> bool:
        """Whether training reads the logits of the context branches."""
        config = self.config
        return config.fusion == "decision" or config.context_weight > 0 or config.consistency_weight > 0

    def _context_loss(self, local: Tensor, context: Tensor, batch: Mapping[str, Tensor], level: int) -> Tensor:
        config, cells, bbox = self.config, self.cells[level - 1], batch["bbox"].float()
        placed, inside = read_cells(context, bbox[:, level], bbox[:, 0], cells)
        consistency = soft_cross_entropy(placed, pooled_prediction(local, cells) * inside)
        if config.context_target == "center":
            target = pooled_labels(batch["label"], self.num_classes, cells)
            labelled = soft_cross_entropy(placed, target * inside)
        elif "labels" in batch:
            labelled = labelled_cross_entropy(context, batch["labels"][:, level])
        else:
            raise InputError(
                "labels",
                expected="those of every view, as relay.context_target is full",
                got="those of the finest view only",
                hint="Set data.label_levels to all, or relay.context_target to center.",
            )
        return config.context_weight * labelled + config.consistency_weight * consistency

    def _at_local(self, context: Tensor, bbox: Tensor, level: int) -> Tensor:
        """Logits of a context branch at the pixels of the local view."""
        placed, _ = read_cells(context, bbox[:, level], bbox[:, 0], self.cells[level - 1])
        return spread(placed, context.shape[2:])

    def _checked_boxes(self, img: Tensor, bbox: Tensor | None) -> Tensor:
        views = self.views
        assert views.size is not None
        wanted = (len(views.levels), views.in_channels, *views.size)
        if img.ndim != 5 or tuple(img.shape[1:]) != wanted:
            raise ShapeError("img", expected=f"shape (B, {', '.join(map(str, wanted))})", got=tuple(img.shape))
        if bbox is None:
            boxes = naive_boxes(views.levels, views.size)
            return boxes.to(img.device, non_blocking=True).expand(img.shape[0], -1, -1, -1)
        if bbox.shape != (img.shape[0], len(views.levels), 2, 2):
            expected = f"shape {(img.shape[0], len(views.levels), 2, 2)}"
            raise ShapeError("bbox", expected=expected, got=tuple(bbox.shape))
        check_boxes(bbox)
        return bbox.float()
