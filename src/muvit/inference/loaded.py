"""A model of a folder or of the hub, with all that it can do to a slide."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch

from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.inference.predict import predict_slide
from muvit.inference.run.execution import Execution
from muvit.inference.run.plan import PredictOptions
from muvit.models import trained
from muvit.models.folder import FolderModel
from muvit.models.trained import Model, TrainedModel
from muvit.progress import Progress


@dataclass(frozen=True, kw_only=True)
class LoadedModel(TrainedModel[Model]):
    """A trained model that labels slides."""

    def predict(
        self,
        slide: Slide | Path | str,
        output: Path | str | None = None,
        *,
        options: PredictOptions | None = None,
        execution: Execution | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> Slide:
        """Label every pixel of a slide, as `muvit.predict_slide` does, and open the labels.

        Args:
            slide: the image, or its file.
            output: label image to create; unset, ``<name of the slide>.labels.ome.zarr`` in the working folder.
            options: as of `predict_slide`.
            execution: as of `predict_slide`.
            overwrite: replace what is at ``output``.
            progress: called after each batch.

        Returns:
            The labels.

        Raises:
            InputError, ExistsError, ReadError: as `predict_slide`; also if the model labels no pixels.
        """
        image = slide if isinstance(slide, Slide) else open_slide(slide)
        target = Path(f"{image.name}.labels.ome.zarr") if output is None else output
        path = predict_slide(
            self, image, target, options=options, execution=execution, overwrite=overwrite, progress=progress
        )
        return open_slide(path)


@overload
def load_model(folder: Path | str, device: str | torch.device = "cpu") -> LoadedModel[FolderModel]: ...


@overload
def load_model(folder: Path | str, device: str | torch.device = "cpu", *, kind: type[Model]) -> LoadedModel[Model]: ...


def load_model(
    folder: Path | str, device: str | torch.device = "cpu", *, kind: type[FolderModel] = FolderModel
) -> LoadedModel[Any]:
    """Load a trained model and its preprocessing.

    Args:
        folder: the model folder, or the folder of a run, which stands for its best model, or the name of a model on
            huggingface.co, ``org/name`` or ``hf://org/name@revision`` (needs ``muvit[hub]``).
        device: where to put the model.
        kind: class that the model must be of, such as `SegmentationModel` or `Classifier`; by default any of this
            package. A class of your own is needed for its models to be loaded.

    Raises:
        CheckpointError: the folder is missing, damaged, or holds another kind of model.
    """
    found = trained.load_model(folder, device, kind=kind)
    return LoadedModel(model=found.model, preprocessing=found.preprocessing)
