"""One training run: checks first, then training, with everything it leaves in one folder."""

from dataclasses import asdict
from pathlib import Path

import lightning
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping

from muvit.losses import SegmentationLoss
from muvit.models.segmenter import Segmenter
from muvit.models.trained import build_model
from muvit.training.callbacks import ExamplePictures, KeepModels
from muvit.training.datamodules import SegmentationData
from muvit.training.pretrained import start_from
from muvit.training.recipes import Recipe
from muvit.training.runs import fit, prepare_folder
from muvit.training.segment import SegmentationTask


def train_segmenter(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: list[Callback] | None = None,
) -> Path:
    """Train a model that labels pixels.

    Args:
        recipe: all settings.
        output: folder of the run. It receives the model folders ``best`` (by ``run.monitor``) and ``last``,
            ``logs`` (CSV) and ``tensorboard``, ``pictures`` of validation crops, ``resume`` and the recipe.
        resume: go on with the run in ``output`` where it stopped.
        overwrite: delete a run that is there already.
        callbacks: further Lightning callbacks.

    Returns:
        The folder of the best model, or of the last one if the run is not validated.

    Raises:
        ExistsError: ``output`` exists, and neither ``resume`` nor ``overwrite`` is set.
        InputError, ReadError: slides, labels, settings or the pre-trained encoder do not fit; nothing has been written
            then.
    """
    output = Path(output)
    lightning.seed_everything(recipe.run.seed, verbose=False)
    model = build_model(recipe.network)
    data = SegmentationData(recipe, model.views)
    preprocessing, val_crops = data.preprocessing, data.val_crops
    if recipe.init is not None:
        assert isinstance(model, Segmenter)  # the recipe has seen to it
        start_from(model, recipe.init)
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
    checkpoint = prepare_folder(recipe, output, resume, overwrite)
    keep = [KeepModels(output, preprocessing, metric=recipe.run.monitor), *(callbacks or [])]
    if recipe.run.early_stop is not None:
        keep.append(EarlyStopping(recipe.run.monitor, mode="max", patience=recipe.run.early_stop))
    if val_crops is not None and recipe.run.pictures:
        keep.append(ExamplePictures(output / "pictures", val_crops, recipe.run.pictures, preprocessing))
    return fit(task, data, recipe, output, callbacks=keep, checkpoint=checkpoint)
