"""Model folders of release 0.1.0 (``config.yaml`` and ``model.pth``), read without executing anything in them."""

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
import yaml
from torch import Tensor

from muvit.errors import CheckpointError

WEIGHTS = "model.pth"

_RENAMED = (
    (r"\.attn\.to_out\.", ".attn.out."),
    (r"\.ff\.ff\.0\.0\.", ".ff.0."),
    (r"\.ff\.ff\.2\.", ".ff.3."),
    (r"^decoder\.(proj|layers)\.", r"decoder.0.\1."),
)
_JOINED = (
    (r"(.*)\.attn\.to_([qkv])\.weight", r"\1.attn.qkv.weight", "qkv"),
    (r"(.*)\.rotary_pos_embs\.(\d)\.inv_freq", r"\1.rotary_pos_embs.freq", "0123"),
)


class _Loader(yaml.SafeLoader):
    """Plain YAML, and the tuples that release 0.1.0 wrote."""


def _tuple(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[Any, ...]:
    assert isinstance(node, yaml.SequenceNode)
    return tuple(loader.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)


def is_legacy(path: Path) -> bool:
    """Whether a model folder is one of release 0.1.0."""
    return (path / WEIGHTS).is_file()


def load_legacy_config(file: Path) -> Any:
    """Content of a ``config.yaml`` of release 0.1.0."""
    return yaml.load(file.read_text(), _Loader)


def load_legacy_weights(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Weights of a folder of release 0.1.0, under our names.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors.
    """
    file = path / WEIGHTS
    if not is_zipfile(file):
        raise CheckpointError(file, expected="weights that torch.save wrote, whole", got="another kind of file")
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(file, expected="tensors and nothing else", got=str(error).partition("\n")[0]) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(file, expected="tensors by name", got=type(state).__name__)
    return convert_weights(state)


def convert_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and join the tensors of release 0.1.0: q, k and v become one matrix, the axes' frequencies one vector."""
    converted: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for old, tensor in state.items():
        if "rotary_pos_embs" in old and "layers." not in old:
            continue  # shared frequencies stand in every layer as well
        name = old
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        for pattern, joined, order in _JOINED:
            if found := re.fullmatch(pattern, name):
                parts.setdefault(found.expand(joined), {})[order.index(found[2])] = tensor
                break
        else:
            is_level_embed = name.split(".")[-1] == "level_embed"
            converted[name] = tensor.flatten(1) if is_level_embed else tensor
    return converted | {name: torch.cat([piece[i] for i in sorted(piece)]) for name, piece in parts.items()}
