"""The errors that muvit raises for its user: each says what was expected, what came, and what to do."""

from importlib.util import find_spec
from typing import Any


class MuViTError(Exception):
    """Base of all errors that muvit raises on purpose; the command line prints its message without a traceback."""

    def __reduce__(self) -> tuple[Any, ...]:
        # constructors take more arguments than they keep, so that errors could not be unpickled by default
        return _restored, (type(self), *self.args)


class InputError(MuViTError, ValueError):
    """An argument, file, array or setting does not fit.

    Args:
        subject: the file or argument at fault, as the user knows it.
        expected: what is allowed.
        got: what was found.
        hint: how to solve it, a full sentence (optional).
    """

    def __init__(self, subject: object, *, expected: str, got: object, hint: str = "") -> None:
        # of an error inside, whose sentence has its own full stop
        message = f"{subject}: expected {expected}, got {str(got).removesuffix('.')}."
        super().__init__(f"{message} {hint}".rstrip())


class ShapeError(InputError, RuntimeError):
    """A tensor has the wrong shape (also a RuntimeError, as torch's own shape errors are)."""


class ReadError(InputError, OSError):
    """A file is missing, truncated, corrupt or of a format that cannot be read."""


class CheckpointError(InputError):
    """A checkpoint folder is incomplete, of another program, or made for another model."""


class ExistsError(MuViTError, FileExistsError):
    """An output exists already and overwriting was not asked for."""

    def __init__(self, path: object, *, hint: str = "Choose another output, or pass overwrite (--overwrite).") -> None:
        super().__init__(f"{path}: exists already and is not overwritten. {hint}")


def require_package(module: str, subject: str, *, package: str, install: str) -> None:
    """Refuse to go on without an optional package.

    Args:
        module: the name that it is imported by.
        subject: what needs it, as the user knows it.
        package: the name of the package.
        install: what pip installs to get it.

    Raises:
        InputError: it is not installed.
    """
    if find_spec(module) is None:
        hint = f"Install it with: pip install {install}"
        raise InputError(subject, expected=f"the package {package}", got="none installed", hint=hint)


def _restored(kind: type[MuViTError], *args: Any) -> MuViTError:
    error = kind("", expected="", got="") if issubclass(kind, InputError) else kind("")
    error.args = args
    return error


def first_line(error: BaseException) -> str:
    """Message of an error of another library, in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
