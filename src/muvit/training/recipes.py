"""Settings of a training run, as a YAML recipe or the command line gives them."""

from dataclasses import dataclass, field, fields
from math import prod
from typing import Annotated, Any, Literal

from muvit.checks import Bounds, NonNegative, Positive, PositiveInt, check_fields, freeze_lists
from muvit.data.annotations.objects import AnnotationConfig
from muvit.data.crops.augment import Augmentation
from muvit.data.crops.balance import Balance
from muvit.data.crops.classified import SlideChoice
from muvit.data.crops.preprocessing import Cropping, LabelLevels
from muvit.data.slides.pixel_size import PixelChoice
from muvit.data.splits import SplitConfig
from muvit.data.tables import is_table
from muvit.errors import InputError
from muvit.models.baselines import BaselineConfig
from muvit.models.classifier import ClassifierConfig
from muvit.models.folder import kinds_of
from muvit.models.mae import MAEConfig
from muvit.models.relay.config import RelayConfig
from muvit.models.segmenter import SegmenterConfig
from muvit.models.size import check_size
from muvit.models.trained import NetworkConfig
from muvit.training.old_recipes import kind_of, upgrade_recipe, with_kind
from muvit.training.optim import OptimConfig, PretrainOptimConfig
from muvit.training.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class CropsConfig(Cropping):
    """Slides to train on, and the crops that are cut from them."""

    train: str
    """Folder with images/<name>.* to train on, or a table of slides (CSV, Parquet)."""
    val: str | None = None
    """Folder of the same layout, or table, to validate on after each epoch; unset, the slides that the table in train,
    or split, set aside; without any the run is not validated."""
    split: SplitConfig | None = None
    """Divide the slides of data.train into those to train, validate and test on; unset, they are divided as they are
    listed."""
    pixel_size_um: Positive | tuple[Positive, ...] | None = None
    """Micrometers per pixel of level 1, at which every slide is read: one number, or one per axis; unset, each slide is
    read at its own."""
    slide_pixel_size_um: Positive | tuple[Positive, ...] | None = None
    """Micrometers per pixel of slides that state none."""
    series: Annotated[int, Bounds(min=0)] | None = None
    """Number of the image in files that hold several, from 0 on; unset, the largest of a TIFF file, and the only one of
    others."""
    z: Annotated[int, Bounds(min=0)] | None = None
    """Number of the plane of stacks, from 0 on, also of their labels; unset, all, as an axis."""
    t: Annotated[int, Bounds(min=0)] | None = None
    """Number of the time point, likewise."""
    channels: tuple[str | int, ...] | None = None
    """Channels by name or number, such as [DAPI, GFP], in the order in which the model takes them; unset, all."""
    crop_size: PositiveInt | tuple[PositiveInt, ...] = 256
    """Side of every view in pixels of its level: one number, or one per axis."""
    normalization: dict[str, Any] = field(default_factory=lambda: {"kind": "percentile"})
    """From native pixels to the model's input: {kind: percentile, low: 1, high: 99.8, scope: view} (or scope sample:
    all views together, or slide: all of it), {kind: range, low: 0, high: 255} or {kind: standardize, mean: [...], std:
    [...]}; for stained RGB sections also {kind: macenko} or {kind: reinhard}, fitted to each slide. What is left out of
    standardize, macenko and reinhard is measured on the training slides."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Flips, jitter of intensities, stains and colours, and box perturbation of the training samples."""
    samples_per_epoch: PositiveInt = 4096
    """Random crops per epoch."""
    val_samples: PositiveInt | None = None
    """Random crops to validate on, the same each time; unset, every tile of every validation slide."""
    batch_size: PositiveInt = 8
    """Samples per step and device."""
    num_workers: Annotated[int, Bounds(min=0)] | None = None
    """Worker processes of the data loader; unset, up to 8 with a GPU and none on a CPU."""
    cache_mib: NonNegative = 512
    """MiB of decoded pixels that each process of the data loader keeps: of the coarsest levels, as many as fit for all
    slides together. It changes the speed, never a sample."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_fields(self, "data.")
        if self.batch_size > self.samples_per_epoch:
            raise InputError(
                "data.batch_size", expected=f"at most samples_per_epoch = {self.samples_per_epoch}", got=self.batch_size
            )
        if self.split is not None and self.val is not None:
            raise InputError("data.split", expected="no data.val beside it", got=self.val)

    @property
    def pixels(self) -> PixelChoice:
        """Pixels that are read of the slides."""
        return PixelChoice(**{one.name: getattr(self, one.name) for one in fields(PixelChoice)})


@dataclass(frozen=True, kw_only=True)
class DataConfig(CropsConfig):
    """Labelled slides to train on, and the crops that are cut from them."""

    train: str
    """Folder with images/<name>.* and labels/<name>.* to train on, or a table of slides (CSV, Parquet)."""
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
    foreground_fraction: Annotated[float, Bounds(min=0, max=1)] = 0.5
    """Share of the samples that hold a foreground pixel, with balance foreground or classes."""


@dataclass(frozen=True, kw_only=True)
class PretrainDataConfig(CropsConfig):
    """Unlabelled slides to pre-train on, and the crops that are cut from them. The defaults are the paper's."""

    samples_per_epoch: PositiveInt = 10_000
    """Random crops per epoch."""
    batch_size: PositiveInt = 48
    """Samples per step and device."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """The pre-trained encoder that training starts from, and the part of it that is trained."""

    encoder: str
    """Folder of a pre-trained model or of its run, of any version; other levels than the recipe's are left
    out."""
    mode: Literal["full", "frozen", "lora"] = "full"
    """Train all of the encoder (at optim.encoder_lr_factor), nothing, or low-rank additions to its matrices (needs the
    extra muvit[lora])."""
    lora_rank: PositiveInt = 8
    """Rank of the additions."""
    lora_alpha: PositiveInt = 16
    """Additions are scaled by lora_alpha / lora_rank."""

    def __post_init__(self) -> None:
        check_fields(self, "init.")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the segmentation loss (MuViT sections 3.4 and 4.2)."""

    ce_weight: NonNegative = 1.0
    """Weight of the cross entropy."""
    dice_weight: NonNegative = 0.1
    """Weight of the Dice loss."""
    class_weights: tuple[NonNegative, ...] | None = None
    """Weight of each class in the cross entropy."""
    boundary_weight: NonNegative = 0.0
    """Weight of the boundary loss (Kervadec et al. 2019, who begin with 0.01): the mean distance of predicted pixels
    from the true class, in pixels. Not in the MuViT paper, and not tried with its models here."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_fields(self, "loss.")


_MAX_BATCH = 2**32
"""Most pixel values of a batch, 16 GiB as float32."""


def check_sizes(data: CropsConfig, model: NetworkConfig | MAEConfig | ClassifierConfig) -> None:
    """Refuse a model or batches that no machine can hold, before memory is allocated.

    Raises:
        InputError: the model has too many parameters, or a batch too many pixels.
    """
    check_size(model)
    views, size = model.encoder if isinstance(model, MAEConfig | ClassifierConfig) else model, data.crop_size
    pixels = size**views.ndim if isinstance(size, int) else prod(size)
    values = data.batch_size * len(views.levels) * (views.in_channels or 1) * pixels
    if values > _MAX_BATCH:
        raise InputError(
            "data.crop_size and data.batch_size",
            expected=f"batches of at most {_MAX_BATCH:.1e} pixel values",
            got=f"{values:.1e}",
        )


def check_validation(recipe: "Recipe | ClassifyRecipe", *, is_validated: bool) -> None:
    """Refuse settings that follow a validation score where there is none.

    Raises:
        InputError: there are no slides to validate on.
    """
    if not is_validated and (recipe.optim.schedule == "plateau" or recipe.run.early_stop is not None):
        raise InputError(
            "data.val", expected="slides, which optim.schedule plateau and run.early_stop follow", got="none"
        )


def _may_be_validated(data: CropsConfig, run: RunConfig) -> bool:
    """Whether there can be slides to validate on; which a table states is known when it is read."""
    return any((data.val, data.split, run.folds, is_table(data.train)))


def _check_no_folds(run: RunConfig) -> None:
    if run.folds is not None:
        raise InputError("run.folds", expected="none, but in the training of a segmentation model", got=run.folds)


def _check_steps(data: CropsConfig, run: RunConfig) -> None:
    devices = run.devices * run.num_nodes
    step = devices * data.batch_size * run.accumulate
    if data.samples_per_epoch < step:
        batches = "a batch" if run.accumulate == 1 else f"{run.accumulate} batches"
        raise InputError(
            "data.samples_per_epoch",
            expected=f"at least {step}: {batches} for each of {devices} devices",
            got=data.samples_per_epoch,
        )


Preset = Literal["paper", "modern"]
"""Values of settings that are left at their defaults."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a training run."""

    data: DataConfig
    """The slides and the crops."""
    model: NetworkConfig
    """The model; its ``kind`` is muvit, relay, or the name of a network of another library."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    run: RunConfig = field(default_factory=RunConfig)
    """Duration, seed and devices."""
    init: InitConfig | None = None
    """A pre-trained encoder to start from; unset, training starts from scratch."""
    preset: Preset = "paper"
    """Values of model that are left at their defaults: the paper's; or modern, with rotary_base from crop size and
    levels and level_embed_std 0.02, which small models and worlds want, and decode all, which learns in fewer steps."""

    upgrade = staticmethod(upgrade_recipe)
    kind_of = staticmethod(kind_of)
    with_kind = staticmethod(with_kind)

    @staticmethod
    def kinds() -> tuple[str, ...]:
        """Kinds of model."""
        return tuple(RECIPES)

    @staticmethod
    def of_kind(kind: str) -> type["Recipe"]:
        """The class of recipe with this kind of model.

        Raises:
            InputError: there is no such kind.
        """
        if kind not in RECIPES:
            raise InputError("model.kind", expected=f"one of {', '.join(RECIPES)}", got=repr(kind))
        return RECIPES[kind]

    def __post_init__(self) -> None:
        check_sizes(self.data, self.model)
        _check_steps(self.data, self.run)
        if self.init is not None and not isinstance(self.model, SegmenterConfig):
            raise InputError("init", expected="model.kind muvit, for a pre-trained encoder", got=self.model.kind)
        check_validation(self, is_validated=_may_be_validated(self.data, self.run))
        if self.run.folds is not None and self.data.val is not None:
            raise InputError("run.folds", expected="no data.val: the folds validate", got=self.data.val)
        weights, num_classes = self.loss.class_weights, self.model.num_classes
        if weights is not None and num_classes not in (None, len(weights)):
            raise InputError("loss.class_weights", expected=f"{num_classes}, as model.num_classes says", got=weights)


@dataclass(frozen=True, kw_only=True)
class MuViTRecipe(Recipe):
    """A recipe whose model is a multi-resolution vision transformer."""

    model: SegmenterConfig
    """The model."""


@dataclass(frozen=True, kw_only=True)
class RelayRecipe(Recipe):
    """A recipe whose model is a timm backbone with relay tokens."""

    model: RelayConfig
    """The model."""


@dataclass(frozen=True, kw_only=True)
class BaselineRecipe(Recipe):
    """A recipe whose model is a network of another library."""

    model: BaselineConfig
    """The model."""


RECIPES: dict[str, type[Recipe]] = {
    "muvit": MuViTRecipe,
    "relay": RelayRecipe,
    **dict.fromkeys(kinds_of(BaselineConfig), BaselineRecipe),
}
"""Class of recipe by kind of model, to parse settings: in each of them every setting has one type."""


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """All settings of a pre-training run."""

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
    preset: Preset = "paper"
    """Values of model.encoder that are left at their defaults: the paper's; or modern, with rotary_base from crop size
    and levels and level_embed_std 0.02, which small models and worlds want."""

    upgrade = staticmethod(upgrade_recipe)

    def __post_init__(self) -> None:
        check_sizes(self.data, self.model)
        _check_steps(self.data, self.run)
        _check_no_folds(self.run)


@dataclass(frozen=True, kw_only=True)
class ClassifyDataConfig(CropsConfig):
    """Slides of known classes to train on, and the crops that are cut from them."""

    train: str
    """Folder with images/<name>.* to train on, or a table of slides (CSV, Parquet)."""
    classes: str
    """Table with a column ``name`` and one of classes, such as the slides.csv that muvit prepare writes."""
    column: str = "group"
    """Name of the column of classes."""
    choice: SlideChoice = "slides"
    """Crops are from each slide in turn, or from one of a class that is drawn first (classes)."""


@dataclass(frozen=True, kw_only=True)
class ClassifyRecipe:
    """All settings of the training of a classifier."""

    data: ClassifyDataConfig
    """The slides, their classes and the crops."""
    model: ClassifierConfig
    """The classifier."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    run: RunConfig = field(default_factory=RunConfig)
    """Duration, seed and devices; the best model is that of the lowest ``val_loss``, or, with ``monitor``
    ``val_accuracy``, of the highest accuracy on slides."""
    init: InitConfig | None = None
    """A pre-trained encoder to start from; unset, training starts from scratch."""
    preset: Preset = "paper"
    """Values of model.encoder that are left at their defaults: the paper's; or modern, with rotary_base from crop size
    and levels and level_embed_std 0.02, which small models and worlds want."""

    upgrade = staticmethod(upgrade_recipe)

    def __post_init__(self) -> None:
        check_sizes(self.data, self.model)
        _check_steps(self.data, self.run)
        if self.optim.schedule != "cosine":
            raise InputError("optim.schedule", expected="cosine, for classifiers", got=repr(self.optim.schedule))
        check_validation(self, is_validated=_may_be_validated(self.data, self.run))
        _check_no_folds(self.run)
