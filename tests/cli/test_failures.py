import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import muvit.cli.info
from muvit.cli import main
from muvit.cli.terminal import failure


class Deadly(Dataset):
    """Kills the process that reads it, as the system does when memory is full."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def read_ahead():
    next(iter(DataLoader(Deadly(), num_workers=1, multiprocessing_context="spawn")))


def work_in_a_pool():
    with ProcessPoolExecutor(1) as pool:
        pool.submit(os._exit, 9).result()


def fill_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def lose_a_peer():
    raise RuntimeError("[/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:38306: Connection reset by peer.")


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (lambda: np.empty(1 << 50), "memory is full. Make batches or crops smaller."),
        (lambda: torch.empty(1 << 50), "memory is full. Make batches or crops smaller."),
        (fill_a_gpu, "the memory of the GPU is full. Make batches or crops smaller."),
        (work_in_a_pool, "a process of this run was killed from outside, "),
        (read_ahead, "a process of this run was killed from outside, "),
        (lose_a_peer, "a process that trains together with this one died, "),
        (Path("/nowhere/at/all").read_bytes, "/nowhere/at/all: No such file or directory."),
    ],
    ids=["array", "tensor", "gpu", "pool", "loader", "peer", "file"],
)
def test_what_the_machine_refuses_is_told_in_a_sentence(monkeypatch, capsys, fail, said):
    monkeypatch.setattr(muvit.cli.info, "run", lambda _: fail())
    assert main(["info", "slide.tif"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"muvit: {said}")
    assert error.count("\n") == 1


def test_errors_of_the_program_are_not_hidden(monkeypatch):
    assert failure(RuntimeError("shapes do not fit")) is None
    monkeypatch.setattr(muvit.cli.info, "run", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info", "slide.tif"])
