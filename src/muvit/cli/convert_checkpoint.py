"""``muvit convert-checkpoint``."""

from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from muvit.errors import CheckpointError

if TYPE_CHECKING:
    from muvit.models.folder import FolderModel


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", type=Path, help="model folder written by muvit 0.1.0: config.yaml and model.pth")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is there already")


def run(arguments: Namespace) -> None:
    """Read the old folder and write a new one, whose config keeps the options of release 0.1.0."""
    from muvit.models.legacy import is_legacy

    if not is_legacy(arguments.source):
        raise CheckpointError(arguments.source, expected="a folder of muvit 0.1.0, with model.pth", got="none")
    model_class(arguments.source).from_folder(arguments.source).save(arguments.target, overwrite=arguments.overwrite)
    print(arguments.target)


def model_class(folder: Path) -> "type[FolderModel]":
    """Class of the model that release 0.1.0 saved in a folder: an autoencoder, an encoder or a decoder.

    Raises:
        CheckpointError: the configuration is that of none of them.
    """
    from muvit.models.encoder import MuViTEncoder2d, MuViTEncoder3d, MuViTEncoder4d
    from muvit.models.folder import load_config
    from muvit.models.mae import MuViTMAE2d, MuViTMAE3d, MuViTMAE4d
    from muvit.models.mae_decoder import MuViTDecoder2d, MuViTDecoder3d, MuViTDecoder4d

    config = load_config(folder)
    if "decoder_mode" in config:
        kinds: tuple[type[FolderModel], ...] = (MuViTMAE2d, MuViTMAE3d, MuViTMAE4d)
    elif "levels" in config:
        kinds = (MuViTEncoder2d, MuViTEncoder3d, MuViTEncoder4d)
    else:
        kinds = (MuViTDecoder2d, MuViTDecoder3d, MuViTDecoder4d)
    for kind in kinds:
        if kind.ndim == config.get("ndim"):
            return kind
    raise CheckpointError(folder, expected="ndim 2, 3 or 4 in its config.yaml", got=config.get("ndim"))
