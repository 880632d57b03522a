"""Programs of begin, write, crash, resume, overwrite, parts and second writers, against a model of the output."""

import os
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tiny_prediction import PREPROCESSING, hashes

from muvit.data.pyramids.spec import check_spec
from muvit.data.pyramids.writer import PyramidWriter
from muvit.errors import MuViTError
from muvit.inference.run import engine
from muvit.inference.run.label_blocks import LabelStore, prediction_status
from muvit.inference.run.plan import LabelPlan, PredictOptions
from muvit.inference.run.store import BlockPixels
from muvit.inference.tiling.tiles import TilePlan
from muvit.locks import OutputLock

SHAPE, EDGE, NUM_BLOCKS = (24, 16), 8, 6
KINDS = st.integers(0, 1)


@cache
def plan_of(kind):
    """One of two plans, which differ in the model."""
    stores = {"labels": check_spec(shape=SHAPE, num_channels=1, dtype=np.uint8, kind="label", chunk=EDGE, shard=EDGE)}
    sizes = {"crop_size": (8, 8), "block_size": (EDGE, EDGE)}
    return LabelPlan(
        tiling=TilePlan(shapes=(SHAPE,), levels=(1,), **sizes),
        stores=stores,
        options=PredictOptions(overlap=0.0, precision="float32", placement="nested"),
        preprocessing=PREPROCESSING,
        model={"class": "Toy", "sha256": str(kind)},
        image={"path": "image.ome.zarr", "shape": list(SHAPE)},
    )


def block_of(kind, number):
    """Pixels of a block; one block is background."""
    pixels = np.random.default_rng([kind, number]).integers(0, 3, (1, EDGE, EDGE), dtype=np.uint8)
    return BlockPixels(stores={"labels": pixels * (number != 4)}, notes={"seams": [0, 0, 0, 0]})


@cache
def undisturbed(kind):
    """Hashes of the files of a run that nothing happened to."""
    with tempfile.TemporaryDirectory() as folder:
        store = LabelStore(Path(folder) / "a.ome.zarr", plan_of(kind))
        assert store.begin()
        with store.ledger() as ledger:
            for number in range(NUM_BLOCKS):
                ledger.record(*store.write_block(number, block_of(kind, number)))
            store.finish(ledger)
        return hashes(store.path)


class Run:
    """A process that writes the output: the whole of it, or a part."""

    def __init__(self, path, kind, part):
        self.kind, self.part = kind, part
        self.name = "all" if part is None else f"part-{part + 1}-of-2"
        self.store = LabelStore(path, plan_of(kind))
        self.lock, self.own = OutputLock(path), OutputLock(path, f"{self.name}.lock")
        self.ledger = None

    def begin(self, overwrite):
        """Whether there is work; as `muvit.inference.run.engine.run_job` begins."""
        try:
            if self.part is None:
                self.lock.require()
                begun = self.store.begin(overwrite=overwrite)
            else:
                begun = engine._begin_part(SimpleNamespace(store=self.store), self.lock, self.own, overwrite)
            if begun:
                self.ledger = self.store.ledger(self.name)
            return begun
        finally:
            if self.ledger is None:
                self.lock.release()
                self.own.release()

    def end(self):
        self.ledger.close()
        self.lock.release()
        self.own.release()

    def die(self):
        """End as by SIGKILL: the system closes what was open, and nothing else happens."""
        self.ledger.close()
        for lock in (self.lock, self.own):
            if lock._handle is not None:
                lock._close()


