"""Training runs, end to end: checks first, then training, with all results in one folder."""

import logging
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from muvit.data.crops.dataset import MuViTDataset
from muvit.data.splits import SlideSets
from muvit.errors import ExistsError, InputError
from muvit.losses import SegmentationLoss
from muvit.models.classifier import Classifier
from muvit.models.mae import MuViTMAE
from muvit.models.segmenter import Segmenter
from muvit.models.trained import build_model
from muvit.training.best_validation import BestLabels, BestReconstructions
from muvit.training.callbacks import (
    ExampleClasses,
    ExamplePictures,
    ReconstructionPictures,
    SaveBestAndLast,
)
from muvit.training.datamodules import ClassificationData, PretrainData, SegmentationData
from muvit.training.optim import PretrainOptimConfig
from muvit.training.pretrained import load_pretrained_encoder
from muvit.training.recipes import ClassifyRecipe, PretrainRecipe, Recipe
from muvit.training.resume import FOLDER, LAST, newest_state
from muvit.training.run_config import RunConfig
from muvit.training.runs import (
    build_loggers,
    build_trainer,
    check_wandb,
    fit,
    fit_from,
    is_first_process,
    log_interval,
    prepare_model,
    quiet,
    run_folder,
    stoppable,
    stored_slides,
)
from muvit.training.slides import complete
from muvit.training.tasks import ClassificationTask, PretrainTask, SegmentationTask


def train_segmenter(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] | None = None,
    slides: SlideSets | None = None,
) -> Path:
    """Train a model that labels pixels.

    Args:
        recipe: all settings.
        output: folder of the run. It receives the model folders ``best`` (by ``run.monitor``) and ``last``,
            ``logs`` (CSV) and ``tensorboard``, ``pictures`` of validation crops, ``resume``, the recipe, and the
            slides with their split (``slides.csv``).
        resume: continue the run in ``output`` from its last state, on the slides stored there; on a CPU, bit for bit.
        overwrite: delete an existing run.
        callbacks: further Lightning callbacks.
        slides: the slides of a new run, by default those that the recipe says.

    Returns:
        The folder of the best model, or of the last one if the run is not validated.

    Raises:
        ExistsError: ``output`` exists, and neither ``resume`` nor ``overwrite`` is set.
        InputError, ReadError: slides, labels, settings or the pre-trained encoder do not fit; nothing has been written
            then.
    """
    output, recipe = Path(output), complete(recipe)
    lightning.seed_everything(recipe.run.seed, verbose=False)
    model = build_model(recipe.model)
    prepare_model(model, recipe.run)
    data = SegmentationData(recipe, model.views, (stored_slides(output) if resume else None) or slides)
    preprocessing, val_crops = data.preprocessing, data.val_crops
    if recipe.init is not None:
        assert isinstance(model, Segmenter)  # checked by the recipe
        load_pretrained_encoder(model, recipe.init)
    task = SegmentationTask(
        model,
        SegmentationLoss(**asdict(recipe.loss), has_background=preprocessing.has_background),
        recipe.optim,
        preprocessing.class_names,
        freeze_encoder=recipe.init is not None and recipe.init.mode == "frozen",
        seed=recipe.run.seed,
        monitor=recipe.run.monitor,
        has_background=preprocessing.has_background,
        ignore_labels=recipe.data.ignore_labels,
    )
    with run_folder(recipe, output, resume, overwrite, data.slides) as checkpoint:
        best = SaveBestAndLast(output, preprocessing, metric=recipe.run.monitor, recipe=recipe, slides=data.slides)
        keep: list[Callback] = [best]
        if val_crops is not None:
            keep.append(BestLabels(output, val_crops, preprocessing, best, recipe.data.ignore_labels))
        keep += callbacks or []
        if recipe.run.early_stop is not None:
            keep.append(EarlyStopping(recipe.run.monitor, mode="max", patience=recipe.run.early_stop))
        if val_crops is not None and recipe.run.pictures:
            keep.append(ExamplePictures(output / "pictures", val_crops, recipe.run.pictures, preprocessing))
        return fit(task, data, recipe, output, callbacks=keep, checkpoint=checkpoint)


