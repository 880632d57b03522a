"""Settings of the training of a classifier, as a YAML recipe or the command line gives them."""

from dataclasses import dataclass, field

from muvit.data.crops.classified import SlideChoice
from muvit.errors import InputError
from muvit.models.classifier import ClassifierConfig
from muvit.training.old_recipes import upgrade_recipe
from muvit.training.optim import OptimConfig
from muvit.training.recipes import CropsConfig, InitConfig, RunConfig, check_sizes


@dataclass(frozen=True, kw_only=True)
class ClassifyDataConfig(CropsConfig):
    """Which slides of known classes to train on, and how crops are cut from them."""

    train: str
    """Folder with images/<name>.* to train on."""
    classes: str
    """CSV file with a column ``name`` and one of classes, such as the slides.csv that muvit prepare writes."""
    column: str = "group"
    """Name of the column of classes."""
    choice: SlideChoice = "slides"
    """Crops are from each slide in turn, or from one of a class that is drawn first (classes)."""


@dataclass(frozen=True, kw_only=True)
class ClassifyRecipe:
    """Everything that the training of a classifier depends on."""

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

    upgrade = staticmethod(upgrade_recipe)

    def __post_init__(self) -> None:
        check_sizes(self.data, self.model)
        steps = self.run.devices * self.run.num_nodes * self.data.batch_size
        if self.data.samples_per_epoch < steps:
            raise InputError(
                "data.samples_per_epoch",
                expected=f"at least {steps}: a batch for each device",
                got=self.data.samples_per_epoch,
            )
        if self.optim.schedule != "cosine":
            raise InputError("optim.schedule", expected="cosine, for classifiers", got=repr(self.optim.schedule))
        if self.data.val is None and self.run.early_stop is not None:
            raise InputError("data.val", expected="slides, which run.early_stop follows", got="none")
