import os
import signal
import subprocess
import sys
from contextlib import suppress

WORKER = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from muvit.evaluation.side_by_side import _start_worker
pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start_worker, (1, []))
pool.submit(print, "ready", flush=True).result()
time.sleep(600)
"""


def test_processes_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        parent.communicate(timeout=60)  # the pipe closes when the last process that holds it has gone
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
