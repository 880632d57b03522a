import errno
import os

import pytest

from muvit.errors import InputError
from muvit.inference.run.resume import Ledger, read_ledgers
from muvit.locks import OutputLock


def test_what_was_recorded_is_read_again(tmp_path):
    with Ledger(tmp_path / "work" / "all.ledger", "plan") as ledger:
        ledger.record("block 0", {"labels": [3, 4]})
        ledger.record("block 1", None)
        assert ledger.entries == {"block 0": {"labels": [3, 4]}, "block 1": None}
    with Ledger(tmp_path / "work" / "all.ledger", "plan") as ledger:
        assert ledger.entries == {"block 0": {"labels": [3, 4]}, "block 1": None}
        ledger.record("block 0", 5)
    assert read_ledgers(tmp_path / "work", "plan") == {"block 0": 5, "block 1": None}


def test_a_torn_line_is_not_done_and_does_not_spoil_the_next(tmp_path):
    file = tmp_path / "all.ledger"
    with Ledger(file, "plan") as ledger:
        ledger.record("a", 1)
        ledger.record("b", 2)
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        file.write_bytes(whole[:length])
        assert read_ledgers(tmp_path, "plan") == {"a": 1}
    with Ledger(file, "plan") as ledger:
        ledger.record("c", 3)
    assert read_ledgers(tmp_path, "plan") == {"a": 1, "c": 3}


def test_a_line_that_is_taken_in_parts_is_whole_and_a_full_disk_is_told_by_the_file(tmp_path, monkeypatch):
    write, room = os.write, 30

    def a_little(handle, content):
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "no room")
        taken = write(handle, content[: min(room, 7)])
        room -= taken
        return taken

    file = tmp_path / "all.ledger"
    with Ledger(file, "plan") as ledger:
        monkeypatch.setattr(os, "write", a_little)
        ledger.record("a", 1)
        with pytest.raises(OSError, match="no room") as caught:
            ledger.record("b", 2)
        assert caught.value.filename == str(file)
        assert ledger.entries == {"a": 1}
    monkeypatch.undo()
    assert file.stat().st_size == 30
    with Ledger(file, "plan") as ledger:
        ledger.record("c", 3)
    assert read_ledgers(tmp_path, "plan") == {"a": 1, "c": 3}


def test_a_damaged_line_is_told_and_left_out(tmp_path, caplog):
    file = tmp_path / "all.ledger"
    with Ledger(file, "plan") as ledger:
        for key in "abc":
            ledger.record(key, 1)
    file.write_bytes(file.read_bytes().replace(b'"b"', b'"x"'))
    assert read_ledgers(tmp_path, "plan") == {"a": 1, "c": 1}
    assert "line 2 is damaged" in caplog.text


def test_the_ledgers_of_several_writers_count_together(tmp_path):
    for name in ("part-1", "part-2"):
        with Ledger(tmp_path / f"{name}.ledger", "plan") as ledger:
            ledger.record(name, name)
    assert read_ledgers(tmp_path, "plan") == {"part-1": "part-1", "part-2": "part-2"}


def test_a_lock_is_held_by_one_and_shared_by_many(tmp_path):
    output = tmp_path / "a.ome.zarr"
    one, two, three = (OutputLock(output) for _ in range(3))
    with one.require():
        with pytest.raises(
            InputError, match=r"a\.ome\.zarr: expected an output that no other process is writing, got .*pro"
        ):
            two.require()
        assert not two.acquire(shared=True)
    assert list(tmp_path.iterdir()) == []
    with one.require(shared=True), two.require(shared=True):
        assert not three.acquire()
        assert not one.acquire()  # and has lost its share
        assert two.acquire()
    assert not one.path.exists()
    assert three.acquire()
    three.release()


def test_a_lock_waits_as_long_as_it_is_told(tmp_path):
    output = tmp_path / "a.ome.zarr"
    with OutputLock(output).require(), pytest.raises(InputError, match="Wait until it is done"):
        OutputLock(output).require(wait_s=0.3)
