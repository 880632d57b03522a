import json

import pytest

from muvit.cli import main
from muvit.data.folders import open_labelled_folder


@pytest.mark.parametrize(
    ("kind", "levels"), [("volumes", (1, (1, 2, 2), (2, 4, 4))), ("free", (1, 4)), ("scattered", (1, 2, 4, 8))]
)
def test_every_kind_is_written(kind, levels, tmp_path, capsys):
    command = ["synthetic", "--kind", kind, "--train", "1", "--val", "0", "--test", "1", "--seed", "3"]
    assert main([*command, "--output", str(tmp_path / "data")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "data")
    for split in ("train", "test"):
        ((image, label),) = open_labelled_folder(tmp_path / "data" / split)
        assert image.levels == label.levels == levels
    record = json.loads((tmp_path / "data" / "synthetic.json").read_text())
    assert (record["kind"], record["config"]["seed"]) == (kind, 3)
    assert main([*command, "--output", str(tmp_path / "data")]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--kind", "free", "--size_px", "512"],
            "--size_px and --workers: expected --kind rings or scattered, got --kind free",
        ),
        (["--kind", "volumes", "--workers", "2"], "--size_px and --workers"),
        (["--kind", "volumes", "--seed", "-1"], "config.seed"),
        (["--kind", "free", "--train", "0", "--val", "0", "--test", "0"], "expected at least one image, got 0 of each"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message, tmp_path, capsys):
    assert main(["synthetic", *options, "--output", str(tmp_path / "data")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
