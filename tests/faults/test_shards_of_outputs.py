"""Outputs that have lost a part: every command that reads them says so in one sentence, and ends with exit code 1."""

import shutil

import pytest
from tiny_prediction import hashes, make_model_and_image, predict

from muvit.cli import main
from muvit.errors import ReadError
from muvit.inference.run.label_blocks import prediction_status


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_model_and_image(folder)
    assert predict(folder, folder / "whole") == 0
    return folder


@pytest.fixture
def output(work, tmp_path):
    """A copy of the complete prediction."""
    shutil.copytree(work / "whole", tmp_path / "whole")
    return tmp_path / "whole"


def refusal(capfd, *command):
    """The sentence of a command that refuses."""
    capfd.readouterr()
    assert main([str(part) for part in command]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_prediction_without_one_of_its_shards_is_refused_by_all(work, output, tmp_path, capfd):
    labels, image = output / "image.ome.zarr", work / "image.ome.zarr"
    shard = labels / "0" / "c" / "1" / "0"
    shard.unlink()
    complaint = f"muvit: {shard}: expected a shard of "
    for command in (
        ("evaluate", labels, work / "whole" / "image.ome.zarr", "--output", tmp_path / "scores"),
        ("evaluate", work / "whole" / "image.ome.zarr", labels, "--output", tmp_path / "scores"),
        ("export", labels, "--image", image, "--output", tmp_path / "exported"),
        ("convert", labels, "--output", tmp_path / "converted", "--kind", "label"),
        ("info", labels),
        ("predict", work / "model", image, "--output", output, "--status"),
    ):
        assert refusal(capfd, *command).startswith(complaint)
    with pytest.raises(ReadError, match="nothing there"):
        prediction_status(labels)
    assert predict(work, output) == 1
    assert "Begin the output anew (--overwrite), or restore it from a copy." in capfd.readouterr().err
    assert predict(work, output, "--overwrite") == 0
    assert hashes(output) == hashes(work / "whole")


def test_a_missing_store_of_a_prediction_is_noticed(work, output, capfd):
    shutil.rmtree(output / "image.probabilities.ome.zarr")
    assert predict(work, output) == 1
    assert "image.probabilities.ome.zarr: expected a store of the output, got none" in capfd.readouterr().err


def test_an_image_without_one_of_its_shards_is_refused_before_any_work(work, tmp_path, capfd):
    shutil.copytree(work / "image.ome.zarr", tmp_path / "image.ome.zarr")
    (tmp_path / "image.ome.zarr" / "1" / "c" / "0" / "0" / "0").unlink()
    said = refusal(
        capfd, "predict", work / "model", tmp_path / "image.ome.zarr", "--output", tmp_path / "out", "--device", "cpu"
    )
    assert "1/c/0/0/0: expected a shard of" in said
    assert not (tmp_path / "out").exists()


def test_verify_reads_every_byte(work, output, capfd):
    assert predict(work, output, "--verify") == 0
    assert "verified" in capfd.readouterr().err
    shard = output / "image.probabilities.ome.zarr" / "0" / "c" / "0" / "1" / "1"
    content = shard.read_bytes()
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert predict(work, output) == 0
    assert predict(work, output, "--verify") == 1
    assert f"{shard}: expected the bytes that were written, got others" in capfd.readouterr().err


def test_features_that_have_lost_a_part_are_refused(work, tmp_path, capfd):
    command = ["features", work / "model", work / "image.ome.zarr", "--output", tmp_path / "f.zarr", "--device", "cpu"]
    command = list(map(str, command))
    assert main([*command, "--verify"]) == 0
    for part, got in (("level_4/0/c/0/0/0", "a shard of"), ("pooled.csv", "the table that was written")):
        file = tmp_path / "f.zarr" / part
        content = file.read_bytes()
        file.unlink()
        assert f"{file}: expected {got}" in refusal(capfd, *command)
        file.write_bytes(content)
    assert main(command) == 0
