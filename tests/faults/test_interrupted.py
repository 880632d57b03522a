"""Ctrl-C at random moments of verbs that take long and have workers: a prompt end, one sentence, no process left."""

import os
import random
import signal
import time

import pytest
from verbs import Workshop, leftovers, result

PROMPT_S = 30.0
"""Seconds until the last process has ended, on a machine that is busy with other work."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop") / "workshop")


@pytest.mark.long
@pytest.mark.parametrize("receiver", ["group", "parent"])
@pytest.mark.parametrize(
    ("verb", "more"),
    [("compare", ["--data.num_workers", "1"]), ("demo", []), ("study", [])],
    ids=["compare", "demo", "study"],
)
def test_ctrl_c_ends_a_verb_with_its_workers(workshop, tmp_path, verb, more, receiver):
    """It reaches all processes of a terminal, or the first one alone."""
    begin = time.monotonic()
    whole = workshop.start(verb, tmp_path / "whole" / "out", *more, cold=True)
    whole.process.join()
    assert whole.code == 0, whole.said
    lasted, expected = time.monotonic() - begin, result(verb, tmp_path / "whole" / "out")
    assert expected
    rng, interrupted = random.Random(receiver), 0
    for i in range(5):
        output = tmp_path / str(i) / "out"
        call = workshop.start(verb, output, *more, cold=True)
        call.process.join(rng.uniform(0.05, 0.95) * lasted)
        if call.process.is_alive():
            (os.killpg if receiver == "group" else os.kill)(call.process.pid, signal.SIGINT)
        until = time.monotonic() + PROMPT_S
        while (call.process.is_alive() or call.others()) and time.monotonic() < until:
            time.sleep(0.05)
        assert not call.process.is_alive() and call.others() == [], call.said
        if call.code != 0:
            interrupted += 1
            assert call.code == 1 and "Traceback" not in call.said, call.said
            assert call.said.splitlines()[-1].startswith("muvit: interrupted."), call.said
        assert leftovers(output) == []
        if verb == "study":  # which does not go on: all of its results are there, or none
            assert result(verb, output) in ({}, expected)
        is_done = verb == "study" and output.exists()
        again = workshop.start(verb, output, *more, *(["--overwrite"] if is_done else []))
        again.process.join()
        assert again.code == 0, again.said
        assert result(verb, output) == expected
    assert interrupted >= 3
