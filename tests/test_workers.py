import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from muvit import workers
from muvit.workers import without_interrupts, worker_pool

PARENT = """
import time
from muvit.workers import worker_pool
with worker_pool(1) as pool:
    pool.submit(print, "ready", flush=True).result()
    time.sleep(600)
"""


CHILD = "from muvit.workers import exit_with_parent; exit_with_parent(); print('ready', flush=True); input()"
GRANDPARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


def test_a_child_exits_with_its_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", GRANDPARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    assert parent.stdout.read() == ""  # which ends when the child has closed it
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()


def disobey(started: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started.touch()
    time.sleep(600)


def test_workers_exit_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        parent.communicate(timeout=60)  # the pipe closes when the last process that holds it has gone
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_an_error_ends_workers_that_do_not_obey(tmp_path, monkeypatch, is_frozen):
    """One that ignores SIGTERM exits by itself; one that cannot even do that is killed."""
    monkeypatch.setattr(workers, "EXIT_WAIT_S", 0.2 if is_frozen else 60.0)
    started, seen = tmp_path / "started", []
    others = multiprocessing.active_children()  # of pools that other tests have left open
    with pytest.raises(KeyboardInterrupt), worker_pool(1) as pool:
        with without_interrupts():
            pool.submit(disobey, started)
        while not started.exists():
            time.sleep(0.01)
        seen += [child for child in multiprocessing.active_children() if child not in others]
        seen[0].terminate()
        if is_frozen:
            os.kill(seen[0].pid, signal.SIGSTOP)
        raise KeyboardInterrupt
    assert not set(seen) & set(multiprocessing.active_children())
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0].pid, 0)
