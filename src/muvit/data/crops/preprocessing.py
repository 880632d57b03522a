"""Settings of crops, and what a trained model keeps of them beside its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from muvit.checks import Bounds, NonNegative, Positive, PositiveInt, check_fields, freeze_lists
from muvit.data.crops.normalize import Normalization, Percentile, normalization_from_dict, normalization_to_dict
from muvit.data.crops.placement import FreeViews, Placement, check_placement, upgrade_placement
from muvit.data.slides.pixel_size import PixelChoice
from muvit.data.slides.slide import Padding
from muvit.errors import CheckpointError, InputError
from muvit.levels import Level, check_levels, plain_level
from muvit.plain_yaml import read_yaml

LabelLevels = Literal["finest", "all"]
NonFinite = Literal["error", "ignore"]
Byte = Annotated[int, Bounds(min=0, max=255)]


@dataclass(frozen=True, kw_only=True)
class Cropping:
    """Settings of the cutting of views, shared by recipes, data sets and trained models."""

    padding: Padding = "zero"
    """Pixels of a view outside the image: 0 after normalisation and augmentation, the nearest pixel, or the mirrored
    image."""
    placement: Placement = "nested"
    """Placement of the coarse views: around the next finer one, inside the image (nested, MuViT); centred on the
    finest, also beyond the image (concentric, Relay Tokens); on a grid, shared by neighbouring tiles (grid); or
    anywhere (free)."""
    free_views: FreeViews | None = None
    """Offsets and boxes of placement free; unset, anywhere in the image."""
    nonfinite: NonFinite = "error"
    """Pixels that are NaN or infinite in some channel: refused (error), or 0 after normalisation, in every channel, and
    ignored in loss and metrics (ignore)."""

    @property
    def cropping(self) -> dict[str, Any]:
        """These settings alone, by name, for another configuration that has them."""
        return {field.name: getattr(self, field.name) for field in fields(Cropping)}


@dataclass(frozen=True, kw_only=True)
class CropConfig(Cropping):
    """Contents of one sample, and the memory for reading it."""

    levels: tuple[Level, ...]
    """Downsampling factors of the views, finest first; each must be a level of every slide."""
    size: tuple[PositiveInt, ...]
    """Pixels of every view, (t)(z)yx."""
    normalization: Normalization = field(default_factory=Percentile)
    """From native pixel values to the model's input."""
    num_classes: PositiveInt | None = None
    """Classes of the labels, background included; required with labels, whose values must be smaller."""
    ignore_labels: tuple[int, ...] = ()
    """Label values that are ignored in loss and metrics."""
    has_background: bool = True
    """Whether class 0 is background; else all classes are foreground."""
    label_levels: LabelLevels = "finest"
    """Views whose labels a sample holds: the finest, or each view at its own level, which the labels must have."""
    cache_mib: NonNegative = 512
    """MiB of decoded pixels that each process keeps: of the coarsest levels, as many as fit for all slides together.
    The samples are the same with any."""

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


FILE = "preprocessing.yaml"


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Cropping):
    """Cutting, normalisation and classes of the crops that a model was trained on; prediction repeats them."""

    crop_size: tuple[PositiveInt, ...]
    """Side of every view in pixels of its level, (z)yx."""
    normalization: Normalization
    """From native pixel values to the model's input."""
    class_names: tuple[str, ...]
    """Name of each class."""
    class_colors: tuple[tuple[Byte, Byte, Byte], ...]
    """RGB colour of each class, 0-255."""
    has_background: bool = True
    """Whether class 0 is background; else all classes are foreground."""
    pixel_size_um: tuple[Positive, ...] | None = None
    """Size of the pixels that levels count from in training, (t)(z)yx; None if unknown."""
    is_resampled: bool = False
    """Whether every slide was read at exactly this size; else each at its own, as prediction reads those whose size is
    within 10 % of it."""

    def __post_init__(self) -> None:
        if isinstance(self.free_views, dict):  # as it comes from YAML
            object.__setattr__(self, "free_views", FreeViews(**self.free_views))
        check_fields(self)
        if not self.crop_size:
            raise InputError("crop_size", expected="a number of pixels for each axis", got="none")
        if not isinstance(self.has_background, bool):
            raise InputError("has_background", expected="true or false", got=repr(self.has_background))
        check_placement(self.placement, self.free_views, len(self.crop_size))
        if len(self.class_names) != len(self.class_colors):
            raise InputError(
                "class_colors",
                expected=f"one colour for each of {len(self.class_names)} classes",
                got=self.class_colors,
            )

    @property
    def normalizes_by_view(self) -> bool:
        """Whether the normalised pixels of a view are independent of the other views of its sample."""
        return not (isinstance(self.normalization, Percentile) and self.normalization.scope == "sample")

    @property
    def pixels(self) -> PixelChoice:
        """Size of the pixels at which all slides were read."""
        return PixelChoice(pixel_size_um=self.pixel_size_um if self.is_resampled else None)

    def crops(self, levels: Sequence[Level], **labels: Any) -> CropConfig:
        """Crops as in training.

        Args:
            levels: downsampling factors of the views, finest first.
            labels: settings of `CropConfig` that concern labels.
        """
        return CropConfig(
            levels=tuple(levels),
            size=self.crop_size,
            normalization=self.normalization,
            **self.cropping,
            **labels,
        )

    def to_yaml(self) -> str:
        """Text of ``preprocessing.yaml``, which `load` reads."""
        values = asdict(self) | {"normalization": normalization_to_dict(self.normalization)}
        return yaml.safe_dump({k: _lists(v) for k, v in values.items()}, sort_keys=False)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_yaml`, from the values of its YAML; older spellings are read.

        Raises:
            InputError: a value does not fit.
            KeyError: the normalisation is missing.
            TypeError: another setting is missing, or unknown.
        """
        settings: dict[str, Any] = {name: _tuples(value) for name, value in upgrade_placement(values).items()}
        return cls(**settings | {"normalization": normalization_from_dict(values["normalization"])})

    @classmethod
    def load(cls, folder: Path) -> "Preprocessing":
        """Read ``preprocessing.yaml`` of a model folder.

        Raises:
            CheckpointError: the file is missing or does not hold these settings.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise CheckpointError(folder, expected=f"a trained model, with {FILE}", got="none")
        try:
            return cls.from_plain(read_yaml(file))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(file, expected="the settings of a trained model", got=error) from error


def _lists(value: object) -> object:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, tuple) else value


def _tuples(value: object) -> object:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
