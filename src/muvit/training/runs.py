"""Folder, trainer, loggers and devices of a training run."""

import logging
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader

from muvit.data.splits import SlideSets, read_sets
from muvit.data.tables import write_slides
from muvit.durable import partial_files, write_whole
from muvit.errors import ExistsError, InputError, MuViTError, require_package
from muvit.locks import sole_writer
from muvit.models.folder import plain
from muvit.models.layers.attention import Block
from muvit.models.layers.stage import Stage
from muvit.settings import read_settings
from muvit.training.datamodules import CropsData
from muvit.training.nonfinite import StopAtNonFinite
from muvit.training.recipes import ClassifyRecipe, PretrainRecipe, Recipe
from muvit.training.resume import SaveState, StateFiles, has_state, newest_state, unfit_state
from muvit.training.run_config import RunConfig
from muvit.training.slides import AnyRecipe, complete
from muvit.workers import exit_with_parent

RECIPE = "recipe.yaml"
SLIDES = "slides.csv"


@contextmanager
def run_folder(
    recipe: AnyRecipe, output: Path, resume: bool, overwrite: bool, slides: SlideSets | None = None
) -> Iterator[Path | None]:
    """The folder of a run while it is trained, which no other run may write; arguments and result of `prepare_folder`.

    Raises:
        InputError: another process trains in it; also as `prepare_folder`.
        ExistsError, CheckpointError, ReadError: as `prepare_folder`.
    """
    with sole_writer(output) if is_first_process() else nullcontext():
        yield prepare_folder(recipe, output, resume, overwrite, slides)


def prepare_folder(
    recipe: AnyRecipe, output: Path, resume: bool, overwrite: bool, slides: SlideSets | None = None
) -> Path | None:
    """Make the folder of a run; the state to resume from, if it is resumed.

    Args:
        recipe: all settings.
        output: the folder.
        resume: continue the run in it.
        overwrite: delete the run in it.
        slides: those of the run, to write as a table, which `stored_slides` reads.

    Raises:
        ExistsError: the folder exists, and neither ``resume`` nor ``overwrite`` is set.
        CheckpointError, ReadError: the state or the recipe to resume from is damaged.
        InputError: there is nothing to resume, the recipe has changed since, the folder to overwrite is no run, or this
            machine lacks devices or packages that the run needs.
    """
    check_devices(recipe.run)
    if recipe.run.wandb_project is not None:
        check_wandb()
    settings = plain(asdict(recipe))
    if not is_first_process():  # only the first process writes the folder
        return newest_state(output) if resume else None
    if output.exists() and not output.is_dir():
        raise InputError(output, expected="a folder for the run", got="a file")
    if resume:
        checkpoint = newest_state(output)
        if not (output / RECIPE).is_file():
            raise InputError(output, expected="an interrupted run, to resume it", got=f"no {output / RECIPE}")
        # read as a recipe: an earlier version may have written it, in its spelling and without later settings
        changed = _changed_settings(plain(asdict(complete(read_settings(output / RECIPE, type(recipe))))), settings)
        if changed:
            raise InputError(
                output / RECIPE,
                expected="the settings that the run was started with",
                got=f"others in {', '.join(changed)}",
            )
        _write(output, settings, slides)
        return checkpoint
    if output.exists() and set(output.iterdir()) - set(partial_files(output)):
        if not overwrite:
            raise ExistsError(output, hint="Pass --resume to continue the run, or --overwrite to delete it.")
        if not (output / RECIPE).is_file():
            raise InputError(output, expected=f"a run to overwrite, with {RECIPE}", got="another folder")
        for path in sorted(output.iterdir(), key=lambda path: path.name == RECIPE):  # last, as it says what this is
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    output.mkdir(parents=True, exist_ok=True)
    _write(output, settings, slides)
    return None


def _write(output: Path, settings: dict[str, Any], slides: SlideSets | None) -> None:
    """Write the recipe, which marks the folder as that of a run, and then its slides."""
    write_whole(output / RECIPE, yaml.safe_dump(settings, sort_keys=False).encode())
    if slides is not None:
        write_slides(output / SLIDES, [replace(s, split=split) for split, files in slides.items() for s in files])


