from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import yaml
from torch import nn

import muvit.models.folder
from muvit.errors import CheckpointError, ExistsError
from muvit.models.encoder import EncoderConfig, MuViTEncoder
from muvit.models.folder import CONFIG, FolderModel, fingerprint, load_into, load_settings, load_weights, save_folder

SIZES = {"in_channels": 1, "levels": (1, 4), "patch_size": 4, "dim": 16, "num_layers": 2, "heads": 1}


@dataclass(frozen=True, kw_only=True)
class LineConfig:
    kind: ClassVar[str] = "line"
    width: int


class Line(FolderModel):
    config: LineConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(config.width, 1)


def line(width):
    return Line(LineConfig(width=width))


def encoder_of(**changes):
    return MuViTEncoder(EncoderConfig(**SIZES | changes))


@pytest.fixture
def folder(tmp_path):
    line(3).save(tmp_path / "line")
    return tmp_path / "line"


def test_a_model_comes_back_from_its_folder(tmp_path):
    model = line(3)
    model.save(tmp_path / "deep" / "line", extra_files={"note.txt": "kept"})
    back = Line.from_folder(tmp_path / "deep" / "line")
    assert back.config == model.config
    assert torch.equal(back.linear.weight, model.linear.weight)
    assert torch.equal(back.linear.bias, model.linear.bias)
    names = sorted(f.name for f in (tmp_path / "deep" / "line").iterdir())
    assert names == ["config.yaml", "model.safetensors", "note.txt"]
    assert (tmp_path / "deep" / "line" / "note.txt").read_text() == "kept"


def test_the_configuration_is_plain_yaml(tmp_path):
    encoder_of().save(tmp_path / "encoder")
    text = (tmp_path / "encoder" / "config.yaml").read_text()
    assert "!" not in text
    assert yaml.safe_load(text)["levels"] == [1, 4]
    assert text.startswith("format: 2\nkind: encoder\n")


