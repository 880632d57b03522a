"""What lies where an output is to be: nothing, one that was begun by some plan, a complete one, or something else.

While an output is made, a folder ``.muvit`` in it holds ``plan.json`` and the ledgers. When all is done, the plan
becomes an attribute of the store, and the folder goes.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from muvit.data.pyramids.ngff import read_json, write_json
from muvit.data.pyramids.writer import PyramidWriter
from muvit.durable import make_folder, sync_folder
from muvit.errors import InputError, ReadError
from muvit.inference.run.plan import differences, upgrade_plan

WORK = ".muvit"
PLAN = "plan.json"


def read_plan(path: Path) -> dict[str, Any] | None:
    """The plan, as a JSON object, of an unfinished output; None where none is."""
    file = path / WORK / PLAN
    try:
        return upgrade_plan(read_json(file)) if file.is_file() else None
    except ReadError:
        if file.exists():  # else it was completed this very moment
            raise
        return None


def read_summary(path: Path) -> dict[str, Any]:
    """What a run left in the attributes of an output that it completed; empty where none did."""
    file = path / "zarr.json"
    summary: dict[str, Any] = read_json(file).get("attributes", {}).get("muvit", {}) if file.is_file() else {}
    return summary


def is_begun_by(path: Path, plan: Mapping[str, Any]) -> bool:
    """Whether an unfinished output of this plan, as a JSON object, is there.

    Raises:
        InputError: one of another plan is there; tells the differences.
    """
    begun = read_plan(path)
    if begun is None:
        return False
    found = differences(begun, plan)
    if found:
        raise InputError(
            path,
            expected="the plan that the unfinished output was begun with",
            got=f"another: {'; '.join(found)}",
            hint="Give the same model, image and options to go on, or --overwrite to begin anew.",
        )
    return True


def is_scrap(path: Path) -> bool:
    """Whether a run was killed while it created the stores, so that all that is there is to be replaced."""
    work = path / WORK
    return work.exists() and not (work / PLAN).exists() and not (path / "zarr.json").exists()


def is_empty(path: Path) -> bool:
    """Whether a folder is there with nothing in it, as a run leaves it that was killed over its very first step."""
    return path.is_dir() and not any(path.iterdir())


def is_made_by(path: Path, plan: Mapping[str, Any]) -> bool:
    """Whether the complete output of just this plan, as a JSON object, is there, and nothing is left to do."""
    return is_published(path, plan) and not (path / WORK).exists()


def is_published(path: Path, plan: Mapping[str, Any]) -> bool:
    """Whether the complete output of just this plan is there; its run may have been killed before `clear_work`."""
    made = read_summary(path).get("plan")
    return made is not None and not differences(upgrade_plan(made), plan)


def create(path: Path, plan: Mapping[str, Any], writers: Sequence[PyramidWriter]) -> None:
    """Create the stores of an output, with the plan that they follow."""
    make_folder(path / WORK)  # first: what is found from here on is ours to replace
    for writer in writers:
        writer.initialize()
    write_json(path / WORK / PLAN, dict(plan))  # last: from here on it is ours to go on with
    sync_folder(path / WORK)


def clear_work(path: Path) -> None:
    """Take away what only an unfinished output needs; may be repeated."""
    work = path / WORK
    if work.exists():
        for file in sorted(work.iterdir(), key=lambda file: file.name == PLAN):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        work.rmdir()
