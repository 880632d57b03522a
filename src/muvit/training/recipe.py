"""Settings of a training run, as a YAML recipe or the command line gives them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from muvit.data.augment import Augmentation
from muvit.data.balance import Balance
from muvit.errors import InputError
from muvit.segmentation import SegmenterConfig
from muvit.training.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which slides to train on, and how crops are cut from them."""

    train: str
    """Folder with images/<name>.* and labels/<name>.* to train on."""
    val: str | None = None
    """Folder of the same layout to validate on after each epoch; unset, the run is not validated."""
    crop_size: int | tuple[int, ...] = 256
    """Side of every view in pixels of its level: one number, or one per axis."""
    normalization: dict[str, Any] = field(default_factory=lambda: {"kind": "percentile"})
    """From native pixels to the model's input: {kind: percentile, low: 1, high: 99.8, scope: view},
    {kind: range, low: 0, high: 255} or {kind: standardize, mean: [...], std: [...]}."""
    padding: Literal["zero", "edge", "reflect"] = "zero"
    """What a view shows beyond the border of the image."""
    ignore_labels: tuple[int, ...] = ()
    """Label values that count nowhere."""
    class_names: tuple[str, ...] | None = None
    """Name of each class, background first; unset, the names stored with the labels."""
    balance: Balance = "none"
    """Make a share of the samples hold a foreground pixel: of any class, or of a class drawn first (classes)."""
    foreground_fraction: float = 0.5
    """That share."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Flips, intensity jitter and box perturbation of the training samples."""
    samples_per_epoch: int = 4096
    """Random crops that make an epoch."""
    val_samples: int | None = None
    """Random crops to validate on, the same each time; unset, every tile of every validation slide."""
    batch_size: int = 8
    """Samples per step and device."""
    num_workers: int | None = None
    """Processes that read ahead; unset, up to 8 beside a GPU and none on a CPU, which has its cores full."""

    def __post_init__(self) -> None:
        for name in ("samples_per_epoch", "val_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"data.{name}", expected="a positive number", got=value)
        if self.num_workers is not None and self.num_workers < 0:
            raise InputError("data.num_workers", expected="a number >= 0", got=self.num_workers)
        if self.batch_size > self.samples_per_epoch:
            raise InputError(
                "data.batch_size", expected=f"at most samples_per_epoch = {self.samples_per_epoch}", got=self.batch_size
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the segmentation loss (MuViT sections 3.4 and 4.2)."""

    ce_weight: float = 1.0
    """Weight of the cross entropy."""
    dice_weight: float = 0.1
    """Weight of the Dice loss."""
    class_weights: tuple[float, ...] | None = None
    """Weight of each class in the cross entropy."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long and where to train."""

    epochs: int = 100
    """Passes of samples_per_epoch samples."""
    seed: int = 0
    """Seed of everything random."""
    accelerator: str = "auto"
    """Where to compute: auto, cpu, gpu, mps."""
    devices: int = 1
    """Number of devices."""
    val_every: int = 1
    """Validate after every n-th epoch."""
    pictures: int = 4
    """Validation crops to draw after each validation; 0 draws none."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("devices", 1), ("val_every", 1), ("pictures", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"run.{name}", expected=f"a number >= {least}", got=getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a training run depends on."""

    data: DataConfig
    """The slides and the crops."""
    model: SegmenterConfig
    """The segmenter."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    run: RunConfig = field(default_factory=RunConfig)
    """Duration, seed and devices."""