def train_classifier(
    recipe: ClassifyRecipe,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] | None = None,
) -> Path:
    """Train a classifier.

    Args:
        recipe: all settings.
        output: folder of the run. It receives the model folders ``best`` and ``last``, ``logs`` (CSV) and
            ``tensorboard``, ``pictures`` of validation crops, ``resume`` and the recipe.
        resume: continue the run in ``output`` from its last state; on a CPU, bit for bit.
        overwrite: delete an existing run.
        callbacks: further Lightning callbacks.

    Returns:
        The folder of the best model, or of the last one if the run is not validated.

    Raises:
        ExistsError: ``output`` exists, and neither ``resume`` nor ``overwrite`` is set.
        InputError, ReadError: slides, classes, settings or the pre-trained encoder do not fit; nothing has been written
            then.
    """
    output, recipe, run = Path(output), complete(recipe), recipe.run
    lightning.seed_everything(run.seed, verbose=False)
    data = ClassificationData(recipe, stored_slides(output) if resume else None)
    preprocessing, val_crops = data.preprocessing, data.val_crops
    config = replace(recipe.model, num_classes=len(data.class_names))
    model = Classifier(config)
    prepare_model(model, run)
    if recipe.init is not None:
        load_pretrained_encoder(model, recipe.init)
    is_frozen = recipe.init is not None and recipe.init.mode == "frozen"
    task = ClassificationTask(model, recipe.optim, freeze_encoder=is_frozen, seed=run.seed)
    with run_folder(recipe, output, resume, overwrite, data.slides) as checkpoint:
        metric: Literal["val_loss", "val_accuracy"] = "val_accuracy" if run.monitor == "val_accuracy" else "val_loss"
        keep: list[Callback] = [
            SaveBestAndLast(
                output,
                preprocessing,
                metric=metric,
                lower_is_better=metric == "val_loss",
                recipe=recipe,
                slides=data.slides,
            ),
            *(callbacks or ()),
        ]
        if run.early_stop is not None:
            keep.append(EarlyStopping(metric, mode="min" if metric == "val_loss" else "max", patience=run.early_stop))
        if val_crops is not None and run.pictures:
            keep.append(ExampleClasses(output / "pictures", val_crops, run.pictures, data.class_names))
        return fit(task, data, recipe, output, callbacks=keep, checkpoint=checkpoint)


def pretrain_mae(
    recipe: PretrainRecipe,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] | None = None,
) -> Path:
    """Pre-train a masked autoencoder on unlabelled slides.

    Args:
        recipe: all settings.
        output: folder of the run. It receives the model folders ``best`` (lowest validation loss) and ``last``,
            ``logs`` (CSV) and ``tensorboard``, ``pictures`` of reconstructions, ``resume`` and the recipe.
        resume: continue the run in ``output`` from its last state; on a CPU, bit for bit.
        overwrite: delete an existing run.
        callbacks: further Lightning callbacks.

    Returns:
        The folder of the best model, or of the last one if the run is not validated.

    Raises:
        ExistsError: ``output`` exists, and neither ``resume`` nor ``overwrite`` is set.
        InputError, ReadError: slides or settings do not fit; nothing has been written then.
    """
    output, recipe, run = Path(output), complete(recipe), recipe.run
    lightning.seed_everything(run.seed, verbose=False)
    data = PretrainData(recipe, stored_slides(output) if resume else None)
    val_crops = data.val_crops
    model = MuViTMAE(recipe.model)
    prepare_model(model, run)
    task = PretrainTask(
        model, recipe.optim, batch_size=recipe.data.batch_size, seed=run.seed, use_boxes=recipe.boxes == "true"
    )
    with run_folder(recipe, output, resume, overwrite, data.slides) as checkpoint:
        best = SaveBestAndLast(
            output, data.preprocessing, metric="val_loss", lower_is_better=True, recipe=recipe, slides=data.slides
        )
        keep: list[Callback] = [best]
        if val_crops is not None:
            keep.append(BestReconstructions(output, val_crops, best))
        keep += callbacks or []
        if val_crops is not None and run.pictures:
            keep.append(ReconstructionPictures(output / "pictures", val_crops, run.pictures))
        return fit(task, data, recipe, output, callbacks=keep, checkpoint=checkpoint)


