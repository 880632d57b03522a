import errno
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from muvit import durable
from muvit.durable import (
    make_folder,
    partial_files,
    remove_whole,
    scratch_folder,
    swap_in,
    whole_folder,
    without_flushing,
    write_whole,
)
from muvit.errors import ExistsError


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "some" / "folder" / "file"
    write_whole(file, b"one")
    assert file.read_bytes() == b"one"

    def full(handle):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no room"):
            write_whole(file, b"two")
    assert file.read_bytes() == b"one"
    assert [path.name for path in file.parent.iterdir()] == ["file"]
    write_whole(file, b"two")
    assert file.read_bytes() == b"two"


def test_a_full_disk_is_told_by_the_file_and_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    file, failures = tmp_path / "file", [OSError(errno.ENOSPC, "no room"), KeyboardInterrupt()]

    def fail(handle):
        raise failures.pop(0)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no room") as caught:
        write_whole(file, b"bytes")
    assert caught.value.filename == str(file)
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, b"bytes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_files", [3, 300])
def test_a_scratch_folder_is_flushed_at_once_before_it_is_named(tmp_path, monkeypatch, num_files):
    """Its files need no flush of their own; many are flushed with all of the file system, few one by one."""
    events, fsync, whole, rename = [], os.fsync, durable._sync_file_system, type(tmp_path).rename
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("file"), fsync(handle))[1])
    monkeypatch.setattr(durable, "_sync_file_system", lambda folder: (events.append("all"), whole(folder))[1])
    monkeypatch.setattr(type(tmp_path), "rename", lambda path, to: (events.append("named"), rename(path, to))[1])
    with scratch_folder(tmp_path / "set") as scratch:
        events.clear()
        with without_flushing():
            for number in range(num_files):
                write_whole(scratch / "fresh" / f"{number}", b"bytes")
        assert not events
        swap_in(scratch / "fresh", tmp_path / "set")
    before = events[: events.index("named")]
    one_by_one = ["file"] * (num_files + 1)
    many = ["all"] if sys.platform == "linux" else ["all", *one_by_one]
    assert before == (one_by_one if num_files == 3 else many)
    assert len(list((tmp_path / "set").iterdir())) == num_files
    events.clear()
    write_whole(tmp_path / "file", b"bytes")
    assert events == ["file", "file"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what a handle is")
def test_everything_is_flushed_before_it_counts(tmp_path, monkeypatch):
    """Bytes before the name, the name before the return, folders before what is in them."""
    events = []
    fsync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(str(Path(f"/proc/self/fd/{handle}").readlink())), fsync(handle))
    )
    monkeypatch.setattr(type(tmp_path), "replace", lambda path, to: (events.append("named"), replace(path, to))[1])
    write_whole(tmp_path / "new" / "file", b"bytes")
    folder, partial, named, after = events
    assert (folder, named, after) == (str(tmp_path), "named", str(tmp_path / "new"))
    assert partial.endswith(".partial")


def test_what_a_killed_process_left_is_found(tmp_path):
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / ".file.0123.partial").touch()
    (tmp_path / "a" / "file").touch()
    assert partial_files(tmp_path) == [tmp_path / "a" / "b" / ".file.0123.partial"]


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["exchange", "moved aside"])
def _way(request, monkeypatch):
    """Both ways to replace a folder: in one step, or in two where the file system has none."""
    if request.param == "moved aside":
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)


@pytest.mark.usefixtures("_way")
def test_a_folder_is_whole_or_as_it_was(tmp_path):
    target = tmp_path / "deep" / "model"
    with whole_folder(target) as fresh:
        assert fresh.name == target.name
        (fresh / "a").mkdir()
        (fresh / "a" / "one").write_bytes(b"1")
        assert not target.exists()
    assert files(target) == {"a/one": b"1"}
    with pytest.raises(ExistsError), whole_folder(target):
        pass
    with pytest.raises(RuntimeError), whole_folder(target, overwrite=True) as fresh:
        (fresh / "two").touch()
        raise RuntimeError
    assert files(target) == {"a/one": b"1"}
    with whole_folder(target, overwrite=True) as fresh:
        (fresh / "two").write_bytes(b"2")
    assert files(target.parent) == {"model/two": b"2"}
    remove_whole(target)
    assert list(target.parent.iterdir()) == []


def test_a_failed_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    rename, target = Path.rename, tmp_path / "model"
    target.mkdir()
    (target / "old").touch()

    def fail_for_the_new_one(path, to):
        if to == target and path.name == target.name:
            raise OSError("no such luck")
        return rename(path, to)

    monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="no such luck"), whole_folder(target, overwrite=True) as fresh:
        (fresh / "new").touch()
    assert files(tmp_path) == {"model/old": b""}


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(ExistsError), whole_folder(target) as fresh:
        (fresh / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert files(tmp_path) == {"model/theirs": b""}


def killed(target, when):
    """Save a folder in a process that is killed: while it fills it, or while the old one is moved aside."""
    if when == "replacing":
        durable._exchange = lambda one, other: False
        rename = Path.rename

        def rename_once(path, to):
            rename(path, to)
            os.kill(os.getpid(), signal.SIGKILL)

        Path.rename = rename_once
    with whole_folder(target, overwrite=True) as fresh:
        (fresh / "new").write_bytes(b"new")
        if when == "filling":
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("when", ["filling", "replacing"])
def test_the_next_save_tidies_up_after_a_killed_one_and_lets_live_ones_be(tmp_path, when):
    target = tmp_path / "model"
    with whole_folder(target) as fresh:
        (fresh / "old").write_bytes(b"old")
    process = multiprocessing.get_context("fork").Process(target=killed, args=(target, when))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == (2 if when == "filling" else 1)
    with scratch_folder(target) as live:
        assert files(target) == {"old": b"old"}
        with pytest.raises(RuntimeError), whole_folder(target, overwrite=True):
            assert live.is_dir()
            raise RuntimeError
        assert live.is_dir()
        assert len(list(tmp_path.iterdir())) == 2
    assert files(tmp_path) == {"model/old": b"old"}


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("points_to", ["a folder", "nothing"])
def test_a_link_at_the_target_is_replaced_and_what_it_points_to_stays(tmp_path, points_to):
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "out" / "model"
    target.parent.mkdir()
    if points_to == "a folder":
        elsewhere.mkdir()
        (elsewhere / "precious").write_bytes(b"1")
    target.symlink_to(elsewhere)
    with pytest.raises(ExistsError), whole_folder(target):
        pass
    with whole_folder(target, overwrite=True) as fresh:
        (fresh / "new").write_bytes(b"2")
    assert not target.is_symlink()
    assert files(target.parent) == {"model/new": b"2"}
    assert not elsewhere.exists() or files(elsewhere) == {"precious": b"1"}
