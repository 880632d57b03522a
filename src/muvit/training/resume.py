"""State of a training run on disk: written beside the one before, verified, and found again by ``--resume``.

``resume/last.ckpt`` is the newest state and ``previous.ckpt`` the one before it; ``next.ckpt`` is a state that was
written, but not yet renamed when the process was killed. Each ends with the SHA-256 of the bytes before it, which torch
ignores.
"""

import hashlib
import logging
import pickle
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection

from muvit.durable import replace_and_keep, whole_file
from muvit.errors import CheckpointError, InputError, MuViTError, first_line
from muvit.training.run_config import RunConfig

FOLDER = "resume"
LAST, PREVIOUS, NEXT = "last.ckpt", "previous.ckpt", "next.ckpt"

_LOG = logging.getLogger(__name__)
_MARK = b"muvit256"
_SEAL_BYTES = len(_MARK) + hashlib.sha256().digest_size
_BLOCK = 1 << 20
_AGREE_EVERY = 16
_CHANGED = "other bytes than were written"
_KEYS = ("state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers", "global_step")


def has_state(run: Path) -> bool:
    """Whether a run has anything to resume from, whole or damaged."""
    return any((run / FOLDER / name).is_file() for name in (NEXT, LAST, PREVIOUS))


def newest_state(run: Path) -> Path:
    """The newest state of a run that is whole; a warning names newer ones that are damaged.

    Raises:
        InputError: the run has no state.
        CheckpointError: all are damaged.
    """
    problems = []
    for name in (NEXT, LAST, PREVIOUS):
        file = run / FOLDER / name
        if not file.is_file():
            continue
        try:
            if not check_seal(file):  # of an earlier version: only reading tells whether it is whole
                read_state(file)
        except CheckpointError as error:
            problems.append(error)
            continue
        for problem in problems:
            _LOG.warning("%s The run is resumed from %s instead.", problem, file)
        return file
    if problems:
        raise problems[0]
    raise InputError(run, expected="an interrupted run, to resume it", got=f"no {run / FOLDER / LAST}")


def write_state(file: Path, state: dict[str, Any]) -> None:
    """Write a state and its checksum; when this returns, both are on disk and have been read back.

    Raises:
        OSError: the disk is full, or cannot be written.
        CheckpointError: the disk returns other bytes than were written.
    """
    with whole_file(file) as stream:
        sealed = _Hashing(stream)
        try:
            torch.save(state, cast(IO[bytes], sealed))
        except RuntimeError as error:  # torch reports an error of the file as its own
            raise sealed.error or error from None
        stream.write(_MARK + sealed.digest.digest())
    if not check_seal(file):
        raise _damaged(file, _CHANGED)


def check_seal(file: Path) -> bool:
    """Check the bytes of a state against their checksum; False if it has none, as those of earlier versions.

    Raises:
        CheckpointError: the bytes have changed, or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        remaining = file.stat().st_size - _SEAL_BYTES
        with file.open("rb") as stream:
            while remaining > 0 and (block := stream.read(min(_BLOCK, remaining))):
                digest.update(block)
                remaining -= len(block)
            seal = stream.read()
    except OSError as error:
        raise _damaged(file, error.strerror or "an unreadable file") from error
    if not seal.startswith(_MARK):
        return False
    if seal != _MARK + digest.digest():
        raise _damaged(file, _CHANGED)
    return True


def read_state(file: Path) -> dict[str, Any]:
    """Read a state; only tensors and plain values are loaded, no code is executed.

    Raises:
        CheckpointError: it is damaged, or no state of a training run.
    """
    check_seal(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _damaged(file, "bytes that are damaged or hold more than tensors") from error
    except Exception as error:  # whatever bytes from elsewhere make torch raise
        raise _damaged(file, "a damaged file") from error
    if not isinstance(state, dict) or not all(key in state for key in _KEYS) or not state["optimizer_states"]:
        raise _damaged(file, "a file of another kind")
    return state


def _damaged(file: Path, got: str) -> CheckpointError:
    return CheckpointError(file, expected="the state of a training run", got=got)


def unfit_state(file: Path, error: Exception) -> CheckpointError:
    """The error that a state is whole, but that of another run."""
    return CheckpointError(file, expected="the state of this run", got=first_line(error).rstrip("."))


class _Hashing:
    """A file that is written from front to back, with the digest of what was written and the error that it met."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest = stream, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        self.digest.update(content)
        try:
            return self._forward(content)
        except OSError as error:
            self.error = error
            raise

    def _forward(self, content: bytes | memoryview) -> int:
        return self.stream.write(content)

    def flush(self) -> None:
        self.stream.flush()