class Programs(RuleBasedStateMachine):
    """The output, and what must be true of it: state, plan, and blocks that are done."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "a.ome.zarr"
        self.state, self.kind, self.done, self.recorded = "missing", None, set(), set()
        self.runs = {}

    def teardown(self):
        for run in self.runs.values():
            run.die()
        shutil.rmtree(self.folder)

    @rule(kind=KINDS, overwrite=st.booleans(), part=st.sampled_from([None, None, 0, 1]))
    def begin(self, kind, overwrite, part):
        run = Run(self.path, kind, part)
        is_locked = self.runs and (part is None or None in self.runs or part in self.runs)
        is_other = self.state != "missing" and kind != self.kind
        try:
            begun = run.begin(overwrite)
        except MuViTError:
            assert is_locked or (overwrite and part is not None) or (is_other and not overwrite)
            return
        assert not is_locked and not (overwrite and part is not None) and not (is_other and not overwrite)
        if self.state in ("published", "complete") and not overwrite:
            assert not begun
            self.state = "complete"
            return
        assert begun
        if overwrite or self.state == "missing":
            self.state, self.kind, self.done, self.recorded = "unfinished", kind, set(), set()
        self.runs[part] = run

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), step=st.sampled_from(["whole", "whole", "whole", "no line", "half a line"]))
    def write(self, data, step):
        run = self.runs[data.draw(st.sampled_from(sorted(self.runs, key=str)))]
        missing = [number for number in run.store.missing_blocks() if run.part in (None, number % 2)]
        if not missing:
            return
        number = data.draw(st.sampled_from(missing))
        key, entry = run.store.write_block(number, block_of(run.kind, number))
        if step != "no line":
            run.ledger.record(key, entry)
        if step == "whole":
            self.recorded.add(number)
        if number in self.recorded:  # also by a line from before its shard was damaged
            self.done.add(number)
        if step == "whole":
            return
        if step == "half a line":
            content = run.ledger.path.read_bytes()
            start = content[:-1].rfind(b"\n") + 1
            os.truncate(run.ledger.path, data.draw(st.integers(start, len(content) - 1)))
        self.runs.pop(run.part).die()

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def crash(self, data):
        self.runs.pop(data.draw(st.sampled_from(sorted(self.runs, key=str)))).die()

    @precondition(lambda self: self.state == "unfinished" and not self.runs and self.done - {4})
    @rule(data=st.data(), size=st.integers(0, 3))
    def damage(self, data, size):
        number = data.draw(st.sampled_from(sorted(self.done - {4})))
        shard = self.path.joinpath("0", "c", *map(str, divmod(number, SHAPE[1] // EDGE)))
        if size:
            os.truncate(shard, size)
        else:
            shard.unlink()
        self.done.remove(number)

    @precondition(lambda self: len(self.runs) == 1 and len(self.done) == NUM_BLOCKS)
    @rule(crash=st.sampled_from([None, None, "build", "publish", "settle"]))
    def finish(self, crash):
        ((part, run),) = self.runs.items()
        assert run.lock.acquire()
        if crash is None:
            run.store.finish(run.ledger)
            del self.runs[part]
            run.end()
            self.state = "complete"
            return
        with mock.patch.object(PyramidWriter, crash, side_effect=KeyboardInterrupt), suppress(KeyboardInterrupt):
            run.store.finish(run.ledger)
        del self.runs[part]
        run.die()
        self.state = "published" if crash == "settle" else "unfinished"

    @invariant()
    def the_disk_says_what_is_true(self):
        status = prediction_status(self.path)
        assert status.state == {"published": "complete"}.get(self.state, self.state)
        if self.state == "unfinished":
            assert status.blocks == len(self.done)
            missing = LabelStore(self.path, plan_of(self.kind)).missing_blocks()
            assert {*missing} == {*range(NUM_BLOCKS)} - self.done
        if self.state == "complete":
            assert hashes(self.path) == undisturbed(self.kind)


def run_programs(number, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no machine fails here
    monkeypatch.setattr(engine, "_LOCK_WAIT_S", -1.0)
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]
    run_state_machine_as_test(
        Programs,
        settings=settings(
            max_examples=number,
            stateful_step_count=25,
            phases=[Phase.generate],
            suppress_health_check=checks,
            database=None,
        ),
    )


def test_programs_of_runs(monkeypatch):
    run_programs(10, monkeypatch)


@pytest.mark.long
def test_a_thousand_programs_of_runs(monkeypatch):
    run_programs(1000, monkeypatch)
