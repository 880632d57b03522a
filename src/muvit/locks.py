"""Locks of outputs: no two runs write the same one."""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from muvit.durable import make_folder, naming
from muvit.errors import InputError

_LOG = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class NoLocksError(InputError):
    """A file system has no locks."""


class OutputLock:
    """Lock of an output, held by one run, or shared by the parts of one; released at the end of its context.

    It is an advisory lock of the operating system on a hidden file beside the output. It ends with its process, even a
    killed one, so locks are never stale.

    Args:
        output: the folder that is written.
        name: of the lock, where an output has several.
    """

    def __init__(self, output: Path, name: str = "lock") -> None:
        self.output = output
        self.path = output.with_name(f".{output.name}.{name}")
        self._handle: int | None = None
        self._is_exclusive = False

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the lock, or change the one that is held; False if another process holds it.

        A change that fails releases the lock.

        Args:
            shared: together with other processes that share it.

        Raises:
            NoLocksError: the file system has no locks.
        """
        if self._handle is None:
            make_folder(self.path.parent)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._close()
            self.path.unlink(missing_ok=True)
            raise NoLocksError(
                self.output,
                expected="a file system with locks, which keep two runs from writing one output",
                got=error.strerror,
                hint="Write to another disk, or let the administrator mount this one with flock.",
            ) from error
        if not self._is_in_place():  # its last holder removed the file before it was locked here
            self._close()
            return self.acquire(shared=shared)
        self._is_exclusive = not shared
        with naming(self.path):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return True

    def require(self, *, shared: bool = False, wait_s: float = 0) -> Self:
        """Take the lock.

        Args:
            shared: together with other processes that share it.
            wait_s: how long to wait for other processes.

        Raises:
            InputError: another process holds it.
            NoLocksError: the file system has no locks.
        """
        until = time.monotonic() + wait_s
        while not self.acquire(shared=shared):
            if time.monotonic() >= until:
                raise self.refusal()
            time.sleep(0.1)
        return self

    def refusal(self) -> InputError:
        """The error that names the process that holds the lock."""
        owner = self.path.read_text() if self.path.exists() else ""
        return InputError(
            self.output,
            expected="an output that no other process is writing",
            got=f"one that {owner or 'another process'} is writing",
            hint="Wait until it is done, or choose another output.",
        )

    def release(self) -> None:
        """Release the lock."""
        if self._handle is None:
            return
        if self._is_exclusive:  # processes that share it would not notice the removal
            self.path.unlink(missing_ok=True)
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _is_in_place(self) -> bool:
        assert self._handle is not None
        try:
            return self.path.stat().st_ino == os.fstat(self._handle).st_ino
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        assert self._handle is not None
        os.close(self._handle)
        self._handle, self._is_exclusive = None, False


@contextmanager
def sole_writer(output: Path, *, wait_s: float = 10) -> Iterator[None]:
    """Keep other processes from writing an output; only warn where nothing can be locked or written beside it.

    Args:
        output: the folder that is written.
        wait_s: how long to wait for other processes, such as those that end since the one that started them was killed.

    Raises:
        InputError: another process writes it.
    """
    lock = OutputLock(output.resolve())
    try:
        lock.require(wait_s=wait_s)
    except (NoLocksError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NOT_WRITABLE:
            raise
        _LOG.warning("%s cannot be locked (%s): see to it that no other process writes there", output, error)
    with lock:
        yield