def test_nothing_is_overwritten_unasked(folder):
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(ExistsError, match="exists already and is not overwritten"):
        line(4).save(folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_overwriting_replaces_the_whole_folder(folder):
    (folder / "stale.txt").touch()
    line(4).save(folder, overwrite=True)
    assert Line.from_folder(folder).config.width == 4
    assert not (folder / "stale.txt").exists()
    assert [f.name for f in folder.parent.iterdir()] == ["line"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_what_was_there(folder, monkeypatch, exists):
    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(muvit.models.folder, "save_file", full_disk)
    target = folder if exists else folder.parent / "new"
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(OSError, match="no space left"):
        save_folder(target, {"width": 4}, {"linear.weight": torch.zeros(1, 4)}, overwrite=True)
    assert sorted(folder.parent.rglob("*")) == before
    assert Line.from_folder(folder).config.width == 3


def test_a_folder_without_a_model_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=r"a model folder that holds config\.yaml and model\.safetensors"):
            Line.from_folder(path)


@pytest.mark.parametrize(
    "text", ["width: [1", "- 1\n- 2\n", "just words", "", b"\xff\xfe\x00\x80".decode("latin-1"), "width: \x07"]
)
def test_a_broken_configuration_is_refused(folder, text):
    (folder / "config.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.yaml: expected"):
        Line.from_folder(folder)


@pytest.mark.parametrize(
    "tag",
    [
        '!!python/object/apply:pathlib.Path.touch ["{proof}"]',
        '!!python/object/apply:os.system ["touch {proof}"]',
        '!!python/object/new:subprocess.Popen [["touch", "{proof}"]]',
        "!!python/name:os.system",
        "!!python/module:antigravity",
    ],
)
def test_yaml_that_would_run_code_is_refused_and_runs_nothing(folder, tag):
    proof = folder.parent / "proof"
    (folder / "config.yaml").write_text(f"width: {tag.format(proof=proof)}\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml: expected plain YAML"):
        Line.from_folder(folder)
    assert not proof.exists()


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_weights_are_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a readable safetensors file"):
        Line.from_folder(folder)


def test_a_pickle_in_place_of_the_weights_is_refused(folder):
    torch.save({"linear.weight": torch.zeros(1, 3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="readable safetensors file"):
        Line.from_folder(folder)


def test_missing_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Line.from_folder(folder)


@pytest.mark.parametrize("settings", [{}, {"width": 3, "height": 2}, {"width": "three"}, {"width": None}, {1: 2}])
def test_settings_of_another_model_are_refused(folder, settings):
    (folder / CONFIG).write_text(yaml.safe_dump({"format": 2, "kind": "line"} | settings))
    with pytest.raises(CheckpointError, match="line: expected settings of LineConfig"):
        Line.from_folder(folder)


@pytest.mark.parametrize("kind", ["encoder", "none", None, 3])
def test_another_kind_is_refused(folder, kind):
    (folder / CONFIG).write_text(yaml.safe_dump({"format": 2, "kind": kind, "width": 3}))
    with pytest.raises(CheckpointError, match=f"expected a model of kind line, got one of kind {kind}"):
        Line.from_folder(folder)


@pytest.mark.parametrize("version", [3, -1, "two", None, [2]])
def test_folders_of_unknown_formats_are_refused(folder, version):
    (folder / CONFIG).write_text(yaml.safe_dump({"format": version, "kind": "line", "width": 3}))
    with pytest.raises(CheckpointError, match=r"line: expected a model folder of a format up to 2, got format"):
        Line.from_folder(folder)


def test_the_fingerprint_tells_weights_and_settings_apart():
    torch.manual_seed(0)
    first, twin = line(3), line(3)
    assert fingerprint(first) != fingerprint(twin)
    twin.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(twin)
    coarse = encoder_of(levels=(1, 8))
    coarse.load_state_dict((fine := encoder_of()).state_dict())
    assert fingerprint(coarse) != fingerprint(fine)


@pytest.mark.parametrize(
    "changes", [{"dim": -1}, {"attention_mode": "wild"}, {"levels": "all"}, {"patch_size": [4, 4, 4]}, {"heads": 5}]
)
def test_settings_that_no_model_can_have_are_refused_with_the_name_of_the_folder(tmp_path, changes):
    encoder = encoder_of()
    encoder.save(tmp_path / "encoder")
    config = {"format": 2, "kind": "encoder"} | load_settings(tmp_path / "encoder")[1] | changes
    (tmp_path / "encoder" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match=str(tmp_path / "encoder")):
        MuViTEncoder.from_folder(tmp_path / "encoder")


def test_weights_must_have_the_same_names_and_shapes():
    model, state = line(3), line(3).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for wrong, message in (
        ({"linear.weight": state["linear.weight"]}, r"linear\.bias missing"),
        (state | {"linear.weight": torch.zeros(1, 4)}, r"linear\.weight \(1, 4\)"),
        (state | {"other": torch.zeros(1)}, "other unexpected"),
        ({"encoder." + name: value for name, value in state.items()}, "and 1 more"),
    ):
        with pytest.raises(CheckpointError, match=f"file: expected weights of Line, got .*{message}"):
            load_into(model, wrong, "file")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", ["shared", "per_layer", "fixed", "none"])
def test_frequencies_that_layers_share_are_shared_again(tmp_path, mode):
    torch.manual_seed(0)
    encoder = encoder_of(rotary_mode=mode)
    encoder.save(tmp_path / "encoder")
    back = MuViTEncoder.from_folder(tmp_path / "encoder")
    ropes = [block.rotary_pos_embs for block in back.layers]
    assert (ropes[0] is ropes[1]) == (mode != "per_layer")
    img = torch.randn(1, 2, 1, 8, 8)
    assert torch.equal(back(img)[0], encoder(img)[0])


def test_weights_keep_their_types(tmp_path):
    state = {"half": torch.ones(2).bfloat16(), "count": torch.tensor([3]), "slice": torch.arange(6.0)[::2]}
    save_folder(tmp_path / "mixed", {}, state, overwrite=False)
    back = load_weights(tmp_path / "mixed")
    assert {name: value.dtype for name, value in back.items()} == {n: v.dtype for n, v in state.items()}
    assert all(torch.equal(back[name], state[name]) for name in state)
