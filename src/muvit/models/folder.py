"""Model folders: ``config.yaml`` (plain YAML) beside ``model.safetensors``. Nothing is ever unpickled."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_type_hints

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muvit.durable import whole_folder
from muvit.errors import CheckpointError, InputError, ReadError
from muvit.models.hub import download_model, hub_name
from muvit.models.upgrade import FORMAT, is_format_0, load_old_weights, parse_config, upgrade_settings
from muvit.plain_yaml import read_text, yaml_problem

CONFIG, WEIGHTS = "config.yaml", "model.safetensors"
PACKAGED = Path(__file__).with_name("packaged")
"""Folder of the models that are part of this package; the name of each stands for it in place of a path."""
_MAX_HEADER = 2**23
"""Most bytes of names and shapes of tensors; a model of a thousand tensors has about 100,000."""

Config = TypeVar("Config")


def save_folder(
    path: Path | str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    extra_files: Mapping[str, str] | None = None,
    overwrite: bool,
) -> None:
    """Write a model folder in one step: it is complete under its name, or not there at all.

    Args:
        path: the folder.
        config: what the model is built from; becomes ``config.yaml``.
        state: the weights; become ``model.safetensors``.
        extra_files: texts to keep beside them, by file name.
        overwrite: replace a folder that is there already.

    Raises:
        ExistsError: the folder exists and ``overwrite`` is false.
    """
    with whole_folder(Path(path), overwrite=overwrite) as fresh:
        (fresh / CONFIG).write_text(yaml.safe_dump(plain(config), sort_keys=False))
        for name, text in (extra_files or {}).items():
            (fresh / name).write_text(text)
        # safetensors refuses tensors that share memory, as shared rotary frequencies do
        tensors = {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}
        try:
            save_file(tensors, fresh / WEIGHTS)
        except SafetensorError as error:  # the library reports a full disk as its own error
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def model_folder(path: Path | str) -> Path:
    """The folder of the model that ``path`` stands for: itself, or the best (else the last) model of a run.

    What is no folder may be the name of a model of this package (a folder in `PACKAGED`), or of one on huggingface.co,
    which is then downloaded: see `muvit.models.hub.hub_name`.

    Raises:
        CheckpointError: there is no such model there.
    """
    folder = Path(path)
    if (folder / CONFIG).exists():
        return folder
    found = next((folder / name for name in ("best", "last") if (folder / name / CONFIG).exists()), folder)
    if found.exists():
        return found
    if folder.parts == (folder.name,) and (PACKAGED / folder / CONFIG).is_file():
        return PACKAGED / folder
    name = hub_name(path)
    return found if name is None else download_model(name)


def load_settings(path: Path | str) -> tuple[str, dict[str, Any]]:
    """Read the kind of model in a folder (as ``kind`` of its configuration class says it), and its settings.

    Folders of earlier formats are upgraded (see `muvit.models.upgrade`).

    Raises:
        CheckpointError: the folder or its configuration is missing, not plain YAML, or of an unknown format.
    """
    folder = Path(path)
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(path, expected=f"a model folder that holds {CONFIG} and {WEIGHTS}", got="none")
    try:
        values = parse_config(read_text(file), folder)
    except (ReadError, yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        problem = error.__cause__ if isinstance(error, ReadError) else error
        assert isinstance(problem, Exception)
        raise CheckpointError(file, expected="plain YAML", got=yaml_problem(problem).partition(";")[0]) from error
    if not isinstance(values, dict):
        raise CheckpointError(file, expected="a mapping of names to values", got=type(values).__name__)
    return upgrade_settings(values, folder)


def build_config(kind: type[Config], settings: Mapping[str, Any], source: object) -> Config:
    """A configuration, and the configurations in it, from the settings of a folder.

    Raises:
        CheckpointError: they are no settings of ``kind``, or do not fit it; names ``source``.
    """
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    expected = f"settings of {kind.__name__}"
    if foreign := sorted(map(str, set(settings) - known)):
        raise CheckpointError(source, expected=expected, got=f"those of another model, with {', '.join(foreign[:3])}")
    values = {
        name: build_config(hints[name], value, source) if _holds_config(hints[name], value) else value
        for name, value in settings.items()
    }
    try:
        return kind(**values)
    except (AttributeError, TypeError, InputError) as error:
        raise CheckpointError(source, expected=expected, got=str(error).rstrip(".")) from error


def load_weights(path: Path | str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read the tensors of a model folder.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors file.
    """
    if is_format_0(Path(path)):
        return load_old_weights(Path(path), device)
    file = Path(path) / WEIGHTS
    try:
        with file.open("rb") as stream:  # the length of the header, of which the library reads up to 100 million bytes
            length = int.from_bytes(stream.read(8), "little")
        if length > _MAX_HEADER:
            raise OSError(f"a header of {length} bytes, more than {_MAX_HEADER}")
        return load_file(file, device=str(device))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(file, expected="a readable safetensors file", got=str(error)) from error


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Copy tensors into a model, strictly: the same names, the same shapes.

    Raises:
        CheckpointError: names or shapes differ; the message lists the first of them.
    """
    own = model.state_dict()
    differing = [
        f"{name} {tuple(state[name].shape) if name in state else 'missing'}"
        for name in own
        if name not in state or state[name].shape != own[name].shape
    ] + [f"{name} unexpected" for name in state if name not in own]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(
            source, expected=f"weights of {type(model).__name__}", got="; ".join(differing[:3]) + more
        )
    model.load_state_dict(state)


def _holds_config(kind: Any, value: Any) -> bool:
    return is_dataclass(kind) and isinstance(value, Mapping)


class FolderModel(nn.Module):
    """A module that is built from one configuration, saves itself to a model folder and comes back from one.

    A subclass annotates ``config`` with the class of its configuration: a frozen dataclass whose class attribute or
    field ``kind`` names the model in folders and recipes.

    Args:
        config: sizes and choices; None for a model that is not to be saved.
    """

    config: Any

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config = config

    @property
    def config_to_save(self) -> Any:
        """The configuration that rebuilds the model from its folder, which holds the weights."""
        return self.config

    def save(self, path: Path | str, overwrite: bool = False, extra_files: Mapping[str, str] | None = None) -> None:
        """Write configuration and weights to the folder ``path``; arguments as in `save_folder`.

        Raises:
            ExistsError: the folder exists and ``overwrite`` is false.
            InputError: the model has no configuration with a kind.
        """
        config = self.config_to_save
        if not kinds_of(type(config)):
            expected = "a dataclass that names its kind, to build the model again from its folder"
            raise InputError(f"config of {type(self).__name__}", expected=expected, got=repr(config))
        settings = {"format": FORMAT, "kind": config.kind, **asdict(config)}
        save_folder(path, settings, self.state_dict(), extra_files=extra_files, overwrite=overwrite)

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Kinds of model in folders of this class, as its annotation of ``config`` says; none without one."""
        return kinds_of(get_type_hints(cls)["config"])

    @classmethod
    def from_folder(cls, path: Path | str, device: str | torch.device = "cpu") -> Self:
        """Load the model of a folder; the folder of a run stands for its best model.

        Raises:
            CheckpointError: the folder is missing, damaged, or holds another kind of model.
        """
        path = model_folder(path)
        kind, settings = load_settings(path)
        config_class, kinds = get_type_hints(cls)["config"], cls.kinds()
        if kind not in kinds:
            raise CheckpointError(path, expected=f"a model of kind {' or '.join(kinds)}", got=f"one of kind {kind}")
        settings |= {field.name: kind for field in fields(config_class) if field.name == "kind"}
        model = cls._build(build_config(config_class, settings, path), path)
        load_into(model, load_weights(path, device), path)
        return model.to(device)

    @classmethod
    def _build(cls, config: Any, source: object) -> Self:
        """The model of a configuration from a folder.

        Raises:
            CheckpointError: there is no such model; names ``source``.
        """
        try:
            return cls(config)
        except (TypeError, InputError) as error:
            expected = f"settings of {type(config).__name__}"
            raise CheckpointError(source, expected=expected, got=str(error).rstrip(".")) from error


def kinds_of(config: Any) -> tuple[str, ...]:
    """Kinds of model that a class of configurations describes: those that its field ``kind`` may be, or its one."""
    kind = getattr(config, "kind", None)
    if isinstance(kind, str):
        return (kind,)
    return get_args(get_type_hints(config).get("kind")) if is_dataclass(config) else ()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the class, configuration and weights of a model."""
    config = model.config_to_save if isinstance(model, FolderModel) else getattr(model, "config", None)
    settings = plain(asdict(config)) if is_dataclass(config) and not isinstance(config, type) else {}
    digest = hashlib.sha256(json.dumps([type(model).__name__, settings], sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Nested mappings and sequences as dicts and lists, which plain YAML can hold."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value
