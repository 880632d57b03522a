"""Model folders: ``config.yaml`` (plain YAML) beside ``model.safetensors``. Nothing is ever unpickled."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muvit.durable import whole_folder
from muvit.errors import CheckpointError, InputError
from muvit.models.legacy import is_legacy, load_legacy_config, load_legacy_weights

CONFIG, WEIGHTS = "config.yaml", "model.safetensors"


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
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, fresh / WEIGHTS)


def model_folder(path: Path | str) -> Path:
    """The folder of the model that ``path`` stands for: itself, or the best (else the last) model of a run."""
    path = Path(path)
    if (path / CONFIG).exists():
        return path
    return next((path / name for name in ("best", "last") if (path / name / CONFIG).exists()), path)


def load_config(path: Path | str) -> dict[str, Any]:
    """Read the configuration of a model folder.

    Raises:
        CheckpointError: the folder or its configuration is missing or not plain YAML.
    """
    file = Path(path) / CONFIG
    if not file.is_file():
        raise CheckpointError(path, expected=f"a model folder that holds {CONFIG} and {WEIGHTS}", got="none")
    try:
        config = load_legacy_config(file) if is_legacy(file.parent) else yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(file, expected="plain YAML", got=str(error).splitlines()[0]) from error
    if not isinstance(config, dict):
        raise CheckpointError(file, expected="a mapping of names to values", got=type(config).__name__)
    return config


def load_weights(path: Path | str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read the tensors of a model folder.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors file.
    """
    if is_legacy(Path(path)):
        return load_legacy_weights(Path(path), device)
    file = Path(path) / WEIGHTS
    try:
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


class FolderModel(nn.Module):
    """A module that saves itself to a model folder and comes back from one.

    A subclass declares ``config`` as a frozen dataclass, sets it, and builds itself from the fields of that dataclass,
    given as keywords.
    """

    ndim: ClassVar[int | None] = None
    legacy_settings: ClassVar[dict[str, Any]] = {}
    """What release 0.1.0 did otherwise; its checkpoints get these settings when they are loaded."""
    config: Any

    @property
    def _config(self) -> dict[str, Any]:
        return asdict(self.config)

    def save(self, path: Path | str, overwrite: bool = False, extra_files: Mapping[str, str] | None = None) -> None:
        """Write configuration and weights to the folder ``path``; arguments as in `save_folder`.

        Raises:
            ExistsError: the folder exists and ``overwrite`` is false.
        """
        save_folder(path, self._config, self.state_dict(), extra_files=extra_files, overwrite=overwrite)

    @classmethod
    def from_folder(cls, path: Path | str, device: str | torch.device = "cpu") -> Self:
        """Build the model that `save` wrote, or release 0.1.0; the folder of a run stands for its best model.

        Raises:
            CheckpointError: the folder is missing, damaged, or holds another kind or dimensionality of model.
        """
        path = model_folder(path)
        config = load_config(path)
        if cls.ndim is not None and config.pop("ndim", cls.ndim) != cls.ndim:
            raise CheckpointError(
                path, expected=f"a {cls.ndim}D model for {cls.__name__}", got="another dimensionality"
            )
        if "use_rotary_embed" in config:  # name of release 0.1.0's early checkpoints
            config["rotary_mode"] = "per_layer" if config.pop("use_rotary_embed") else "none"
        if is_legacy(Path(path)):
            config |= cls.legacy_settings
        foreign = sorted(set(config) - {field.name for field in fields(get_type_hints(cls)["config"])})
        if foreign:
            got = f"those of another model, with {', '.join(foreign[:3])}"
            raise CheckpointError(path, expected=f"settings of {cls.__name__}", got=got)
        try:
            model = cls(**config)
        except (TypeError, InputError) as error:
            raise CheckpointError(path, expected=f"settings of {cls.__name__}", got=str(error).rstrip(".")) from error
        load_into(model, load_weights(path, device), path)
        return model.to(device)


def plain(value: Any) -> Any:
    """Nested mappings and sequences as dicts and lists, which plain YAML can hold."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value
