"""Settings of a training run, as a YAML recipe or the command line gives them."""

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, get_args, get_type_hints

from muvit.data.annotations.config import AnnotationConfig
from muvit.data.crops.augment import Augmentation
from muvit.data.crops.balance import Balance
from muvit.data.crops.config import LabelLevels
from muvit.data.crops.placement import FreeViews, Placement
from muvit.errors import InputError
from muvit.models.baselines import BaselineConfig
from muvit.models.classifier import ClassifierConfig
from muvit.models.mae import MAEConfig
from muvit.models.relay import RelayConfig
from muvit.models.segmenter import SegmenterConfig
from muvit.models.size import check_size
from muvit.models.trained import NetworkConfig
from muvit.training.old_recipes import upgrade_recipe
from muvit.training.optim import OptimConfig, PretrainOptimConfig


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """Which slides to train on, and how crops are cut from them."""

    train: str
    """Folder with images/<name>.* to train on."""
    val: str | None = None
    """Folder of the same layout to validate on after each epoch; unset, the run is not validated."""
    crop_size: int | tuple[int, ...] = 256
    """Side of every view in pixels of its level: one number, or one per axis."""
    normalization: dict[str, Any] = field(default_factory=lambda: {"kind": "percentile"})
    """From native pixels to the model's input: {kind: percentile, low: 1, high: 99.8, scope: view},
    {kind: range, low: 0, high: 255} or {kind: standardize, mean: [...], std: [...]}; without mean and std, those of the
    training slides."""
    padding: Literal["zero", "edge", "reflect"] = "zero"
    """Values of a view beyond the border of the image."""
    placement: Placement = "nested"
    """Placement of the coarse views: around the next finer one, inside the image (nested, MuViT); centred on the
    finest, also beyond the image (concentric, Relay Tokens); on a grid, shared by neighbouring tiles (grid); or
    anywhere (free)."""
    free_views: FreeViews | None = None
    """Offsets and boxes of placement free; unset, anywhere in the image."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Flips, intensity jitter and box perturbation of the training samples."""
    samples_per_epoch: int = 4096
    """Random crops per epoch."""
    val_samples: int | None = None
    """Random crops to validate on, the same each time; unset, every tile of every validation slide."""
    batch_size: int = 8
    """Samples per step and device."""
    num_workers: int | None = None
    """Worker processes of the data loader; unset, up to 8 with a GPU and none on a CPU, whose cores are busy."""

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
class DataConfig(CropsConfig):
    """Which labelled slides to train on, and how crops are cut from them."""

    train: str
    """Folder with images/<name>.* and labels/<name>.* to train on."""
    ignore_labels: tuple[int, ...] = ()
    """Label values ignored in loss and metrics."""
    has_background: bool = True
    """Whether class 0 is background: left out of mDSC and the mean foreground IoU, of the Dice loss and of balance.
    Set false where every class counts (Cityscapes, whose class 0 is road)."""
    label_levels: LabelLevels = "finest"
    """Views whose labels are read: the finest, or all, each at its own level (needs label pyramids)."""
    annotations: AnnotationConfig | None = None
    """Labels that annotations (GeoJSON and others in place of label images) stand for; unset, as the file classes.json
    or classes.yaml beside them says, or the classes that are found in them."""
    class_names: tuple[str, ...] | None = None
    """Name of each class; unset, the names stored with the labels."""
    balance: Balance = "none"
    """Make a share of the samples hold a foreground pixel: of any class, or of a class drawn first (classes)."""
    foreground_fraction: float = 0.5
    """Share of the samples that hold a foreground pixel, with balance foreground or classes."""


@dataclass(frozen=True, kw_only=True)
class PretrainDataConfig(CropsConfig):
    """Which slides to pre-train on, and how crops are cut from them; no labels. The defaults are the paper's."""

    samples_per_epoch: int = 10_000
    """Random crops per epoch."""
    batch_size: int = 48
    """Samples per step and device."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """The pre-trained encoder that a segmenter starts from, and what training may change of it."""

    encoder: str
    """Folder of a pre-trained model or of its run, of any version; other levels than the recipe's are left
    out."""
    mode: Literal["full", "frozen", "lora"] = "full"
    """Train all of the encoder (at optim.encoder_lr_factor), nothing, or low-rank additions to its matrices (needs the
    extra muvit[lora])."""
    lora_rank: int = 8
    """Rank of the additions."""
    lora_alpha: int = 16
    """Additions are scaled by lora_alpha / lora_rank."""

    def __post_init__(self) -> None:
        if self.mode not in ("full", "frozen", "lora"):
            raise InputError("init.mode", expected="full, frozen or lora", got=repr(self.mode))
        for name in ("lora_rank", "lora_alpha"):
            if getattr(self, name) <= 0:
                raise InputError(f"init.{name}", expected="a positive number", got=getattr(self, name))


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
    """Number of epochs, of data.samples_per_epoch samples each."""
    seed: int = 0
    """Seed of all random numbers."""
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Floating-point numbers: float32 (32-true), or in matrix products bfloat16 (bf16-mixed) or float16 with scaled
    gradients (16-mixed); auto takes bf16-mixed on a CUDA device that computes in it, else 32-true."""
    devices: int = 1
    """Number of devices of each machine."""
    num_nodes: int = 1
    """Number of machines."""
    val_every: int = 1
    """Validate after every n-th epoch."""
    monitor: Literal["val_mdsc", "val_accuracy"] = "val_mdsc"
    """Validation score by which the best model is kept, and which early stopping and a plateau schedule follow."""
    early_stop: int | None = None
    """Stop after so many validations in a row without a better score; unset, train for all epochs."""
    min_epochs: int = 1
    """Least number of epochs before early stopping."""
    pictures: int = 4
    """Validation crops to draw after each validation; 0 draws none."""
    progress: bool = True
    """Show a progress bar."""
    wandb_project: str | None = None
    """Also log to this project on Weights & Biases (needs the package wandb); CSV and TensorBoard are always
    written."""

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("devices", 1),
            ("num_nodes", 1),
            ("val_every", 1),
            ("pictures", 0),
            ("seed", 0),
            ("early_stop", 1),
            ("min_epochs", 1),
        ):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise InputError(f"run.{name}", expected=f"a number >= {least}", got=getattr(self, name))
        if self.seed >= 2**32:
            raise InputError("run.seed", expected="a number below 2^32", got=self.seed)
        for name in ("monitor", "accelerator", "precision"):
            choices = get_args(get_type_hints(RunConfig)[name])
            if getattr(self, name) not in choices:
                raise InputError(f"run.{name}", expected=" or ".join(choices), got=repr(getattr(self, name)))


