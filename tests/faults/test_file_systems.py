"""Network file systems that lack locks, the exchange of two names, or the flushing of folders."""

import ctypes
import errno
import fcntl
import os
import stat

import pytest
from tiny_prediction import hashes, make_model_and_image, predict

from muvit.models.encoder import EncoderConfig, MuViTEncoder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_model_and_image(folder)
    assert predict(folder, folder / "whole") == 0
    return folder


@pytest.mark.parametrize(("number", "part"), [(errno.ENOLCK, []), (errno.EOPNOTSUPP, ["--part", "1/2"])])
def test_a_file_system_without_locks_is_refused(work, tmp_path, monkeypatch, capfd, number, part):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    capfd.readouterr()
    assert predict(work, tmp_path / "out", *part) == 1
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"muvit: {tmp_path / 'out' / 'image.ome.zarr'}: expected a file system with locks")
    assert f"got {os.strerror(number)}." in said
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def _no_flush_and_no_exchange(monkeypatch):
    fsync = os.fsync

    def of_files_only(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    class System:
        def renameat2(self, *_):
            ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(os, "fsync", of_files_only)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: System())


@pytest.mark.usefixtures("_no_flush_and_no_exchange")
def test_outputs_are_the_same_where_folders_are_neither_flushed_nor_exchanged(work, tmp_path):
    assert predict(work, tmp_path / "out") == 0
    assert predict(work, tmp_path / "out", "--overwrite") == 0
    assert hashes(tmp_path / "out") == hashes(work / "whole")
    model = MuViTEncoder(EncoderConfig(in_channels=1, levels=(1,), dim=16, num_layers=1, heads=1))
    for _ in range(2):
        model.save(tmp_path / "models" / "one", overwrite=True)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["one"]
    MuViTEncoder.from_folder(tmp_path / "models" / "one")
