"""Model folders of earlier formats, read as if they were of today's.

- Format 2, the current one: ``model.safetensors``; ``config.yaml`` states ``format``, the ``kind`` of model, and its
  settings.
- Format 1: without format and kind; the settings of a masked autoencoder repeat those of its encoder.
- Format 0, that of release 0.1.0: ``model.pth``, tensors of other names, and Python tuples in the YAML. Its models
  compute some things differently, and get the settings that do so.
"""

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

FORMAT = 2
"""The format that is written."""

OLD_WEIGHTS = "model.pth"
"""The file of the weights in format 0."""

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
_ENCODER_OF_MAE = (
    "in_channels",
    "levels",
    "patch_size",
    "num_layers",
    "dim",
    "heads",
    "attention_mode",
    "use_level_embed",
    "level_embed_std",
    "rotary_mode",
    "rotary_base",
    "patch_spacing",
    "dropout",
    "ndim",
)
_DEFAULTS_OF_MAE: dict[str, Any] = {"in_channels": 1, "levels": (1, 4)}
_BEHAVIOUR_OF_0: dict[str, dict[str, Any]] = {
    "encoder": {"patch_spacing": "corner"},
    "mae": {
        "patch_spacing": "corner",
        "decoder_context": "all",
        "loss_average": "token",
        "share_masking_draw": True,
    },
}


class _Loader(yaml.SafeLoader):
    """Plain YAML, and the tuples of format 0."""


def _tuple(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[Any, ...]:
    assert isinstance(node, yaml.SequenceNode)
    return tuple(loader.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)


def is_format_0(folder: Path) -> bool:
    """Whether release 0.1.0 wrote a model folder."""
    return (folder / OLD_WEIGHTS).is_file()


def parse_config(text: str, folder: Path) -> Any:
    """Content of the ``config.yaml`` of a folder, of any format."""
    return yaml.load(text, _Loader if is_format_0(folder) else yaml.SafeLoader)


def upgrade_settings(values: Mapping[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    """Kind and settings of a model, from the content of its ``config.yaml`` in any format.

    Raises:
        CheckpointError: the format is not known.
    """
    settings = dict(values)
    version = settings.pop("format", 0 if is_format_0(folder) else 1)
    if version not in range(FORMAT + 1):
        raise CheckpointError(
            folder,
            expected=f"a model folder of a format up to {FORMAT}",
            got=f"format {version!r}",
            hint="A later version of muvit may have written it.",
        )
    if "use_rotary_embed" in settings:  # as checkpoints before release 0.1.0 call it
        settings["rotary_mode"] = "per_layer" if settings.pop("use_rotary_embed") else "none"
    kind = str(settings.pop("kind", "none")) if version == FORMAT else _guess_kind(settings)
    if version == 0:
        settings |= _BEHAVIOUR_OF_0.get(kind, {})
    if version < FORMAT:
        settings = _settings_of_1(kind, settings)
    if kind == "baseline":
        settings = name_network(settings)
        kind = settings.pop("kind")
    return kind, settings


def nest_encoder(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a masked autoencoder, of which those of its encoder may stand among its own, as in format 1."""
    if not any(name in settings for name in _ENCODER_OF_MAE):
        return dict(settings)
    given = {**_DEFAULTS_OF_MAE, **settings}
    encoder = {name: given[name] for name in _ENCODER_OF_MAE if name in given}
    others = {name: value for name, value in settings.items() if name not in _ENCODER_OF_MAE}
    return {"encoder": encoder, **others}


def name_network(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a baseline, whose ``kind`` was ``network``; ``views`` said that several levels are stacked."""
    kept = {name: value for name, value in settings.items() if name not in ("network", "views") and value is not None}
    return {"kind": settings.get("network")} | kept


def drop_input_space(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an encoder, or of a model with one, without the one space that its patches ever had."""
    kept = {name: value for name, value in settings.items() if name != "input_space"}
    if isinstance(kept.get("encoder"), Mapping):
        kept["encoder"] = drop_input_space(kept["encoder"])
    return kept


def _guess_kind(settings: Mapping[str, Any]) -> str:
    telling = {
        "network": "baseline",
        "relay_tokens": "relay",
        "pooling": "classifier",
        "encoder": "muvit",
        "decoder_mode": "mae",
        "levels": "encoder",
    }
    return next((kind for name, kind in telling.items() if name in settings), "decoder")


def _settings_of_1(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that changed nothing, and in today's places."""
    settings = drop_input_space(settings)
    if kind == "mae":
        return nest_encoder(settings)
    if kind == "decoder":
        settings.pop("attention_mode", None)
    if "decoder_widths" in settings and settings["decoder_widths"] is None:
        settings["decoder_widths"] = "paper"
    return settings


def load_old_weights(folder: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Weights of a folder of format 0, under today's names.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors.
    """
    file = folder / OLD_WEIGHTS
    if not is_zipfile(file):
        raise CheckpointError(file, expected="weights that torch.save wrote, whole", got="another kind of file")
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except UnpicklingError as error:  # torch's own message advises to load it all the same
        got = "other objects, or damaged bytes; neither is loaded"
        raise CheckpointError(file, expected="tensors and nothing else", got=got) from error
    except Exception as error:  # whatever bytes from elsewhere make torch raise
        raise CheckpointError(file, expected="tensors and nothing else", got="a damaged file") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(file, expected="tensors by name", got=type(state).__name__)
    return convert_weights(state)


def convert_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and join the tensors of format 0: q, k and v become one matrix, the axes' frequencies one vector."""
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
