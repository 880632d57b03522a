"""Settings of the crops that make a sample."""

from dataclasses import dataclass, field
from typing import Literal

from muvit.checks import PositiveInt, check_fields, freeze_lists
from muvit.data.crops.normalize import Normalization, Percentile
from muvit.data.crops.placement import FreeViews, Placement, check_placement
from muvit.data.slides.slide import Padding
from muvit.errors import InputError
from muvit.levels import Level, check_levels, plain_level

LabelLevels = Literal["finest", "all"]


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Contents of one sample."""

    levels: tuple[Level, ...]
    """Downsampling factors of the views, finest first; each must be a level of every slide."""
    size: tuple[PositiveInt, ...]
    """Pixels of every view, (t)(z)yx."""
    normalization: Normalization = field(default_factory=Percentile)
    """From native pixel values to the model's input."""
    padding: Padding = "zero"
    """Pixels of a view outside the image: 0 after normalisation and augmentation, the nearest pixel, or the mirrored
    image."""
    num_classes: PositiveInt | None = None
    """Classes of the labels, background included; required with labels, whose values must be smaller."""
    ignore_labels: tuple[int, ...] = ()
    """Label values that are ignored in loss and metrics."""
    has_background: bool = True
    """Whether class 0 is background; else all classes are foreground."""
    label_levels: LabelLevels = "finest"
    """Views whose labels a sample holds: the finest, or each view at its own level, which the labels must have."""
    placement: Placement = "nested"
    """Placement of the coarse views, see `muvit.data.crops.placement.place_views`."""
    free_views: FreeViews | None = None
    """Offsets and boxes of placement free; unset, anywhere in the image."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_fields(self)
        if not self.size:
            raise InputError("size", expected="a number of pixels for each axis", got="none")
        object.__setattr__(self, "levels", tuple(map(plain_level, self.levels)))
        check_levels(self.levels, len(self.size))
        check_placement(self.placement, self.free_views, len(self.size))

    @property
    def labelled_levels(self) -> tuple[Level, ...]:
        """Levels whose labels a sample holds."""
        return self.levels if self.label_levels == "all" else self.levels[:1]
