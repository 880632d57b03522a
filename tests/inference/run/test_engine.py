import errno
import importlib
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from concurrent.futures import Future

import dask
import pytest
from tiny_prediction import PREPROCESSING, hashes, make_model_and_image, predict

from muvit.data.pyramids.writer import UNFINISHED, PyramidWriter
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.errors import MuViTError
from muvit.inference.predict import plan_prediction
from muvit.inference.run import engine
from muvit.inference.run.cluster import _distribute
from muvit.inference.run.execution import Execution
from muvit.inference.run.label_blocks import LabelStore, prediction_status
from muvit.inference.run.plan import PredictOptions
from muvit.locks import OutputLock
from muvit.models.segmenter import Segmenter


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model and image, and the result of an undisturbed run."""
    folder = tmp_path_factory.mktemp("work")
    make_model_and_image(folder)
    assert predict(folder, folder / "whole") == 0
    return folder


# -- killed runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """Starts processes from one that has imported all they need."""
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
    importlib.import_module("distributed")  # reads that setting, and would have less imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "distributed", "muvit.cli.predict", "muvit.models.segmenter"])
    return context


def forked_run(context, folder, output, *more):
    process = context.Process(target=run_and_exit, args=(folder, output, *more))
    process.start()
    return process


def run_and_exit(folder, output, *more):
    os._exit(predict(folder, output, *more))


def num_files(output):
    return sum(len(files) for _, _, files in os.walk(output))  # which folders may leave meanwhile


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_makes_the_same_bytes(server, work, tmp_path):
    """SIGKILL at random moments of everything that a run does, from creating the stores to publishing them."""
    draw, kills, trial, expected = random.Random(0), 0, 0, hashes(work / "whole")
    while kills < 10:
        trial += 1
        output = tmp_path / str(trial)
        while True:
            process = forked_run(server, work, output)
            target = num_files(output) + draw.randint(0, 8)
            while process.is_alive() and num_files(output) < target:
                time.sleep(0.002)
            process.join(draw.uniform(0, 0.02))
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
        assert hashes(output) == expected
    assert kills > 4 * trial


def test_a_run_that_is_killed_when_all_can_be_read_leaves_nothing_behind(work, tmp_path, monkeypatch):
    output, settle = tmp_path / "image.ome.zarr", PyramidWriter.settle

    def stop(writer):
        if writer.path == output:  # whose turn is the last
            raise KeyboardInterrupt
        settle(writer)

    with monkeypatch.context() as patch:
        patch.setattr(PyramidWriter, "settle", stop)
        assert predict(work, tmp_path) == 1
    assert (output / "zarr.json").exists()
    assert (output / UNFINISHED).exists()
    assert predict(work, tmp_path) == 0
    assert hashes(tmp_path) == hashes(work / "whole")


@pytest.mark.long
def test_workers_of_a_cluster_may_be_killed_too(server, work, tmp_path):
    draw, kills, trial = random.Random(1), [], 0

    def kill_workers(is_over):
        while len(kills) < 6 and not is_over.wait(draw.uniform(0.1, 1)):
            try:
                workers = sorted(importlib.import_module("distributed").default_client().run(os.getpid).values())
            except (ValueError, OSError):  # no cluster yet, or one that just lost a worker
                continue
            if workers:
                os.kill(draw.choice(workers), signal.SIGKILL)
                kills.append(workers)

    while not kills:  # a run may be through before the first
        trial += 1
        output, is_over = tmp_path / str(trial), threading.Event()
        killer = threading.Thread(target=kill_workers, args=(is_over,))
        killer.start()
        code = predict(work, output, "--backend", "dask", "--dask_workers", "2")
        is_over.set()
        killer.join()
        while code:  # a block whose workers were killed four times is given up, but all others are done
            code = predict(work, output, "--backend", "dask", "--dask_workers", "2")
        assert hashes(output) == hashes(work / "whole")


# -- parts and devices -------------------------------------------------------------------------------------------------


def test_the_last_part_completes_the_output(work, tmp_path, capfd):
    for part in ("2/3", "1/3"):
        assert predict(work, tmp_path, "--part", part) == 0
        assert predict(work, tmp_path, "--status") == 0
        assert "unfinished" in capfd.readouterr().out
    assert predict(work, tmp_path, "--part", "3/3") == 0
    assert hashes(tmp_path) == hashes(work / "whole")
    assert predict(work, tmp_path, "--part", "1/3") == 0  # a job that is started once more finds nothing to do
    assert hashes(tmp_path) == hashes(work / "whole")
    assert predict(work, tmp_path, "--part", "1/3", "--overwrite") == 1
    assert "one part that would replace it" in capfd.readouterr().err


@pytest.mark.long
def test_parts_may_run_at_the_same_time_and_their_progress_be_asked_for(server, work, tmp_path):
    parts = [forked_run(server, work, tmp_path, "--part", f"{number}/3") for number in (1, 2, 3)]
    seen = set()
    while any(part.is_alive() for part in parts):
        seen.add(prediction_status(tmp_path / "image.ome.zarr").state)
    assert [part.exitcode for part in parts] == [0, 0, 0]
    assert "unfinished" in seen and seen <= {"missing", "unfinished", "complete"}
    assert hashes(tmp_path) == hashes(work / "whole")


def test_a_run_takes_over_what_parts_have_done(work, tmp_path):
    assert predict(work, tmp_path, "--part", "2/2") == 0
    assert predict(work, tmp_path) == 0
    assert hashes(tmp_path) == hashes(work / "whole")


def test_every_device_has_a_process(work, tmp_path):
    assert predict(work, tmp_path, "--device", "cpu,cpu") == 0
    assert hashes(tmp_path) == hashes(work / "whole")


@pytest.mark.parametrize("more", [(), ("--part", "1/2")])
def test_a_second_writer_is_refused(work, tmp_path, capfd, monkeypatch, more):
    monkeypatch.setattr("muvit.inference.run.engine._LOCK_WAIT_S", 0.3)
    output = tmp_path / "image.ome.zarr"
    with OutputLock(output).require():
        assert predict(work, tmp_path, *more) == 1
    assert f"that process {os.getpid()} on" in capfd.readouterr().err
    assert not output.exists()


# -- failures ----------------------------------------------------------------------------------------------------------


class FakeClient:
    """A cluster whose workers fail as told: number of failures to come by block."""

    def __init__(self, failures):
        self.failures, self.calls = failures, []

    def nthreads(self):
        return {"one": 1, "two": 1}

    def submit(self, function, job, number, *, pure):
        self.calls.append(number)
        future = Future()
        if self.failures.get(number, 0):
            self.failures[number] -= 1
            future.status = "error"
            future.set_exception(ValueError(f"bad luck with {number}"))
        else:
            future.status = "finished"
            future.set_result((f"block {number}", {}))
        return future


def begun_job(work, tmp_path):
    model, slide = Segmenter.from_folder(work / "model"), OmeZarrSlide(work / "image.ome.zarr")
    options = PredictOptions(block_px=32)
    job = plan_prediction(model, slide, tmp_path / "a.ome.zarr", PREPROCESSING, options=options)
    assert job.store.begin()
    return job


def test_a_block_is_tried_four_times_and_then_listed(work, tmp_path):
    job = begun_job(work, tmp_path)
    client, execution = FakeClient({1: 3, 2: 4}), Execution(backend="dask")
    with job.store.ledger() as ledger:
        with pytest.raises(MuViTError, match=r"1 of 3 blocks failed 4 times each\. block 2: bad luck with 2"):
            _distribute(client, job, [0, 1, 2], execution, ledger, lambda _: None, workerless_s=1)
        assert set(ledger.entries) == {"block 0", "block 1"}
    assert [client.calls.count(number) for number in range(3)] == [1, 4, 4]


def test_a_lost_scheduler_ends_the_run_and_one_that_is_not_there_does_not_begin_it(work, tmp_path, capfd):
    class Lost(FakeClient):
        def nthreads(self):
            raise OSError("Timed out trying to connect")

    job = begun_job(work, tmp_path)
    with (
        job.store.ledger() as ledger,
        pytest.raises(MuViTError, match=r"the scheduler of the cluster was lost \(OSError: Timed out"),
    ):
        _distribute(Lost({}), job, [1], Execution(backend="dask"), ledger, lambda _: None, workerless_s=1)
    capfd.readouterr()
    assert predict(work, tmp_path / "out", "--backend", "dask", "--scheduler", "nowhere://a") == 1
    assert "muvit: scheduler: expected the address of a running Dask scheduler, got " in capfd.readouterr().err


@pytest.mark.parametrize(("room", "state"), [(0, "missing"), (1, "missing"), (6, "missing"), (70, "unfinished")])
def test_a_full_disk_is_reported_and_the_run_resumes_with_room(work, tmp_path, monkeypatch, capfd, room, state):
    fsync = os.fsync

    def full(handle):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert predict(work, tmp_path) == 1
    complaint = capfd.readouterr().err
    assert re.search(rf"^muvit: {tmp_path}\S*: No space left on device\.", complaint, re.MULTILINE)
    assert ("image.ome.zarr is kept: run the same command again to resume." in complaint) == (state == "unfinished")
    monkeypatch.undo()
    assert prediction_status(tmp_path / "image.ome.zarr").state == state
    assert predict(work, tmp_path) == 0
    assert hashes(tmp_path) == hashes(work / "whole")


def test_a_folder_that_may_not_be_written_is_told_by_its_name(work, tmp_path, monkeypatch, capfd):
    make = os.open

    def read_only(path, flags, *more):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return make(path, flags, *more)

    monkeypatch.setattr(os, "open", read_only)  # a folder's mode does not stop root
    assert predict(work, tmp_path) == 1
    assert re.search(rf"^muvit: {tmp_path}/\S*: Read-only file system\.$", capfd.readouterr().err, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_the_output_that_was_damaged_meanwhile_is_named(work, tmp_path, capfd):
    assert predict(work, tmp_path, "--part", "1/2") == 0
    shard = tmp_path / "image.ome.zarr" / "0" / "c" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[20] ^= 255
    shard.write_bytes(content)
    assert predict(work, tmp_path) == 1
    complaint = capfd.readouterr().err
    assert re.search(r"image\.ome\.zarr, level 1, window .*: expected the pixels that were written, got .*", complaint)
    assert "(--overwrite)" in complaint
    assert predict(work, tmp_path, "--overwrite") == 0
    assert hashes(tmp_path) == hashes(work / "whole")


# -- stopped from outside ----------------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c():
    """Python's own answer to SIGINT, which a shell takes from what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_resume(work, tmp_path, monkeypatch, capfd, number):
    write, written = LabelStore.write_block, []

    def stop_at_the_third(output, *block):
        written.append(block)
        if len(written) == 3:
            os.kill(os.getpid(), number)
        return write(output, *block)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(LabelStore, "write_block", stop_at_the_third)
    assert predict(work, tmp_path) == 1
    assert "muvit: interrupted. The unfinished output" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    status = prediction_status(tmp_path / "image.ome.zarr")
    assert 2 <= status.blocks < status.num_blocks
    assert predict(work, tmp_path) == 0
    assert len(written) - 3 == status.num_blocks - status.blocks
    assert hashes(tmp_path) == hashes(work / "whole")


@pytest.mark.parametrize(("number", "message"), [(signal.SIGTERM, "interrupted."), (signal.SIGKILL, "devices died.")])
def test_no_process_of_a_device_outlives_its_run(work, tmp_path, monkeypatch, capfd, number, message):
    """Told to stop, the run ends its processes and does not wait for them; one that dies ends the run."""
    wait, sent = engine.wait, []

    def send(*arguments, **more):
        if not sent:
            sent.append(os.getpid() if number == signal.SIGTERM else multiprocessing.active_children()[0].pid)
            os.kill(sent[0], number)
        return wait(*arguments, **more)

    monkeypatch.setattr(engine, "wait", send)
    assert predict(work, tmp_path, "--device", "cpu,cpu") == 1
    assert message in capfd.readouterr().err
    assert multiprocessing.active_children() == []
    status = prediction_status(tmp_path / "image.ome.zarr")
    assert (status.state, status.blocks < status.num_blocks) == ("unfinished", True)
    monkeypatch.undo()
    assert predict(work, tmp_path) == 0
    assert hashes(tmp_path) == hashes(work / "whole")