_MAX_BATCH = 2**32
"""Most pixel values of a batch, 16 GiB as float32."""


def check_sizes(data: CropsConfig, model: SegmenterConfig | MAEConfig | ClassifierConfig) -> None:
    """Refuse a model or batches that no machine can hold, before memory is touched.

    Raises:
        InputError: the model has too many parameters, or a batch too many pixels.
    """
    check_size(model)
    encoder, size = model.encoder, data.crop_size
    pixels = size**encoder.ndim if isinstance(size, int) else prod(size)
    values = data.batch_size * len(encoder.levels) * encoder.in_channels * pixels
    if values > _MAX_BATCH:
        raise InputError(
            "data.crop_size and data.batch_size",
            expected=f"batches of at most {_MAX_BATCH:.1e} pixel values",
            got=f"{values:.1e}",
        )


def _check_steps(data: CropsConfig, run: RunConfig) -> None:
    devices = run.devices * run.num_nodes
    if data.samples_per_epoch // devices < data.batch_size:
        raise InputError(
            "data.samples_per_epoch",
            expected=f"at least {devices * data.batch_size}: a batch for each of {devices} devices",
            got=data.samples_per_epoch,
        )


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
    init: InitConfig | None = None
    """A pre-trained encoder to start from; unset, training starts from scratch."""
    baseline: BaselineConfig | None = None
    """Train this network of another library in the place of `model`, on the same samples with the same budget."""
    relay: RelayConfig | None = None
    """Train this timm backbone with relay tokens in the place of `model`, on the same samples with the same budget."""

    upgrade = staticmethod(upgrade_recipe)

    def __post_init__(self) -> None:
        check_sizes(self.data, self.model)
        _check_steps(self.data, self.run)
        for name in ("baseline", "relay"):
            if getattr(self, name) is not None:
                check_size(getattr(self, name), name)
        if self.baseline is not None and self.relay is not None:
            raise InputError("baseline and relay", expected="at most one of them", got="both")
        if self.init is not None and (self.baseline or self.relay) is not None:
            raise InputError("init", expected="a MuViT segmenter to put the encoder into", got="another network")
        if self.data.val is None and (self.optim.schedule == "plateau" or self.run.early_stop is not None):
            raise InputError(
                "data.val", expected="slides, which optim.schedule plateau and run.early_stop follow", got="none"
            )
        weights, num_classes = self.loss.class_weights, self.model.num_classes
        if weights is not None and len(weights) != num_classes:
            raise InputError("loss.class_weights", expected=f"{num_classes}, as model.num_classes says", got=weights)

    @property
    def network(self) -> NetworkConfig:
        """What is trained: `model`, or what stands in its place, with channels, classes, levels and size filled in."""
        chosen = self.baseline or self.relay
        if chosen is None:
            return self.model
        encoder, size = self.model.encoder, self.data.crop_size
        is_single = isinstance(chosen, BaselineConfig) and chosen.views == "finest"
        task: dict[str, Any] = {
            "in_channels": encoder.in_channels,
            "num_classes": self.model.num_classes,
            "levels": encoder.levels[:1] if is_single else encoder.levels,
            "size": (size,) * encoder.ndim if isinstance(size, int) else tuple(size),
        }
        unset = {name: value for name, value in task.items() if getattr(chosen, name) is None}
        if isinstance(chosen, BaselineConfig):
            return replace(chosen, ndim=encoder.ndim, **unset)
        return replace(chosen, **unset)


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """Everything that a pre-training run depends on."""

    data: PretrainDataConfig
    """The slides and the crops."""
    model: MAEConfig
    """The masked autoencoder."""
    boxes: Literal["true", "naive"] = "true"
    """Positions that the model sees: the true boxes, or one set of centred boxes for all (the paper's control)."""
    optim: PretrainOptimConfig = field(default_factory=PretrainOptimConfig)
    """Optimiser and schedule."""
    run: RunConfig = field(default_factory=RunConfig)
    """Duration, seed and devices."""

    upgrade = staticmethod(upgrade_recipe)

    def __post_init__(self) -> None:
        check_sizes(self.data, self.model)
        _check_steps(self.data, self.run)
