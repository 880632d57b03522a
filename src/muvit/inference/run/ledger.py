"""Record of a long run on disk: one line for each finished piece."""

import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any, Self

from muvit.durable import make_folder, naming, sync_folder

_LOG = logging.getLogger(__name__)


class Ledger:
    """An append-only file with one line for each finished piece of work; a context manager that closes it.

    The bytes of a piece are on disk before its line is, so every listed piece is done. Every line carries its own
    checksum. The last line of a killed run may be incomplete: it is removed, and its piece counts as not done.

    Args:
        file: created if missing, together with its folder.
    """

    def __init__(self, file: Path) -> None:
        self.path = file
        make_folder(file.parent)
        self.entries, whole = _read(file)
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
        line = f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
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


def read_ledgers(folder: Path) -> dict[str, Any]:
    """Entries of all ledgers (``*.ledger``) of a folder."""
    entries: dict[str, Any] = {}
    for file in sorted(folder.glob("*.ledger")):
        entries |= _read(file)[0]
    return entries


def _read(file: Path) -> tuple[dict[str, Any], int]:
    """Entries of a ledger, and the number of bytes up to the end of its last complete line."""
    entries: dict[str, Any] = {}
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        content = b""
    whole = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        checksum, _, text = line.partition(b" ")
        if checksum != f"{zlib.crc32(text):08x}".encode():
            _LOG.warning("%s: line %d is damaged; its piece is computed again", file, number)
            continue
        key, value = json.loads(text)
        entries[key] = value
    return entries, whole
