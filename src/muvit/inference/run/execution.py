"""Hardware and processes of a run, which change its result by no more than rounding."""

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from muvit.checks import Bounds, PositiveInt, check_fields
from muvit.errors import InputError

if TYPE_CHECKING:
    import torch


_MAX_READERS = 8


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Devices, processes, and the share of the blocks that a run computes."""

    backend: Literal["local", "dask"] = "local"
    """This machine, with one process for each device; or a Dask cluster, whose workers see the same files."""
    device: str | None = None
    """Such as cpu, cuda, mps, or several separated by commas (cuda:0,cuda:1); unset, a GPU if there is one."""
    batch_size: PositiveInt = 8
    """Tiles computed at once."""
    num_workers: Annotated[int, Bounds(min=0)] | None = None
    """Processes that read ahead, for each device; 0 reads in between; unset, up to 8 for each GPU of this machine, as
    there are cores. They are spawned, so a script must guard its own start by ``if __name__ == "__main__"``."""
    scheduler: str | None = None
    """Address of a running Dask cluster; unset, one is started on this machine."""
    dask_workers: PositiveInt | None = None
    """Workers of the Dask cluster that is started; unset, one for each device."""
    part: str | None = None
    """Only this part of the blocks, as in 3/8: for job arrays. The last job to end completes the output."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.backend != "dask":
            for name in ("scheduler", "dask_workers"):
                if getattr(self, name) is not None:
                    expected = "backend dask, to which it belongs"
                    raise InputError(name, expected=expected, got=f"backend {self.backend}")
        number, of = self.share
        if not 1 <= number <= of:
            raise InputError("part", expected="a part such as 3/8, counted from 1", got=repr(self.part))

    @property
    def share(self) -> tuple[int, int]:
        """Number of this part, counted from 1, and number of parts."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.part or "1/1")
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @property
    def devices(self) -> "list[torch.device]":
        """The devices, checked.

        Raises:
            InputError: this machine has no such device.
        """
        return resolve_devices(self.device)

    def readers(self, device: "torch.device") -> int:
        """Processes that read ahead for a device."""
        if self.num_workers is not None:
            return self.num_workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        is_gpu = device.type == "cuda" and self.backend == "local"
        return min(_MAX_READERS, cores // len(self.devices)) if is_gpu else 0


def resolve_device(device: "str | torch.device | None") -> "torch.device":
    """The device with this name, by default CUDA if there is any, else the CPU.

    Raises:
        InputError: this machine has no such device, or torch knows none of this name.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type == "cuda" and (found.index or 0) < torch.cuda.device_count():
            return torch.device("cuda", found.index or 0)  # without a tensor, which would take memory of every GPU
        return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InputError("device", expected="a device of this machine", got=f"{device!r} ({reason})") from error


def resolve_devices(names: str | None) -> "list[torch.device]":
    """The devices with these names, separated by commas; by default that of `resolve_device`.

    Raises:
        InputError: this machine has no such device, or torch knows none of this name.
    """
    return [resolve_device(name.strip() or None) for name in (names or "").split(",")]