def stored_slides(output: Path) -> SlideSets | None:
    """The slides that a run was started with, by their split; None if they were not stored.

    Raises:
        ReadError: a file is missing.
        InputError: the table was changed.
    """
    return read_sets(output / SLIDES) if (output / SLIDES).is_file() else None


def _changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Parts of a recipe that differ; a run may be continued for longer or elsewhere, but not with another seed."""
    changed = [name for name in now if name != "run" and before.get(name) != now[name]]
    return changed if before["run"]["seed"] == now["run"]["seed"] else [*changed, "run.seed"]


def is_first_process() -> bool:
    """Whether this is the only process of the run, or the first of several."""
    return getattr(rank_zero_only, "rank", 0) == 0


def check_devices(run: RunConfig) -> None:
    """Refuse to compute on devices that this machine does not have.

    Raises:
        InputError: there are fewer than asked for.
    """
    found: dict[str, float] = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    found["gpu"] = max(found.values())
    found["auto"] = found["gpu"] or inf  # any number of processes share a CPU
    if found.get(run.accelerator, inf) < run.devices:
        raise InputError(
            "run.devices",
            expected=f"at most the {found[run.accelerator]} of kind {run.accelerator!r} that this machine has",
            got=run.devices,
            hint="Set run.accelerator to auto or cpu.",
        )


def fit(
    task: LightningModule,
    data: CropsData,
    recipe: Recipe | PretrainRecipe | ClassifyRecipe,
    output: Path,
    *,
    callbacks: Sequence[Callback],
    checkpoint: Path | None,
) -> Path:
    """Train in a folder that `prepare_folder` has made; the folder of the best model, or of the last one.

    Raises:
        KeyboardInterrupt: Ctrl-C, or SIGTERM; like every other error, it notes how to resume.
        CheckpointError: the state to resume from is that of another run.
    """
    run = recipe.run
    if not is_first_process():
        exit_with_parent()  # the process that has started this one, or a launcher
    with quiet(), stoppable(output):
        often = log_interval(data.train_dataloader(), run.devices * run.num_nodes)
        trainer = build_trainer(run, output, callbacks, data=data, log_every_n_steps=often)
        fit_from(trainer, checkpoint, task, datamodule=data)
    return output / ("best" if (output / "best").exists() else "last")


def prepare_model(model: nn.Module, run: RunConfig) -> None:
    """Recompute activations and compile blocks, as a run asks for; the weights and their names stay as they are.

    Raises:
        InputError: the model is of a kind that has no such parts.
    """
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    for name, is_asked in (("checkpoint_activations", run.checkpoint_activations), ("compile", run.compile)):
        if is_asked and not stages:
            raise InputError(f"run.{name}", expected="false, for a model without muvit's transformer blocks", got=True)
    for stage in stages:
        stage.recomputes = run.checkpoint_activations
        if run.compile and isinstance(stage, Block):
            stage.compile()


def fit_from(trainer: Trainer, checkpoint: Path | None, task: LightningModule, **data: Any) -> None:
    """Call the ``fit`` of a trainer that goes on from a state, if there is one.

    Raises:
        CheckpointError: the state is that of another run.
    """
    try:
        trainer.fit(task, **data, ckpt_path=checkpoint, weights_only=True)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        states = [one for one in trainer.checkpoint_callbacks if isinstance(one, SaveState)]
        if checkpoint is None or isinstance(error, MuViTError) or any(one.has_started for one in states):
            raise
        raise unfit_state(checkpoint, error) from error


def build_trainer(
    run: RunConfig,
    output: Path | None,
    callbacks: Sequence[Callback],
    *,
    data: CropsData | None = None,
    **options: Any,
) -> Trainer:
    """Trainer of a run that logs to ``output`` and can be resumed from there; without ``output`` it writes nothing.

    Args:
        run: duration, devices and logging.
        output: folder of the run.
        callbacks: those that save models and draw.
        data: the batches; None for those of a user's own loader.
        options: of Lightning's trainer.
    """
    watch = StopAtNonFinite(data)
    keep = [watch, *callbacks]
    if output is not None:
        keep += [
            SaveState(output, run, check=watch.check, has_position=data is not None),
            LearningRateMonitor("step"),
        ]
        options.setdefault("logger", build_loggers(output, run.wandb_project))
    if run.progress:
        keep.append(TQDMProgressBar(refresh_rate=5))
    settings: dict[str, Any] = {
        "accelerator": run.accelerator,
        "devices": run.devices,
        "num_nodes": run.num_nodes,
        "accumulate_grad_batches": run.accumulate,
        "sync_batchnorm": shares_batch_statistics(run),
        "max_epochs": run.epochs,
        "min_epochs": run.min_epochs,
        "check_val_every_n_epoch": run.val_every,
        "callbacks": keep,
        "logger": False,
        "enable_checkpointing": output is not None,
        "log_every_n_steps": 10,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # EpochSampler shares the samples out itself
        "enable_progress_bar": run.progress,
        "enable_model_summary": False,
    }
    settings["plugins"] = [StateFiles()]
    if "precision" not in options:
        settings |= _precision(run, settings["plugins"])
    return Trainer(**settings | options)


def shares_batch_statistics(run: RunConfig) -> bool:
    """Whether batch norms take their statistics from all processes; there are such norms on CUDA devices only."""
    has_cuda = run.accelerator not in ("cpu", "mps") and torch.cuda.is_available()
    return has_cuda and run.devices * run.num_nodes > 1


def _precision(run: RunConfig, plugins: list[Any]) -> dict[str, Any]:
    """Arguments of Lightning's trainer for the precision of a run, beside plugins."""
    precision = precision_for(run.accelerator) if run.precision == "auto" else run.precision
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if precision == "16-mixed" and (run.accelerator == "cpu" or not has_gpu):
        return {"plugins": [*plugins, MixedPrecision("16-mixed", "cpu")]}  # Lightning would take bf16-mixed
    return {"precision": precision}


