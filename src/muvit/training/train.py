"""One training run: checks first, then training, with everything it leaves in one folder."""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import lightning
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from muvit.checkpoints import plain
from muvit.errors import ExistsError, InputError
from muvit.losses import SegmentationLoss
from muvit.segmentation import Segmenter
from muvit.training.callbacks import ExamplePictures, KeepModels
from muvit.training.datamodule import SegmentationData
from muvit.training.recipe import Recipe
from muvit.training.segment import SegmentationTask, precision_for

RECIPE = "recipe.yaml"


def train_segmenter(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: list[Callback] | None = None,
) -> Path:
    """Train a segmenter.

    Args:
        recipe: all settings.
        output: folder of the run. It receives the model folders ``best`` (highest validation mDSC) and ``last``,
            ``logs`` (CSV) and ``tensorboard``, ``pictures`` of validation crops, ``resume`` and the recipe.
        resume: go on with the run in ``output`` where it stopped.
        overwrite: delete a run that is there already.
        callbacks: further Lightning callbacks.

    Returns:
        The folder of the best model, or of the last one if the run is not validated.

    Raises:
        ExistsError: ``output`` exists, and neither ``resume`` nor ``overwrite`` is set.
        InputError, ReadError: slides, labels or settings do not fit; nothing has been written then.
    """
    output = Path(output)
    lightning.seed_everything(recipe.run.seed, verbose=False)
    data = SegmentationData(recipe)
    preprocessing, val_crops = data.preprocessing, data.val_crops
    task = SegmentationTask(
        Segmenter(**{name: getattr(recipe.model, name) for name in recipe.model.__dataclass_fields__}),
        SegmentationLoss(**asdict(recipe.loss)),
        recipe.optim,
        preprocessing.class_names,
    )
    checkpoint = _prepare(recipe, output, resume, overwrite)
    keep = [KeepModels(output, preprocessing), *(callbacks or [])]
    if val_crops is not None and recipe.run.pictures:
        keep.append(ExamplePictures(output / "pictures", val_crops, recipe.run.pictures, preprocessing))
    with _quiet():
        _trainer(recipe, output, keep).fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return output / ("best" if (output / "best").exists() else "last")


def _prepare(recipe: Recipe, output: Path, resume: bool, overwrite: bool) -> Path | None:
    """Make the folder of the run; the checkpoint to resume from, if there is one."""
    settings = plain(asdict(recipe))
    if resume:
        checkpoint = output / "resume" / "last.ckpt"
        if not checkpoint.is_file():
            raise InputError(output, expected="a run that was stopped, to resume it", got=f"no {checkpoint}")
        before = yaml.safe_load((output / RECIPE).read_text())
        changed = sorted(key for key in settings if key != "run" and before.get(key) != settings[key])
        if changed:
            raise InputError(
                output / RECIPE,
                expected="the settings that the run was started with",
                got=f"others in {', '.join(changed)}",
            )
        return checkpoint
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise ExistsError(output, hint="Pass --resume to go on with the run, or --overwrite to delete it.")
        if not (output / RECIPE).is_file():
            raise InputError(output, expected=f"a run to overwrite, with {RECIPE}", got="a folder of something else")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / RECIPE).write_text(yaml.safe_dump(settings, sort_keys=False))
    return None


def _trainer(recipe: Recipe, output: Path, callbacks: list[Callback]) -> Trainer:
    run = recipe.run
    keep: list[Callback] = [
        *callbacks,
        ModelCheckpoint(output / "resume", filename="last", save_top_k=1, enable_version_counter=False),
        LearningRateMonitor("step"),
    ]
    if run.progress:
        keep.append(TQDMProgressBar(refresh_rate=5))
    return Trainer(
        accelerator=run.accelerator,
        devices=run.devices,
        precision=precision_for(run.accelerator),  # type: ignore[arg-type]
        max_epochs=run.epochs,
        check_val_every_n_epoch=run.val_every,
        gradient_clip_val=recipe.optim.gradient_clip,
        callbacks=keep,
        logger=[CSVLogger(output, name="logs"), TensorBoardLogger(output, name="tensorboard")],
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # EpochSampler shares the samples out itself
        enable_progress_bar=run.progress,
        enable_model_summary=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Lightning says of its own making and no user can act on."""
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        log.setLevel(before)
