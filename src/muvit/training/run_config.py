"""Settings of the run itself: duration, seed, devices, saving and logging."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from muvit.checks import Bounds, PositiveInt, check_fields
from muvit.errors import InputError

_SECONDS = {"s": 1, "min": 60, "h": 3600}
_TIME = re.compile(r"(?P<number>\d{1,6}(\.\d{1,6})?) ?(?P<unit>s|min|h)")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Duration, seed, devices and logging of a run."""

    epochs: PositiveInt = 100
    """Number of epochs, of data.samples_per_epoch samples each."""
    seed: Annotated[int, Bounds(min=0, below=2**32)] = 0
    """Seed of all random numbers."""
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """Type of device; auto takes a GPU if there is one."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Floating-point numbers: float32 (32-true), or in matrix products bfloat16 (bf16-mixed) or float16 with scaled
    gradients (16-mixed); auto takes bf16-mixed on a CUDA device that computes in it, else 32-true."""
    devices: PositiveInt = 1
    """Number of devices of each machine."""
    num_nodes: PositiveInt = 1
    """Number of machines."""
    accumulate: PositiveInt = 1
    """Batches per step: gradients of several batches are averaged, for the effect of a larger batch in the memory of
    one."""
    checkpoint_activations: bool = False
    """Keep the inputs of transformer blocks and of the decoder's finest stage instead of all activations, and compute
    those again in the backward pass: less memory for a third more time."""
    compile: bool = False
    """Compile the transformer blocks (torch.compile): faster steps on a GPU, after a start that takes minutes."""
    val_every: PositiveInt = 1
    """Validate after every n-th epoch."""
    monitor: Literal["val_mdsc", "val_accuracy"] = "val_mdsc"
    """Validation score by which the best model is kept, and which early stopping and a plateau schedule follow."""
    early_stop: PositiveInt | None = None
    """Validations without a better score before training stops; unset, train for all epochs."""
    min_epochs: PositiveInt = 1
    """Fewest epochs before early stopping."""
    save_every: PositiveInt | str = "10min"
    """State to resume from is saved whenever this time has passed (30s, 10min, 2h), also in mid-epoch, or after every
    n-th epoch (a whole number); at the end, and on Ctrl-C or SIGTERM, in any case."""
    pictures: Annotated[int, Bounds(min=0)] = 4
    """Validation crops to draw after each validation; 0 draws none."""
    progress: bool = True
    """Show a progress bar."""
    folds: Annotated[int, Bounds(min=2)] | None = None
    """Number of models of a cross-validation, each validated on one part of the slides of data.train and trained on the
    others; unset, one model."""
    fold: Annotated[int, Bounds(min=0)] | None = None
    """The only one of these models to train, from 0; unset, all of them one after another."""
    wandb_project: str | None = None
    """Also log to this project on Weights & Biases (needs the package wandb); CSV and TensorBoard are always
    written."""

    def __post_init__(self) -> None:
        check_fields(self, "run.")
        if self.fold is not None and self.fold >= (self.folds or 0):
            raise InputError("run.fold", expected=f"a number below run.folds = {self.folds}", got=self.fold)
        if isinstance(self.save_every, str) and not _TIME.fullmatch(self.save_every):
            expected = "a time such as 30s, 10min or 2h, or a number of epochs"
            raise InputError("run.save_every", expected=expected, got=repr(self.save_every))

    @property
    def save_epochs(self) -> int | None:
        """Epochs from one saved state to the next; None if that is a matter of time."""
        return None if isinstance(self.save_every, str) else self.save_every

    @property
    def save_seconds(self) -> float | None:
        """Seconds from one saved state to the next; None if that is a matter of epochs."""
        time = _TIME.fullmatch(str(self.save_every))
        return None if time is None else float(time["number"]) * _SECONDS[time["unit"]]
