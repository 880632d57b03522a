import os
import pickle

import pytest
import torch
import yaml
from old_folders import BEHAVIOUR, ENCODERS, MAES, TINY, old_mae, write_old

from muvit.cli import main
from muvit.decoders import MuViTDecoder2d
from muvit.errors import CheckpointError
from muvit.mae import MuViTMAE2d, MuViTMAE3d
from muvit.models.encoder import EncoderConfig, MuViTEncoder
from muvit.models.folder import load_settings
from muvit.models.mae import MuViTMAE
from muvit.models.masking import draw_mask
from muvit.models.trained import load_encoder, load_network
from muvit.models.upgrade import convert_weights, is_format_0, upgrade_settings


@pytest.mark.parametrize(
    "ndim, changes",
    [
        (2, {}),
        (2, {"rotary_mode": "shared"}),
        (2, {"rotary_mode": "fixed", "decoder_mode": "multi_iso"}),
        (2, {"rotary_mode": "none", "decoder_mode": "single"}),
        (2, {"use_level_embed": False, "loss": "norm_mse", "masking_mode": (1.0, 2.0), "patch_size": (4, 2)}),
        (3, {"decoder_mode": "single"}),
        (4, {"dim_decoder": 32}),
    ],
)
def test_old_models_give_their_outputs(tmp_path, ndim, changes):
    torch.manual_seed(0)
    model = MAES[ndim](**TINY | {"dim_decoder": 16} | BEHAVIOUR | changes).eval()
    head_dims = {"encoder": 16, "decoder": model.config.dim_decoder // 2}
    folder = write_old(tmp_path / "old", model, head_dims)
    assert "!!python/tuple" in (folder / "config.yaml").read_text()
    assert is_format_0(folder)
    loaded = MAES[ndim].from_folder(folder).eval()
    assert loaded.config == model.config
    space = (8,) * ndim
    img = torch.rand(2, 2, 1, *space)
    lower = 50 * torch.rand(2, 2, 1, ndim)
    bbox = torch.cat([lower, lower + 8], 2)
    tokens = 2 * (img[0, 0].numel() // torch.tensor(model.config.encoder.patch).prod().item())
    mask = draw_mask(2, 2, tokens // 2)
    for boxes in (None, bbox):
        ours, theirs = (m(img, boxes, mask=mask, return_all=True) for m in (loaded, model))
        for name in ("loss", "reco", "encoded"):
            assert torch.equal(ours[name], theirs[name])
        assert torch.equal(load_network(folder, kind=MuViTMAE)(img, boxes, mask=mask)["loss"], theirs["loss"])


@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_old_encoders_give_their_outputs(tmp_path, ndim):
    torch.manual_seed(0)
    encoder = ENCODERS[ndim](**TINY, patch_spacing="corner").eval()
    loaded = ENCODERS[ndim].from_folder(write_old(tmp_path / "old", encoder, {"encoder": 16})).eval()
    img = torch.rand(1, 2, 1, *(8,) * ndim)
    assert loaded.config.patch_spacing == "corner"
    assert torch.equal(loaded(img)[0], encoder(img)[0])
    assert torch.equal(load_encoder(tmp_path / "old")(img)[0], encoder(img)[0])


def test_old_decoders_load(tmp_path):
    torch.manual_seed(0)
    decoder = MuViTDecoder2d(in_channels=8, dim=16, heads=2).eval()
    loaded = MuViTDecoder2d.from_folder(write_old(tmp_path / "old", decoder, {"encoder": 8})).eval()
    x, coords = torch.randn(1, 5, 8), torch.rand(1, 5, 2)
    assert torch.equal(loaded(x, coords), decoder(x, coords))


def test_loaded_models_behave_as_the_release_did(tmp_path):
    _, folder = old_mae(tmp_path / "old")
    config = MuViTMAE2d.from_folder(folder).config
    assert (config.encoder.patch_spacing, config.decoder_context, config.loss_average) == ("corner", "all", "token")
    assert config.share_masking_draw


@pytest.mark.parametrize("uses, mode", [(True, "per_layer"), (False, "none")])
def test_the_early_name_of_the_rotary_mode_is_understood(tmp_path, uses, mode):
    model, _ = old_mae(tmp_path / "new", rotary_mode=mode)
    folder = write_old(tmp_path / "old", model, {"encoder": 16, "decoder": 8}, use_rotary_embed=uses)
    config = yaml.load((folder / "config.yaml").read_text(), yaml.FullLoader)
    del config["rotary_mode"]
    (folder / "config.yaml").write_text(yaml.dump(config))
    assert MuViTMAE2d.from_folder(folder).config.encoder.rotary_mode == mode


def test_copies_of_shared_frequencies_beside_the_layers_are_passed_over():
    freq = torch.rand(4)
    state = {"encoder.rotary_pos_embs.0.inv_freq": freq, "encoder.layers.0.rotary_pos_embs.0.inv_freq": freq}
    assert list(convert_weights(state)) == ["encoder.layers.0.rotary_pos_embs.freq"]


def test_conversion_writes_our_format_with_what_reproduces_the_release(tmp_path, capsys):
    model, folder = old_mae(tmp_path / "old")
    assert main(["convert-checkpoint", str(folder), str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new")
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"config.yaml", "model.safetensors"}
    kind, config = load_settings(tmp_path / "new")
    assert kind == "mae"
    assert config["encoder"]["patch_spacing"] == "corner"
    assert (config["decoder_context"], config["loss_average"]) == ("all", "token")
    img, mask = torch.rand(2, 2, 1, 8, 8), draw_mask(2, 2, 4)
    converted = MuViTMAE2d.from_folder(tmp_path / "new").eval()
    assert torch.equal(converted(img, mask=mask)["loss"], model(img, mask=mask)["loss"])


def test_conversion_overwrites_only_when_asked(tmp_path, capsys):
    _, folder = old_mae(tmp_path / "old")
    target = tmp_path / "new"
    target.mkdir()
    (target / "precious").touch()
    assert main(["convert-checkpoint", str(folder), str(target)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert (target / "precious").exists()
    assert main(["convert-checkpoint", str(folder), str(target), "--overwrite"]) == 0
    assert (target / "model.safetensors").exists()


def test_conversion_refuses_what_is_no_model(tmp_path, capsys):
    model, _ = old_mae(tmp_path / "old")
    folder = write_old(tmp_path / "odd", model, {"encoder": 16, "decoder": 8}, ndim=5)
    assert main(["convert-checkpoint", str(folder), str(tmp_path / "new")]) == 1
    assert "ndim" in capsys.readouterr().err
    assert main(["convert-checkpoint", str(tmp_path), str(tmp_path / "new")]) == 1
    assert "config.yaml" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_todays_folders_say_what_they_are(tmp_path):
    encoder = MuViTEncoder(EncoderConfig(**TINY))
    encoder.save(tmp_path / "encoder")
    kind, settings = load_settings(tmp_path / "encoder")
    assert kind == "encoder"
    assert EncoderConfig(**settings) == encoder.config


@pytest.mark.parametrize(
    "values, kind, settings",
    [
        ({"in_channels": 1, "levels": [1], "input_space": "real"}, "encoder", {"in_channels": 1, "levels": [1]}),
        (
            {"in_channels": 1, "levels": [1], "decoder_mode": "multi", "input_space": "real", "dim_decoder": 8},
            "mae",
            {"encoder": {"in_channels": 1, "levels": [1]}, "decoder_mode": "multi", "dim_decoder": 8},
        ),
        ({"in_channels": 3, "attention_mode": "all"}, "decoder", {"in_channels": 3}),
        (
            {"encoder": {"dim": 8, "input_space": "real"}, "num_classes": 2, "decoder_widths": None},
            "muvit",
            {"encoder": {"dim": 8}, "num_classes": 2, "decoder_widths": "paper"},
        ),
        ({"encoder": {"dim": 8}, "pooling": "mean"}, "classifier", {"encoder": {"dim": 8}, "pooling": "mean"}),
        ({"network": "unet", "levels": [1]}, "baseline", {"network": "unet", "levels": [1]}),
        ({"backbone": "vit", "relay_tokens": 4}, "relay", {"backbone": "vit", "relay_tokens": 4}),
    ],
)
def test_settings_of_format_1_are_put_in_their_places(tmp_path, values, kind, settings):
    before = repr(values)
    assert upgrade_settings(values, tmp_path) == (kind, settings)
    assert upgrade_settings({"format": 1} | values, tmp_path) == (kind, settings)
    assert repr(values) == before


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_weights_that_would_run_code_are_refused_unrun(tmp_path):
    _, folder = old_mae(tmp_path / "old")
    trace = tmp_path / "trace"
    for write in (torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))):
        write({"mask_token": Bomb(trace)}, folder / "model.pth")
        with pytest.raises(CheckpointError, match=r"model\.pth"):
            MuViTMAE2d.from_folder(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system"]
)
def test_configurations_that_would_run_code_are_refused_unrun(tmp_path, tag):
    _, folder = old_mae(tmp_path / "old")
    trace = tmp_path / "trace"
    (folder / "config.yaml").write_text(f"levels: !!{tag} ['touch {trace}']\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        MuViTMAE2d.from_folder(folder)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"no weights", [1, 2], {"mask_token": 3}])
def test_damaged_weights_are_refused(tmp_path, content):
    _, folder = old_mae(tmp_path / "old")
    if isinstance(content, bytes):
        (folder / "model.pth").write_bytes(content)
    else:
        torch.save(content, folder / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        MuViTMAE2d.from_folder(folder)


def test_truncated_weights_are_refused(tmp_path):
    _, folder = old_mae(tmp_path / "old")
    whole = (folder / "model.pth").read_bytes()
    (folder / "model.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        MuViTMAE2d.from_folder(folder)


def test_another_dimensionality_is_refused(tmp_path):
    _, folder = old_mae(tmp_path / "old")
    with pytest.raises(CheckpointError, match="3D"):
        MuViTMAE3d.from_folder(folder)
