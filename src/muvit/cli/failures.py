"""Failures of the machine, not of the command: the file system, memory, a process that the system killed."""

import sys
from concurrent.futures.process import BrokenProcessPool

_KILLED = "a process of this run was killed from outside, by the system most likely, when memory was full"
_LESS = "Make batches or crops smaller"


def failure(error: Exception) -> str | None:
    """One sentence on a failure of the machine, and one on what to do about it; None for any other error."""
    if isinstance(error, OSError):  # a disk that is full, a folder that may not be written
        return f"{error.filename or 'file system'}: {error.strerror or error}."
    torch = sys.modules.get("torch")  # an error of torch has loaded it
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"the memory of the GPU is full. {_LESS}."
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return f"memory is full. {_LESS}."
    if isinstance(error, BrokenProcessPool):
        return f"{_KILLED}. {_LESS}."
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return f"{_KILLED}. {_LESS}, or let fewer processes read ahead (num_workers)."
    return None
