"""Files and folders that are whole or absent, even if the process or the machine that writes them is killed.

Both are built under a hidden name beside their target, flushed to disk, and renamed. The hidden name says which process
writes it, so that the next write of the same target can remove what a killed process left, but nothing of a live one.
"""

import ctypes
import errno
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from muvit.errors import ExistsError

_PARTIAL, _REPLACED = ".partial", ".replaced"
_MANY = 200
"""From so many files on, one flush of the whole file system is faster than one of each."""
_flush_each = True


def write_whole(file: Path, content: bytes) -> None:
    """Write a file, making its folders; when this returns, it is on disk under its name."""
    with whole_file(file) as stream:
        stream.write(content)


@contextmanager
def whole_file(file: Path) -> Iterator[BinaryIO]:
    """A file to write that is on disk under its name when the block ends; an error leaves what was there before."""
    make_folder(file.parent)
    with naming(file):
        _remove_leftovers(file)
        partial = _hidden(file)
        try:
            with partial.open("wb") as stream:
                yield stream
                stream.flush()
                if _flush_each:
                    os.fsync(stream.fileno())
            partial.replace(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync_folder(file.parent)


@contextmanager
def whole_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that is on disk under its name when the block ends; an error leaves what was there before.

    Args:
        folder: the target.
        overwrite: replace what is there.

    Yields:
        An empty folder of the same name, elsewhere.

    Raises:
        ExistsError: something is there, and ``overwrite`` is false.
    """
    if _is_there(folder) and not overwrite:
        raise ExistsError(folder)
    with scratch_folder(folder) as scratch:
        fresh = scratch / folder.name
        fresh.mkdir()
        yield fresh
        swap_in(fresh, folder, overwrite=overwrite)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target``, on the same file system, that is removed when the block ends.

    Folders above the target are made, and what killed processes left beside it is removed.
    """
    make_folder(target.parent)
    _remove_leftovers(target)
    scratch = _hidden(target)
    with naming(target):
        scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def swap_in(fresh: Path, folder: Path, *, overwrite: bool = False) -> None:
    """Flush a finished folder to disk and put it in the place of ``folder``, which it replaces if ``overwrite`` is set.

    On Linux the two are exchanged in one step. Where the file system cannot do that, the old one is moved aside first;
    if the process is killed just then, the next `scratch_folder` of that target puts it back.

    Raises:
        ExistsError: something is there, and ``overwrite`` is false.
    """
    with naming(folder):
        _sync_tree(fresh)
        replaced = fresh.with_name(folder.name + _REPLACED)
        is_there = overwrite and _is_there(folder)
        if not (is_there and _exchange(fresh, folder)):
            if is_there:
                folder.rename(replaced)
            try:
                fresh.rename(folder)
            except OSError as error:
                if replaced.exists():
                    replaced.rename(folder)
                elif _is_there(folder):
                    raise ExistsError(folder) from error
                raise
        sync_folder(folder.parent)


@contextmanager
def without_flushing() -> Iterator[None]:
    """Flush nothing in this process while the block runs: for a scratch folder, which `swap_in` flushes as a whole."""
    global _flush_each
    before, _flush_each = _flush_each, False
    try:
        yield
    finally:
        _flush_each = before


def replace_and_keep(fresh: Path, file: Path, previous: Path) -> None:
    """Put a file in the place of another, which is kept as ``previous``; at any moment two of the three are there."""
    with naming(file):
        if file.exists():
            file.replace(previous)
        fresh.replace(file)
    sync_folder(file.parent)


def remove_whole(folder: Path) -> None:
    """Remove a folder, if it is there, so that half of it never lies in its place."""
    if _is_there(folder):
        with scratch_folder(folder) as scratch:
            folder.rename(scratch / folder.name)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Let errors of the file system name this file: they come from handles and hidden names."""
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
    """Flush the names in a folder to disk."""
    if _flush_each:
        with naming(folder):
            _sync(folder)


def partial_files(folder: Path) -> list[Path]:
    """Files below a folder whose writing was interrupted, or is going on."""
    return sorted(folder.rglob(f".*{_PARTIAL}"))


def _is_there(path: Path) -> bool:
    """Whether a name is taken, be it by a link to nowhere; links are replaced, and what they point to stays."""
    return path.exists() or path.is_symlink()


def _hidden(target: Path) -> Path:
    """A name beside the target that says which process writes it."""
    return target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.{socket.gethostname()}{_PARTIAL}")


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes of this machine left of the target, after putting back a folder moved aside."""
    prefix = f".{target.name}."
    for left in list(target.parent.iterdir()):
        if not (left.name.startswith(prefix) and left.name.endswith(_PARTIAL)):
            continue
        pid, *_, host = (*left.name[len(prefix) : -len(_PARTIAL)].split(".", 2), "")[:3]
        if host != socket.gethostname() or not pid.isdigit() or _is_running(int(pid)):
            continue
        replaced = left / (target.name + _REPLACED)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user
        return True
    return True


def _sync_tree(folder: Path) -> None:
    tree = list(os.walk(folder, topdown=False))
    if sum(len(files) for *_, files in tree) >= _MANY and _sync_file_system(folder):
        return
    for parent, _, files in tree:
        for path in (*(Path(parent, name) for name in files), Path(parent)):
            _sync(path)


def _sync_file_system(folder: Path) -> bool:
    """Flush all of the file system that holds a folder; False where the system cannot."""
    if sys.platform != "linux":
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        return ctypes.CDLL(None).syncfs(handle) == 0
    except AttributeError:  # another C library
        return False
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # network file systems that keep names safe by themselves, such as CIFS, refuse to flush folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or its file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # an old C library
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
