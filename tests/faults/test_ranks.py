"""Training by two processes, one of which is killed: the other ends without a traceback, and the run is resumed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from verbs import Workshop, members, result

ENDED_S = 120.0


class Ranks:
    """A run of two processes on the CPU, in a session of its own."""

    def __init__(self, recipe, output, *more):
        command = [sys.executable, "-m", "muvit", "train", "--config", str(recipe), "--output", str(output), *more]
        self.file = recipe.with_name("said.txt")
        with self.file.open("w") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)

    def end(self, seconds=None):
        """Wait until no process is left; kill what is left after some seconds, and say whether anything was."""
        until = time.monotonic() + (seconds or 1e9)
        while (self.process.poll() is None or members(self.process.pid)) and time.monotonic() < until:
            time.sleep(0.1)
        left = members(self.process.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return left


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A recipe for two processes, and the weights of an undisturbed run."""
    folder = tmp_path_factory.mktemp("work") / "workshop"
    Workshop(folder)
    recipe = yaml.safe_load((folder / "train.yaml").read_text())
    recipe["run"] |= {"devices": 2, "save_every": 1, "epochs": 6}
    (folder / "train.yaml").write_text(yaml.safe_dump(recipe))
    whole = Ranks(folder / "train.yaml", folder / "whole")
    whole.end()
    assert whole.process.returncode == 0, whole.file.read_text()
    return folder / "train.yaml", result("train", folder / "whole")


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other(work, tmp_path, rank):
    recipe, expected = work
    run = Ranks(recipe, tmp_path / "run")
    while not (tmp_path / "run" / "resume" / "last.ckpt").exists():
        assert run.process.poll() is None, run.file.read_text()
        time.sleep(0.05)
    others = [pid for pid in members(run.process.pid) if pid != run.process.pid]
    os.kill(run.process.pid if rank == 0 else others[0], signal.SIGKILL)
    assert run.end(ENDED_S) == []
    said = run.file.read_text()
    assert "Traceback" not in said, said
    assert rank == 0 or "muvit: a process that trains together with this one died" in said, said
    again = Ranks(recipe, tmp_path / "run", "--resume")
    again.end()
    assert again.process.returncode == 0, again.file.read_text()
    assert result("train", tmp_path / "run") == expected
