import errno
import os
import sys
from pathlib import Path

import pytest

from muvit.durable import make_folder, partial_files, write_whole


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
