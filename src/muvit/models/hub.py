"""Models of huggingface.co: found by name wherever a model folder is asked for, and uploaded."""

import re
from pathlib import Path
from typing import NamedTuple

from muvit.errors import CheckpointError, InputError, first_line, require_package

CARD = "README.md"
FILES = ("config.yaml", "model.safetensors", "preprocessing.yaml", CARD)
"""Files of a model that are uploaded and downloaded, of those that it has; nothing that could be executed."""

_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"(?P<marked>hf:/{{1,2}})?(?P<name>{_PART}/{_PART})(?:@(?P<revision>[\w./-]+))?")


class HubName(NamedTuple):
    """Name of a model on the hub."""

    name: str
    """``organisation/model``."""
    revision: str | None
    """Branch, tag or commit; None for the newest."""


def hub_name(path: Path | str) -> HubName | None:
    """The model on the hub that a path stands for, ``org/name[@revision]`` or ``hf://org/name[@revision]``.

    None for any other path; without ``hf://`` also if there is a folder ``org``, so that a misspelt name in it is not
    looked for elsewhere.
    """
    text = path if isinstance(path, str) else path.as_posix()
    found = _NAME.fullmatch(text)
    if found is None or (not found["marked"] and Path(found["name"]).parent.exists()):
        return None
    return HubName(found["name"], found["revision"])


def download_model(model: HubName) -> Path:
    """The folder of a model of the hub, downloaded unless the newest files are in the cache already.

    Without a network the files in the cache count. A private model needs ``hf auth login``, or the token in
    ``HF_TOKEN``.

    Raises:
        InputError: the package huggingface_hub is missing.
        CheckpointError: there is no such model, or it cannot be reached.
    """
    _require_hub(f"model {model.name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            model.name,
            expected="a model folder, or the name of a model on huggingface.co",
            got=f"no such folder, and from there: {first_line(error).rstrip('.')}",
            hint="A private model needs `hf auth login`.",
        ) from error


def push_model(folder: Path, name: str, *, private: bool = False, message: str | None = None) -> str:
    """Upload a model folder, as one commit; returns its address.

    Args:
        folder: the model folder.
        name: ``organisation/model``; made if it does not exist.
        private: whether a model that is made can be seen by others.
        message: of the commit.

    Raises:
        InputError: the name does not fit, or the package huggingface_hub is missing.
        CheckpointError: the folder is not complete, or the hub refuses it.
    """
    if not re.fullmatch(f"{_PART}/{_PART}", name):
        raise InputError("name", expected="organisation/model", got=repr(name))
    missing = [file for file in (*FILES[:2], CARD) if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(folder, expected=f"a model folder with {', '.join(FILES)}", got=f"no {missing[0]}")
    _require_hub("muvit push")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="muvit")
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message=message or "Model of muvit",
        )
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            name,
            expected="a name that you may write to on huggingface.co",
            got=first_line(error).rstrip("."),
            hint="Log in with `hf auth login`, or set HF_TOKEN.",
        ) from error
    return str(address)


def _require_hub(subject: str) -> None:
    require_package("huggingface_hub", subject, package="huggingface_hub", install="muvit[hub]")