def fit_mae(
    model: MuViTMAE,
    train_dataloader: DataLoader,
    val_dataloader: DataLoader | None,
    output: Path | str | None = None,
    num_epochs: int = 500,
    lr: float | None = None,
    nobox: bool = False,
    warmup_epochs: int = 2,
    logger: Literal["tensorboard", "tb", "wandb"] | None = "tensorboard",
    run_name: str | None = None,
    wandb_project: str | None = "muvit",
    ckpt_path: Path | str | None = None,
    accelerator: str = "auto",
    num_nodes: int = 1,
    precision: Any = "bf16-mixed",
    strategy: Any = "auto",
    data_gen: torch.Generator | None = None,
    dry: bool = False,
    gradient_clip_val: float | None = 0.5,
    fast_dev_run: bool = False,
    args_namespace: Namespace | None = None,
) -> None:
    """Pre-train a model on a user's own batches of ``img`` and ``bbox``.

    Args:
        model: the model; it is trained in place.
        train_dataloader: batches to train on.
        val_dataloader: batches to validate on after each epoch (None: none).
        output: folder of the run, as in `pretrain_mae`; `MuViTMAE.from_folder` reads it, taking the best model, or the
            last one without validation.
        num_epochs: passes of the training batches.
        lr: peak learning rate; None: ``1e-4 * sqrt(samples per step over all devices / 128)``.
        nobox: hide the boxes from the model.
        warmup_epochs: epochs over which the learning rate rises from 1 % to its peak.
        logger: logger beside the CSV files.
        run_name: name of the run on W&B.
        wandb_project: project on W&B.
        ckpt_path: ``resume/last.ckpt`` of a run to continue; if that is damaged, the state before it is taken.
        accelerator: Lightning's name of the device type; all devices of it are used.
        num_nodes: number of machines.
        precision: as in Lightning's trainer.
        strategy: as in Lightning's trainer.
        data_gen: generator whose seed is that of the masks.
        dry: write nothing.
        gradient_clip_val: largest norm of the gradient; 0 or None does not clip it.
        fast_dev_run: run one batch of training and validation, and write nothing.
        args_namespace: further settings to log.

    Raises:
        InputError: the data set, ``output`` or ``logger`` is invalid.
        ExistsError: ``output`` is not empty, and ``ckpt_path`` is not set.
    """
    if logger not in ("tensorboard", "tb", "wandb", None):
        raise InputError("logger", expected="tensorboard, tb, wandb or None", got=repr(logger))
    if logger == "wandb":
        check_wandb()
    _check_dataset(model, train_dataloader)
    folder = None if dry or fast_dev_run else _output(output, ckpt_path)
    loggers: list[Logger] = []
    if folder is not None:
        loggers = build_loggers(
            folder,
            wandb_project if logger == "wandb" else None,
            tensorboard=logger in ("tensorboard", "tb"),
            run_name=run_name,
        )
        for one in loggers if args_namespace is not None else ():
            one.log_hyperparams(vars(args_namespace))
    optim = PretrainOptimConfig(lr=lr, warmup_epochs=warmup_epochs, gradient_clip=gradient_clip_val or None)
    seed = 0 if data_gen is None else data_gen.initial_seed()
    batch_size = train_dataloader.batch_size or 1
    task = PretrainTask(model, optim, batch_size=batch_size, seed=seed, use_boxes=not nobox)
    keep = [] if folder is None else [SaveBestAndLast(folder, None, metric="val_loss", lower_is_better=True)]
    with quiet(), stoppable():
        trainer = build_trainer(
            RunConfig(epochs=num_epochs, num_nodes=num_nodes, save_every=1),
            folder,
            keep,
            accelerator=accelerator,
            devices="auto",
            precision=precision,
            strategy=strategy,
            logger=loggers,
            use_distributed_sampler=True,
            log_every_n_steps=log_interval(train_dataloader),
            fast_dev_run=fast_dev_run,
        )
        state = None if ckpt_path is None else _state(Path(ckpt_path))
        fit_from(trainer, state, task, train_dataloaders=train_dataloader, val_dataloaders=val_dataloader)


def _state(file: Path) -> Path:
    """The state to resume from: ``last.ckpt`` of a run stands for the newest that is whole."""
    return newest_state(file.parent.parent) if (file.parent.name, file.name) == (FOLDER, LAST) else file


def _output(output: Path | str | None, ckpt_path: Path | str | None) -> Path:
    if output is None:
        raise InputError("output", expected="a folder for the model", got=None, hint="Or pass dry=True.")
    folder = Path(output)
    if is_first_process() and ckpt_path is None and folder.exists() and any(folder.iterdir()):
        raise ExistsError(folder, hint="Choose another folder, or pass its resume/last.ckpt as ckpt_path to resume.")
    return folder


def _check_dataset(model: MuViTMAE, loader: DataLoader) -> None:
    dataset, config = loader.dataset, model.config.encoder
    if not isinstance(dataset, MuViTDataset):
        return
    for name, has, wants in (
        ("n_levels", dataset.n_levels, len(config.levels)),
        ("n_channels", dataset.n_channels, config.in_channels),
        ("ndim", dataset.ndim, config.ndim),
    ):
        if has != wants:
            raise InputError(f"{type(dataset).__name__}.{name}", expected=f"{wants}, as the model has", got=has)
    if tuple(dataset.levels) != tuple(config.levels):
        logging.getLogger(__name__).warning(
            "The data set's levels are %s, the model's %s.", tuple(dataset.levels), tuple(config.levels)
        )
