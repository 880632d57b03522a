"""Predictions by any number of processes are the same, and one whose scheduler is lost ends, and is resumed."""

import asyncio
import signal
import time

import pytest
from verbs import CONTEXT, Workshop, result

WAYS = {
    "1 reader": ["--num_workers", "1"],
    "2 readers": ["--num_workers", "2"],
    "4 readers": ["--num_workers", "4"],
    "2 devices": ["--device", "cpu,cpu"],
    "4 devices": ["--device", "cpu,cpu,cpu,cpu"],
    "Dask, 1 worker": ["--backend", "dask", "--dask_workers", "1"],
    "Dask, 2 workers": ["--backend", "dask", "--dask_workers", "2"],
    "Dask, 4 workers": ["--backend", "dask", "--dask_workers", "4"],
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop") / "workshop")


@pytest.fixture(scope="module")
def expected(workshop):
    return result("predict", workshop.folder / "prediction")


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_any_number_of_processes_makes_equal_bytes(workshop, expected, tmp_path, way):
    call = workshop.start("predict", tmp_path / "out", *WAYS[way])
    call.process.join()
    assert call.code == 0, call.said
    assert result("predict", tmp_path / "out") == expected


def schedule(address):
    from distributed import Scheduler

    async def run():
        async with Scheduler(port=0, dashboard=False) as scheduler:
            address.put(scheduler.address)
            await scheduler.finished()

    asyncio.run(run())


def work_for(address):
    from distributed import Worker

    async def run():
        async with Worker(address, nthreads=1) as worker:
            await worker.finished()

    asyncio.run(run())


@pytest.mark.long
def test_a_prediction_whose_scheduler_is_lost_is_resumed(workshop, expected, tmp_path):
    said, output = CONTEXT.SimpleQueue(), tmp_path / "out"
    scheduler = CONTEXT.Process(target=schedule, args=(said,))
    scheduler.start()
    address = said.get()
    worker = CONTEXT.Process(target=work_for, args=(address,))
    worker.start()
    call = workshop.start("predict", output, "--backend", "dask", "--scheduler", address)
    ledger = output / "val0.ome.zarr" / ".muvit" / "all.ledger"
    while call.process.is_alive() and not (ledger.exists() and ledger.stat().st_size):
        time.sleep(0.01)
    scheduler.kill()
    begin = time.monotonic()
    call.process.join(120)
    worker.kill()
    assert call.code == 1, (call.code, call.said)
    assert "Traceback" not in call.said and "the scheduler of the cluster was lost" in call.said, call.said
    assert "run the same command again to resume" in call.said
    assert time.monotonic() - begin < 60
    assert scheduler.exitcode in (None, -signal.SIGKILL)
    again = workshop.call("predict", output)
    assert again.code == 0, again.said
    assert result("predict", output) == expected
