"""A trained model and how it saw its pixels: built from settings, loaded, saved and told apart as one."""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_type_hints, overload

import torch
from torch import nn

from muvit.data.crops.preprocessing import FILE, Preprocessing
from muvit.errors import CheckpointError, InputError
from muvit.models.baselines import Baseline, BaselineConfig
from muvit.models.classifier import Classifier
from muvit.models.encoder import MuViTEncoder
from muvit.models.folder import (
    CONFIG,
    WEIGHTS,
    FolderModel,
    build_config,
    fingerprint,
    kinds_of,
    load_settings,
    model_folder,
)
from muvit.models.hierarchy import RegionEncoder
from muvit.models.mae import MuViTDecoder, MuViTMAE
from muvit.models.relay.config import RelayConfig
from muvit.models.relay.segmenter import RelaySegmenter
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.size import ModelConfig, check_size, count_parameters

NetworkConfig = SegmenterConfig | BaselineConfig | RelayConfig
"""Settings of any model that labels pixels."""

Model = TypeVar("Model", bound=FolderModel)

_KINDS: dict[str, type[FolderModel]] = {
    "muvit": Segmenter,
    "relay": RelaySegmenter,
    **dict.fromkeys(kinds_of(BaselineConfig), Baseline),
    "classifier": Classifier,
    "mae": MuViTMAE,
    "encoder": MuViTEncoder,
    "decoder": MuViTDecoder,
    "region": RegionEncoder,
}
"""Class of each kind of model, as ``config.yaml`` of its folder says it."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel(Generic[Model]):
    """A model, and what it takes to use it on images."""

    model: Model
    """The model."""
    preprocessing: Preprocessing
    """Cutting, normalisation and labels of the crops in training."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model's class, configuration and weights, and of the preprocessing."""
        content = f"{fingerprint(self.model)} {self.preprocessing.to_yaml()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, folder: Path | str, overwrite: bool = False) -> None:
        """Write both to a model folder, in one step.

        Raises:
            ExistsError: the folder exists and ``overwrite`` is false.
        """
        self.model.save(folder, overwrite=overwrite, extra_files={FILE: self.preprocessing.to_yaml()})


def as_trained(
    model: nn.Module | TrainedModel[Any], preprocessing: Preprocessing | None, kind: type[Model]
) -> TrainedModel[Model]:
    """A `TrainedModel`, given as one or in two parts.

    Args:
        model: the model, or both.
        preprocessing: its preprocessing; None takes that of a `TrainedModel`.
        kind: class that the model must be of.

    Raises:
        InputError: the model is of another class, or there is no preprocessing.
    """
    if isinstance(model, TrainedModel):
        preprocessing = preprocessing or model.preprocessing
        model = model.model
    if not isinstance(model, kind):
        hint = f"A network of your own becomes one as a subclass of muvit.{kind.__name__}."
        raise InputError("model", expected=f"a {kind.__name__}", got=f"a {type(model).__name__}", hint=hint)
    if preprocessing is None:
        hint = "Pass it, or a TrainedModel, as load_model returns, in place of the model."
        raise InputError("preprocessing", expected="that of the model's training", got="none", hint=hint)
    return TrainedModel(model=model, preprocessing=preprocessing)


def build_model(config: NetworkConfig) -> SegmentationModel:
    """The model that these settings describe, with fresh (or, if they say so, pre-trained) weights."""
    match config:
        case SegmenterConfig():
            return Segmenter(config)
        case BaselineConfig():
            return Baseline(config)
        case RelayConfig():
            return RelaySegmenter(config)


@overload
def load_model(folder: Path | str, device: str | torch.device = "cpu") -> TrainedModel[FolderModel]: ...


@overload
def load_model(folder: Path | str, device: str | torch.device = "cpu", *, kind: type[Model]) -> TrainedModel[Model]: ...


def load_model(
    folder: Path | str, device: str | torch.device = "cpu", *, kind: type[FolderModel] = FolderModel
) -> TrainedModel[Any]:
    """Load a trained model and its preprocessing.

    Args:
        folder: the model folder, or the folder of a run, which stands for its best model.
        device: where to put the model.
        kind: class that the model must be of, such as `SegmentationModel` or `Classifier`; by default any of this
            package. A class of your own is needed for its models to be loaded.

    Raises:
        CheckpointError: the folder is missing, damaged, or holds another kind of model.
    """
    folder = model_folder(folder)
    return TrainedModel(model=load_network(folder, device, kind=kind), preprocessing=Preprocessing.load(folder))


def _check_size(config: ModelConfig, folder: Path) -> None:
    """Refuse settings of a model that is larger than the weights beside them."""
    check_size(config, str(folder))
    weights, count = folder / WEIGHTS, count_parameters(config)
    if weights.is_file() and count > weights.stat().st_size:  # a parameter has at least one byte
        expected = f"weights of at least {count} parameters, as {CONFIG} describes"
        raise CheckpointError(weights, expected=expected, got=f"{weights.stat().st_size} bytes")


@overload
def load_network(folder: Path | str, device: str | torch.device = "cpu") -> FolderModel: ...


@overload
def load_network(folder: Path | str, device: str | torch.device = "cpu", *, kind: type[Model]) -> Model: ...


def load_network(
    folder: Path | str, device: str | torch.device = "cpu", *, kind: type[FolderModel] = FolderModel
) -> FolderModel:
    """Load a model alone; arguments and errors as of `load_model`."""
    folder = model_folder(folder)
    found, settings = load_settings(folder)
    known = _KINDS | dict.fromkeys(kind.kinds(), kind)
    if found not in known:
        hint = "A model of your own class is loaded with kind=TheClass."
        expected = f"a model of kind {', '.join(known)}"
        raise CheckpointError(folder, expected=expected, got=f"one of kind {found}", hint=hint)
    if not issubclass(known[found], kind):
        fitting = [name for name, other in known.items() if issubclass(other, kind)]
        raise CheckpointError(folder, expected=f"a model of kind {' or '.join(fitting)}", got=f"one of kind {found}")
    config = get_type_hints(known[found])["config"]
    if config in get_args(ModelConfig):  # before memory is allocated
        settings |= {field.name: found for field in fields(config) if field.name == "kind"}
        _check_size(build_config(config, settings, folder), folder)
    return known[found].from_folder(folder, device)


def load_encoder(folder: Path | str) -> MuViTEncoder:
    """The encoder in the folder of an encoder, masked autoencoder, segmenter or classifier.

    Args:
        folder: model folder, or the folder of the run that made it.

    Raises:
        CheckpointError: the folder holds no such model.
    """
    return encoder_of(load_network(folder), folder)


def encoder_of(model: FolderModel, source: object) -> MuViTEncoder:
    """The encoder of a model, or the model itself if it is one.

    Raises:
        CheckpointError: it has none; names ``source``, where the model comes from.
    """
    if isinstance(model, Segmenter | Classifier | MuViTMAE):
        return model.encoder
    if not isinstance(model, MuViTEncoder):
        kind = type(model).__name__
        raise CheckpointError(source, expected="a model with a multi-resolution encoder", got=f"a {kind}")
    return model
