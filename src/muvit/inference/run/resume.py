"""Marks of an output on disk: the plan and the ledgers of an unfinished one, the summary of a complete one."""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from muvit.data.pyramids.ngff import read_json, write_json
from muvit.data.pyramids.writer import PyramidWriter
from muvit.durable import make_folder, naming, sync_folder
from muvit.errors import InputError, ReadError, first_line
from muvit.inference.run.plan import differences, upgrade_plan

_LOG = logging.getLogger(__name__)


class Ledger:
    """An append-only file with one line for each finished piece of work; a context manager that closes it.

    The bytes of a piece are on disk before its line is, so every listed piece is done. Every line carries a checksum of
    itself and of the plan. The last line of a killed run may be incomplete: it is removed, and its piece counts as not
    done, as does that of a damaged line and of one that belongs to another plan.

    Args:
        file: created if missing, together with its folder.
        plan: `muvit.inference.run.plan.hash_plan` of the plan.
    """

    def __init__(self, file: Path, plan: str) -> None:
        self.path = file
        self.plan = plan
        make_folder(file.parent)
        self.entries, whole = _read(file, plan)
        is_new = not file.exists()
        self._handle: int | None = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._handle, whole)
        if is_new:
            sync_folder(file.parent)

    def record(self, key: str, value: Any) -> None:
        """Record that a piece is done; when this returns, the line is on disk.

        Args:
            key: name of the piece.
            value: plain data about it.
        """
        assert self._handle is not None, "the ledger is closed"
        text = json.dumps([key, value], separators=(",", ":"))
        line = _checksum(text.encode(), self.plan) + f" {text}\n".encode()
        with naming(self.path):
            while line:  # a nearly full disk accepts only part of the line
                line = line[os.write(self._handle, line) :]
            os.fsync(self._handle)
        self.entries[key] = value

    def close(self) -> None:
        """Close the file; may be repeated."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_ledgers(folder: Path, plan: str) -> dict[str, Any]:
    """Entries of all ledgers (``*.ledger``) of a folder that belong to a plan."""
    entries: dict[str, Any] = {}
    for file in sorted(folder.glob("*.ledger")):
        entries |= _read(file, plan)[0]
    return entries


def _read(file: Path, plan: str) -> tuple[dict[str, Any], int]:
    """Entries of a ledger, and the number of bytes up to the end of its last complete line."""
    entries: dict[str, Any] = {}
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        content = b""
    whole = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        checksum, _, text = line.partition(b" ")
        try:
            if checksum != _checksum(text, plan):
                raise ValueError("the checksum does not fit")
            key, value = json.loads(text)
            entries[str(key)] = value
        except (ValueError, TypeError, RecursionError):
            _LOG.warning("%s: line %d is damaged or of another plan; its piece is computed again", file, number)
    return entries, whole


def _checksum(text: bytes, plan: str) -> bytes:
    return f"{zlib.crc32(text, zlib.crc32(plan.encode())):08x}".encode()


WORK = ".muvit"
PLAN = "plan.json"


def read_plan(path: Path) -> dict[str, Any] | None:
    """The plan of an unfinished output as a JSON object; None where there is no such output.

    Raises:
        ReadError: it is damaged.
    """
    file = path / WORK / PLAN
    try:
        with as_plan(file):
            return upgrade_plan(read_json(file)) if file.is_file() else None
    except ReadError:
        if file.exists():  # else the output was completed in the meantime
            raise
        return None


def read_summary(path: Path) -> dict[str, Any]:
    """Summary of the run in the attributes of a complete output; empty where there is none.

    Raises:
        ReadError: it is damaged.
    """
    file = path / "zarr.json"
    attributes = read_json(file).get("attributes") if file.is_file() else None
    summary = attributes.get("muvit") if isinstance(attributes, dict) else None
    if not isinstance(summary, dict) or "plan" not in summary:
        return {}
    with as_plan(file):
        return summary | {"plan": upgrade_plan(summary["plan"])}


@contextmanager
def as_plan(file: Path) -> Iterator[None]:
    """Let errors of a plan that is not as it was written name its file.

    Raises:
        ReadError: it is not.
    """
    try:
        yield
    except ReadError:
        raise
    except (InputError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ReadError(
            file,
            expected="the plan of an output, as it was written",
            got=first_line(error),
            hint="It was changed since: begin the output anew (--overwrite).",
        ) from error


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
    return made is not None and not differences(made, plan)


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
