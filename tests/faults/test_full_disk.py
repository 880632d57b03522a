"""A full file system ends a verb in one sentence; when there is room, the same command ends with equal bytes."""

import errno
import resource
import shutil
import subprocess

import numpy as np
import pytest
import torch
from tifffile import imwrite
from verbs import VERBS, Workshop, result

from muvit.cli import main
from muvit.data.slides.open import open_slide
from muvit.models.encoder import EncoderConfig, MuViTEncoder
from muvit.training.resume import write_state


@pytest.fixture
def _small_files():
    """No file may grow beyond 100,000 bytes, by a limit of the operating system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_small_files")
def test_a_conversion_is_one_sentence_and_can_be_repeated(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400), dtype=np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before[1], before[1]))
    imwrite(tmp_path / "a.tif", pixels)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    command = ["convert", str(tmp_path / "a.tif"), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert capsys.readouterr().err.strip().endswith("File too large.")
    assert list((tmp_path / "out").iterdir()) == []
    resource.setrlimit(resource.RLIMIT_FSIZE, (before[1], before[1]))
    assert main(command) == 0
    np.testing.assert_array_equal(open_slide(tmp_path / "out" / "a.ome.zarr").read(1, (0, 0), (400, 400))[0], pixels)


@pytest.mark.usefixtures("_small_files")
def test_models_and_states_name_their_file(tmp_path):
    config = EncoderConfig(in_channels=1, levels=(1, 4), dim=64, num_layers=2, heads=2)
    with pytest.raises(OSError, match="File too large") as error:
        MuViTEncoder(config).save(tmp_path / "model")
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(tmp_path / "model"))
    with pytest.raises(OSError, match="File too large") as error:
        write_state(tmp_path / "resume" / "last.ckpt", {"weights": torch.zeros(50_000)})
    assert error.value.filename == str(tmp_path / "resume" / "last.ckpt")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop") / "workshop")


@pytest.fixture
def disk(tmp_path):
    """A function that makes a file system of its own of a size, or enlarges it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size):
        options = "remount," if folder.is_mount() else ""
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"{options}size={size}", "tmpfs", folder], check=True)
        return folder

    yield resize
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.long
@pytest.mark.parametrize("share", [0.15, 0.6])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_goes_on_when_there_is_room(workshop, disk, tmp_path, verb, share):
    """Needs the right to mount a file system."""
    whole = workshop.call(verb, tmp_path / "whole")
    assert whole.code == 0, whole.said
    size = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    output = disk(max(int(share * size), 8192)) / "out"
    full = workshop.call(verb, output)
    assert full.code == 1
    assert "No space left on device" in full.said and "Traceback" not in full.said, full.said
    disk("1g")
    again = workshop.call(verb, output)
    assert again.code == 0, again.said
    assert result(verb, output) == result(verb, tmp_path / "whole")
    shutil.rmtree(output)
