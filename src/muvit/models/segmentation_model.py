"""Interface of any model that labels pixels, as training, prediction and evaluation use it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from muvit.errors import InputError
from muvit.levels import Level
from muvit.models.encoder import EncoderConfig
from muvit.models.folder import FolderModel

Criterion = Callable[[Tensor, Tensor], Tensor]
"""From logits ``(B, K, *space)`` and labels ``(B, *space)`` int64 to a scalar."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views that a model takes."""

    levels: tuple[Level, ...]
    """Downsampling factor of each view, finest first."""
    in_channels: int
    """Channels of every view."""
    ndim: int
    """Spatial axes."""
    multiple: tuple[int, ...]
    """The side of a view along each axis is a multiple of this, (z)yx."""
    size: tuple[int, ...] | None = None
    """The one size that the model was built for; None where any multiple will do."""

    def check_size(self, size: Sequence[int], setting: str = "crop_size") -> None:
        """See that views of ``size`` pixels fit.

        Raises:
            InputError: they do not; the message names ``setting``.
        """
        if len(size) != self.ndim or any(n < 1 or n % m for n, m in zip(size, self.multiple, strict=True)):
            raise InputError(setting, expected=f"multiples of {self.multiple}, as the model takes", got=tuple(size))
        if self.size is not None and tuple(size) != self.size:
            raise InputError(setting, expected=f"{self.size}, for which the model was built", got=tuple(size))


def encoder_views(encoder: EncoderConfig) -> Views:
    """The views that an encoder takes, and with it every model that it is part of."""
    return Views(levels=encoder.levels, in_channels=encoder.channels, ndim=encoder.ndim, multiple=encoder.patch)


class SegmentationModel(FolderModel):
    """A model that labels the pixels of the finest of its views."""

    @property
    def views(self) -> Views:
        """The views that the model takes."""
        raise NotImplementedError(f"{type(self).__name__} needs a property views")

    @property
    def num_classes(self) -> int:
        """Classes, background (class 0) included."""
        raise NotImplementedError(f"{type(self).__name__} needs a property num_classes")

    @property
    def backbone(self) -> nn.Module | None:
        """The part that may come pre-trained and learns at its own rate (``optim.encoder_lr_factor``), if any."""
        return None

    def label_logits(self, img: Tensor, bbox: Tensor | None = None) -> Tensor:
        """Logits ``(B, K, *space)`` of the finest view.

        Args:
            img: ``(B, L, C, *space)``.
            bbox: ``(B, L, 2, ndim)``, world pixels, (t)(z)yx.
        """
        return self(img, bbox)

    def training_loss(self, batch: Mapping[str, Tensor], criterion: Criterion) -> tuple[Tensor, Tensor]:
        """Loss of a batch, and the logits ``(B, K, *space)`` of its finest views.

        Args:
            batch: ``img``, ``bbox`` and ``label`` ``(B, *space)``; with ``data.label_levels = "all"`` also ``labels``
                ``(B, L, *space)``, those of every view.
            criterion: the loss of the recipe.
        """
        logits = self.label_logits(batch["img"], batch["bbox"])
        return criterion(logits, batch["label"]), logits