class StateFiles(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, by `read_state` and `write_state`.

    Training goes on while a state is written: the next one, and `wait`, wait for it and raise the error that it met.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copy a checkpoint into the memory of the CPU, and begin to write it; at last it becomes the newest state."""
        self.wait()
        # steps to come change tensors in place
        state = apply_to_collection(checkpoint, torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
        self._writing = self._thread.submit(_keep_state, Path(path), state)

    def wait(self) -> None:
        """Wait until what was begun is on disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint into the memory of the CPU."""
        return read_state(Path(path))


def _keep_state(file: Path, state: dict[str, Any]) -> None:
    write_state(file, state)
    replace_and_keep(file, file.with_name(LAST), file.with_name(PREVIOUS))


class SaveState(Checkpoint):
    """Writes the state of a run as often as ``run.save_every`` says, at its end, and when it is told to stop.

    States are those between two steps, so that a run resumed from one takes the same steps as one that was never
    interrupted. Ctrl-C or SIGTERM ends the run after the step under way and the writing of its state; a second one ends
    it at once. With several processes both end it at once, since no step must be taken by some of them only.

    Args:
        folder: folder of the run.
        run: the interval.
        check: called before anything is written; raises if the model is not worth keeping.
        has_position: whether batches can go on from any of them; false for those of a user's own loader.
    """

    def __init__(
        self, folder: Path, run: RunConfig, check: Callable[[Trainer, LightningModule], None], *, has_position: bool
    ) -> None:
        self.folder, self.check, self.has_position = folder / FOLDER, check, has_position
        self.epochs, self.seconds = run.save_epochs, run.save_seconds
        self.has_started = self.is_told_to_stop = False
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count the time; the state of the run has been restored."""
        self.has_started = True
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()
        if self.has_position and trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._stop)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state after the epoch before, its validation included."""
        ends_interval = self.epochs is not None and trainer.current_epoch % self.epochs == 0
        self._save_if(trainer, pl_module, ends_interval or self._is_late())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save the state after the step before, which took several batches if gradients are accumulated."""
        if not self.has_position or batch_idx == 0 or batch_idx % trainer.accumulate_grad_batches != 0:
            return
        # several processes have to agree, and would wait for each other
        if trainer.world_size == 1 or batch_idx % _AGREE_EVERY == 0:
            self._save_if(trainer, pl_module, self._is_late())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state at the end, from which the run can be made longer."""
        self.is_told_to_stop = False
        self._save_if(trainer, pl_module, True)
        _files(trainer).wait()
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let signals have their former effect, and the state under way be written."""
        self._restore_handlers()
        try:
            _files(trainer).wait()
        except (OSError, MuViTError) as error:
            _LOG.warning("%s", first_line(error))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count an epoch or batch that has been fetched, but not begun, as not fetched."""
        loop = checkpoint["loops"]["fit_loop"]
        batches = loop["epoch_loop.batch_progress"]
        for progress in (loop["epoch_progress"], batches):
            for counts in (progress["total"], progress["current"]):
                counts["ready"] = counts["started"]
        batches["is_last_batch"] = batches["current"]["completed"] >= trainer.num_training_batches

    def _is_late(self) -> bool:
        return self.seconds is not None and time.monotonic() - self._saved_time >= self.seconds

    def _save_if(self, trainer: Trainer, task: LightningModule, is_due: bool) -> None:
        is_due = is_due or self.is_told_to_stop
        if trainer.world_size > 1:
            is_due = trainer.strategy.broadcast(is_due)
        if is_due and trainer.global_step > self._saved_step:
            self._save(trainer, task)
        if self.is_told_to_stop:
            _files(trainer).wait()
            raise KeyboardInterrupt

    def _save(self, trainer: Trainer, task: LightningModule) -> None:
        self.check(trainer, task)
        trainer.save_checkpoint(self.folder / NEXT)  # by all processes together; the first one writes
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()

    def _stop(self, *_: object) -> None:
        if self.is_told_to_stop:
            raise KeyboardInterrupt
        self.is_told_to_stop = True
        _LOG.warning("Stopping after this step, to save the state of the run; Ctrl-C again stops at once.")

    def _restore_handlers(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)


def _files(trainer: Trainer) -> StateFiles:
    files = trainer.strategy.checkpoint_io
    assert isinstance(files, StateFiles)
    return files
