"""One training run of a classifier of slides and their crops, end to end."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import lightning
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping

from muvit.models.classifier import Classifier
from muvit.training.callbacks import KeepModels
from muvit.training.classify_data import ClassificationData
from muvit.training.classify_recipe import ClassifyRecipe
from muvit.training.classify_task import ClassificationTask, ExampleClasses
from muvit.training.pretrained import start_from
from muvit.training.runs import fit, prepare_folder


def train_classifier(
    recipe: ClassifyRecipe,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: list[Callback] | None = None,
) -> Path:
    """Train a classifier.

    Args:
        recipe: all settings.
        output: folder of the run. It receives the model folders ``best`` and ``last``, ``logs`` (CSV) and
            ``tensorboard``, ``pictures`` of validation crops, ``resume`` and the recipe.
        resume: go on with the run in ``output`` where it stopped.
        overwrite: delete a run that is there already.
        callbacks: further Lightning callbacks.

    Returns:
        The folder of the best model, or of the last one if the run is not validated.

    Raises:
        ExistsError: ``output`` exists, and neither ``resume`` nor ``overwrite`` is set.
        InputError, ReadError: slides, classes, settings or the pre-trained encoder do not fit; nothing has been written
            then.
    """
    output, run = Path(output), recipe.run
    lightning.seed_everything(run.seed, verbose=False)
    data = ClassificationData(recipe)
    preprocessing, val_crops = data.preprocessing, data.val_crops
    config = replace(recipe.model, num_classes=len(data.class_names))
    model = Classifier(config)
    if recipe.init is not None:
        start_from(model, recipe.init)
    is_frozen = recipe.init is not None and recipe.init.mode == "frozen"
    task = ClassificationTask(model, recipe.optim, freeze_encoder=is_frozen, seed=run.seed)
    checkpoint = prepare_folder(recipe, output, resume, overwrite)
    metric: Literal["val_loss", "val_accuracy"] = "val_accuracy" if run.monitor == "val_accuracy" else "val_loss"
    keep: list[Callback] = [
        KeepModels(output, preprocessing, metric=metric, lower_is_better=metric == "val_loss"),
        *(callbacks or []),
    ]
    if run.early_stop is not None:
        keep.append(EarlyStopping(metric, mode="min" if metric == "val_loss" else "max", patience=run.early_stop))
    if val_crops is not None and run.pictures:
        keep.append(ExampleClasses(output / "pictures", val_crops, run.pictures, data.class_names))
    return fit(task, data, recipe, output, callbacks=keep, checkpoint=checkpoint)
