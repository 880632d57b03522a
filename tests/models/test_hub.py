import numpy as np
import pytest
import torch
from fake_hub import fake_hub
from PIL import Image

from muvit import load_model
from muvit.cli import main
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.errors import CheckpointError, InputError
from muvit.models.card import ModelCard, read_card
from muvit.models.encoder import EncoderConfig
from muvit.models.hub import CARD, FILES, HubName, hub_name, push_model
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import load_encoder

PREPROCESSING = Preprocessing(
    crop_size=(16, 16), normalization=Range(high=255), class_names=("glass", "cell"), class_colors=((0, 0, 0),) * 2
)
FACTS = {"title": "cells", "kind": "muvit", "levels": (1, 4), "channels": 1, "parameters": 10, "classes": ("a", "b")}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with fake_hub(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    encoder = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=2, num_layers=1, dim=16, heads=2)
    model = Segmenter(SegmenterConfig(encoder=encoder, num_classes=2, decoder_widths=(8, 4), stem_width=4))
    card = ModelCard(**FACTS).to_markdown()
    model.save(tmp_path / "run" / "best", extra_files={"preprocessing.yaml": PREPROCESSING.to_yaml(), CARD: card})
    (tmp_path / "run" / "best" / "weights.ckpt").write_bytes(b"a pickle")
    return tmp_path / "run"


def test_a_pushed_model_is_used_by_its_name(hub, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(folder), "lab/cells", "--license", "cc-by-4.0", "--private", "--message", "first"]) == 0
    assert capfd.readouterr().out == f"{hub.address}/lab/cells\n"
    assert "private" in {key for pair in hub.asked[0].items() if pair[1] for key in pair}  # as key, or as visibility
    assert hub.asked[1]["summary"] == "first"
    assert set(hub.repos["lab/cells"]) == set(FILES)  # and nothing else of the folder
    assert hub.repos["lab/cells"][CARD].startswith(b"---\nlicense: cc-by-4.0\n")
    assert read_card(folder / "best").license == "cc-by-4.0"

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)).save("slide.png")
    own, found = load_model(folder), load_model("lab/cells")
    assert found.fingerprint == own.fingerprint == load_model("hf://lab/cells@main").fingerprint
    labels = [model.predict("slide.png", f"{name}.ome.zarr") for name, model in (("own", own), ("found", found))]
    pixels = [slide.read(1, (0, 0), (40, 50)) for slide in labels]
    np.testing.assert_array_equal(*pixels)
    assert labels[1].label_names == {0: "glass", 1: "cell"}
    assert found.predict("slide.png").path.name == "slide.labels.ome.zarr"
    assert main(["predict", "lab/cells", "slide.png", "--output", "predictions"]) == 0
    assert main(["predict", "hf://lab/cells", "slide.png", "--output", "predictions"]) == 0  # complete already
    torch.testing.assert_close(load_encoder("lab/cells").state_dict(), own.model.encoder.state_dict())


def test_what_the_hub_refuses_is_told(hub, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"lab/none: expected a model folder, or the name .* got no such folder"):
        load_model("lab/none")
    with pytest.raises(CheckpointError, match=r"others/cells: expected a name that you may write to"):
        push_model(folder / "best", "others/cells")
    with pytest.raises(InputError, match="expected organisation/model, got 'cells'"):
        push_model(folder / "best", "cells")
    (folder / "best" / CARD).unlink()
    with pytest.raises(CheckpointError, match=r"got no README\.md"):
        push_model(folder / "best", "lab/cells")
    assert hub.repos == {}


def test_names_of_the_hub_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub_name("lab/cells") == HubName("lab/cells", None)
    assert hub_name("lab/cells@v1.0") == HubName("lab/cells", "v1.0")
    assert hub_name(tmp_path / "lab/cells") is None
    assert [hub_name(path) for path in ("cells", "a/b/c", "../cells", "runs/frist", "lab/", "/lab/cells")] == [None] * 6
    assert hub_name("hf://runs/first") == HubName("runs/first", None)
    from pathlib import Path

    assert hub_name(Path("hf://lab/cells@abc")) == HubName("lab/cells", "abc")
    with pytest.raises(CheckpointError, match=r"runs/frist: expected a model folder that holds config\.yaml"):
        load_model("runs/frist")
