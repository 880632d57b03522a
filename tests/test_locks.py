import errno
import logging
import os
from pathlib import Path

import pytest

from muvit import locks
from muvit.errors import InputError
from muvit.locks import OutputLock, sole_writer


def test_one_process_writes_an_output_at_a_time(tmp_path):
    output = tmp_path / "run"
    writing = f"no other process is writing, got one that process {os.getpid()} on"
    with sole_writer(output):
        with pytest.raises(InputError, match=writing), sole_writer(output, wait_s=0):
            raise AssertionError
        assert not OutputLock(output).acquire()
    assert list(tmp_path.iterdir()) == []
    with sole_writer(output):
        pass


def test_the_folder_that_one_stands_in_can_be_locked(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    with sole_writer(Path()), sole_writer(Path("..")):
        assert not OutputLock(tmp_path / "run").acquire()
        assert not OutputLock(tmp_path).acquire()
    with OutputLock(tmp_path / "run").require(), OutputLock(tmp_path).require():
        pass


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_what_cannot_be_locked_is_written_with_a_warning(tmp_path, monkeypatch, caplog, reason):
    def refuse(*_):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(locks.os, "open", refuse)
    with caplog.at_level(logging.WARNING), sole_writer(tmp_path / "run"):
        pass
    assert f"run cannot be locked ([Errno {reason}]" in caplog.text and "see to it that no other" in caplog.text


def test_file_systems_without_locks_are_written_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), sole_writer(tmp_path / "run"):
        pass
    assert "cannot be locked" in caplog.text and "No locks available" in caplog.text


def test_other_errors_of_a_disk_are_not_hidden(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(locks.os, "open", refuse)
    with pytest.raises(OSError, match="Input/output error"), sole_writer(tmp_path / "run"):
        raise AssertionError