def log_interval(batches: DataLoader, num_processes: int = 1) -> int:
    """Steps between two lines of the log: ten, or those of an epoch, if it is shorter."""
    try:
        return max(1, min(10, len(batches) // num_processes))
    except TypeError:  # an endless loader
        return 10


def build_loggers(
    output: Path, wandb_project: str | None, *, tensorboard: bool = True, run_name: str | None = None
) -> list[Logger]:
    """CSV and TensorBoard in ``output``, and Weights & Biases if a project is named.

    Raises:
        InputError: the package that a project needs is not installed.
    """
    loggers: list[Logger] = [CSVLogger(output, name="logs")]
    if tensorboard:
        loggers.append(TensorBoardLogger(output, name="tensorboard"))
    if wandb_project is not None:
        check_wandb()
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(WandbLogger(project=wandb_project, name=run_name, save_dir=output))
    return loggers


def check_wandb() -> None:
    """Refuse to log to Weights & Biases without its package.

    Raises:
        InputError: it is not installed.
    """
    require_package("wandb", "logging to Weights & Biases", package="wandb", install="wandb")


def precision_for(accelerator: str) -> str:
    """bfloat16 mixed precision on a GPU that supports it, else full precision."""
    can = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if can and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


@contextmanager
def stoppable(output: Path | None = None) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end a run by `KeyboardInterrupt`; errors of a run in ``output`` note how to resume it.

    Lightning raises `SystemExit`, after SIGTERM with the exit status of success, and leaves Ctrl-C disabled.
    """
    is_main = threading.current_thread() is threading.main_thread()  # the only one that receives signals
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise _noted(KeyboardInterrupt(), output) from stop
    except BaseException as error:
        _noted(error, output)
        raise
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)


def _noted(error: BaseException, output: Path | None) -> BaseException:
    if output is not None and is_first_process():
        if has_state(output):
            error.add_note(f"The run in {output} can be resumed with --resume.")
        else:
            error.add_note(f"The run in {output} has not saved its state yet: restart it with --overwrite.")
    return error


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress messages of Lightning that users cannot act on."""
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        log.setLevel(before)
