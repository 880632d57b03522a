"""Files that are whole or not there, whatever kills the process or the machine that writes them."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_whole(file: Path, content: bytes) -> None:
    """Write a file, making its folders; when this returns, it is on disk under its name."""
    with whole_file(file) as stream:
        stream.write(content)


@contextmanager
def whole_file(file: Path) -> Iterator[BinaryIO]:
    """A file to write that has its name, on disk, when the block ends; what fails leaves nothing.

    Folders are made. Bytes go to a hidden file beside it, are flushed to disk, and take the name in one step. A process
    that is killed on the way leaves what `partial_files` finds.
    """
    make_folder(file.parent)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    with naming(file):
        try:
            with partial.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync_folder(file.parent)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """See that an error of the file system names a file: who writes or flushes knows but a handle."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(file), None
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each on disk when this returns."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """See that the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(handle)
    finally:
        os.close(handle)


def partial_files(folder: Path) -> list[Path]:
    """Files below a folder whose writing was killed."""
    return sorted(folder.rglob(".*.partial"))
