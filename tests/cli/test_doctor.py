import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from muvit.cli import doctor, main
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.pyramids.writer import PyramidWriter
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import TrainedModel


@pytest.fixture(scope="module")
def trained():
    encoder = EncoderConfig(in_channels=1, levels=(1, 4), dim=16, num_layers=3, heads=1)
    config = SegmenterConfig(encoder=encoder, num_classes=2, decoder_widths=(4, 4, 4, 4), stem_width=4)
    preprocessing = Preprocessing(
        crop_size=(16, 16),
        normalization=Range(low=0, high=255),
        class_names=("background", "cell"),
        class_colors=((0, 0, 0), (255, 0, 0)),
    )
    return TrainedModel(model=Segmenter(config), preprocessing=preprocessing)


def write_image(path, *, pixel_size_um=(0.5, 0.5)):
    writer = PyramidWriter.create(
        path, shape=(80, 90), num_channels=1, dtype=np.uint8, levels=(1, 4), pixel_size_um=pixel_size_um
    )
    writer.write((0, 0), np.random.default_rng(0).integers(1, 255, (1, 80, 90), dtype=np.uint8))
    writer.finish()
    return path


def faults(out):
    return [line.split("!!", 1)[1].strip() for line in out.splitlines() if line.startswith("  !!")]


def test_what_is_sound_is_said_to_be(trained, tmp_path, capsys):
    trained.save(tmp_path / "model")
    image = write_image(tmp_path / "a.ome.zarr")
    assert main(["doctor", str(tmp_path / "model"), str(image)]) == 0
    out = capsys.readouterr().out
    assert faults(out) == []
    assert out.splitlines()[-1] == "Nothing is wrong."
    assert "  ok  model of kind muvit, 0.01 M parameters" in out
    assert "  ok  80 x 90 px, 1 channels, uint8, levels 1, 4" in out
    assert "  ok  pixel size 0.5 x 0.5 um" in out


def test_a_changed_byte_is_found_by_its_checksum(tmp_path, capsys):
    image = write_image(tmp_path / "a.ome.zarr")
    assert main(["doctor", str(image), "--verify"]) == 0
    assert "  ok  every byte is as it was written" in capsys.readouterr().out
    shard = image / "1" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    assert main(["doctor", str(image), "--verify"]) == 1
    assert str(shard) in capsys.readouterr().out


def test_every_fault_is_named_with_a_remedy(trained, tmp_path, capsys, monkeypatch):
    diverged = Segmenter(trained.model.config)
    with torch.no_grad():
        next(diverged.parameters()).fill_(float("nan"))
    replace(trained, model=diverged).save(tmp_path / "diverged")
    trained.save(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    write_image(tmp_path / "unknown.ome.zarr", pixel_size_um=None)
    shutil.copytree(write_image(tmp_path / "whole.ome.zarr"), tmp_path / "broken.ome.zarr")
    for file in (file for file in (tmp_path / "broken.ome.zarr").rglob("c/**/*") if file.is_file()):
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 0xFF
        file.write_bytes(content)
    versions = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: {"torch": "1.0", "tqdm": None}.get(name, versions(name)))
    names = ["diverged", "cut", "unknown.ome.zarr", "broken.ome.zarr", "missing.tif"]
    assert main(["doctor", *(str(tmp_path / name) for name in names)]) == 1
    captured = capsys.readouterr()
    told = faults(captured.out)
    expected = [
        "torch 1.0 is installed, torch>=2.10 needed",
        "tqdm is not installed",
        "weights that are not finite",
        f"{tmp_path / 'cut'}",
        "the pixel size is unknown",
        "windows cannot be read",
        "got nothing there",
    ]
    assert len(told) == len(expected)
    for line, words in zip(told, expected, strict=True):
        assert words in line
    lines = captured.out.splitlines()
    assert all(lines[n + 1].startswith("      ") for n, line in enumerate(lines) if line.startswith("  !!"))
    assert captured.err == "muvit: 7 things are wrong: see the lines with !!\n"


def test_a_device_that_computes_wrong_is_found(monkeypatch):
    right = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: right(a, b) + a.is_floating_point())
    (finding,) = doctor._check_product(torch.device("cpu"))
    assert (finding.text, bool(finding.remedy)) == ("cpu computes wrong results", True)
