"""State of an output on disk: missing, begun by some plan, complete, or something else.

A folder ``.muvit`` in an unfinished output holds ``plan.json`` and the ledgers. On completion the plan becomes an
attribute of the store, and the folder is removed.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from muvit.data.pyramids.ngff import read_json, write_json
from muvit.data.pyramids.writer import PyramidWriter
from muvit.durable import make_folder, sync_folder
from muvit.errors import InputError, ReadError
from muvit.inference.run.old_plans import upgrade_plan
from muvit.inference.run.plan import differences

WORK = ".muvit"
PLAN = "plan.json"


def read_plan(path: Path) -> dict[str, Any] | None:
    """The plan of an unfinished output as a JSON object; None where there is no such output."""
    file = path / WORK / PLAN
    try:
        return upgrade_plan(read_json(file)) if file.is_file() else None
    except ReadError:
        if file.exists():  # else the output was completed in the meantime
            raise
        return None


def read_summary(path: Path) -> dict[str, Any]:
    """Summary of the run in the attributes of a complete output; empty where there is none."""
    file = path / "zarr.json"
    summary: dict[str, Any] = read_json(file).get("attributes", {}).get("muvit", {}) if file.is_file() else {}
    return summary


def is_begun_by(path: Path, plan: Mapping[str, Any]) -> bool:
    """Whether an unfinished output of this plan (a JSON object) is there.

    Raises:
        InputError: one of another plan is there; lists the differences.
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
            hint="Give the same model, image and options to resume, or --overwrite to start over.",
        )
    return True


def is_abandoned(path: Path) -> bool:
    """Whether a run was killed while it created the stores, so that its remains may be replaced."""
    work = path / WORK
    return work.exists() and not (work / PLAN).exists() and not (path / "zarr.json").exists()


def is_empty(path: Path) -> bool:
    """Whether an empty folder is there, as left by a run that was killed in its first step."""
    return path.is_dir() and not any(path.iterdir())


def is_published(path: Path, plan: Mapping[str, Any]) -> bool:
    """Whether the complete output of this plan is there; its run may have been killed before `clear_work`."""
    made = read_summary(path).get("plan")
    return made is not None and not differences(upgrade_plan(made), plan)


def create(path: Path, plan: Mapping[str, Any], writers: Sequence[PyramidWriter]) -> None:
    """Create the stores of an output, with their plan."""
    make_folder(path / WORK)  # first: from here on the folder may be replaced
    for writer in writers:
        writer.initialize()
    write_json(path / WORK / PLAN, dict(plan))  # last: from here on the output may be resumed
    sync_folder(path / WORK)


def clear_work(path: Path) -> None:
    """Remove the folder that only an unfinished output needs; may be repeated."""
    work = path / WORK
    if work.exists():
        for file in sorted(work.iterdir(), key=lambda file: file.name == PLAN):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        work.rmdir()
