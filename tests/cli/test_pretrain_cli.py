import pytest
import torch
import yaml

from muvit.cli import main
from muvit.data.synthetic.images import SyntheticConfig, write_synthetic
from muvit.mae import MuViTMAE2d
from muvit.models.encoder import EncoderConfig
from muvit.models.mae import MAEConfig, MuViTMAE
from muvit.models.segmenter import Segmenter
from muvit.settings import read_settings
from muvit.training.recipes import PretrainRecipe

SIZES = ["patch_size=4", "dim=16", "num_layers=2", "heads=2"]

ENCODER = {"in_channels": 1, "levels": [1, 4], "patch_size": 4, "dim": 16, "num_layers": 2, "heads": 2}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_synthetic(folder / "set", num_train=1, num_val=1, num_test=1, config=SyntheticConfig.small(), workers=1)
    settings = {
        "data": {
            "train": str(folder / "set" / "train"),
            "val": str(folder / "set" / "val"),
            "crop_size": 16,
            "samples_per_epoch": 8,
            "val_samples": 2,
            "batch_size": 4,
        },
        "model": {"encoder": ENCODER, "dim_decoder": 16},
        "run": {"epochs": 1, "accelerator": "cpu", "progress": False, "pictures": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


def test_precision_is_a_setting(recipe, tmp_path):
    """As on a GPU, on a machine without one."""
    half = ["--run.precision", "bf16-mixed", "--run.accelerator", "cpu"]
    pretrain, train = (
        [verb, "--config", str(recipe), "--output", str(tmp_path / verb)] for verb in ("pretrain", "train")
    )
    assert main([*pretrain, *half]) == 0
    settings = yaml.safe_load(recipe.read_text()) | {"model": {"num_classes": 3, "decoder_widths": [8, 8, 4]}}
    for name in ("in_channels=1", "levels=[1,4]", *SIZES):
        key, value = name.split("=")
        settings["model"].setdefault("encoder", {})[key] = yaml.safe_load(value)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    assert main([*train[:2], str(tmp_path / "train.yaml"), *train[3:], *half]) == 0
    for run in ("pretrain", "train"):
        assert yaml.safe_load((tmp_path / run / "recipe.yaml").read_text())["run"]["precision"] == "bf16-mixed"
    assert main([*pretrain, "--overwrite", "--run.precision", "8-mixed"]) in (1, 2)


def test_pretraining_then_fine_tuning(recipe, tmp_path, capsys):
    run = ["pretrain", "--config", str(recipe), "--output", str(tmp_path / "pretrained")]
    assert main([*run, "--model.masking_ratio", "0.5", "--optim.ema_decay", "0.9"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "pretrained" / "best")
    assert MuViTMAE2d.from_folder(tmp_path / "pretrained").config.masking_ratio == 0.5
    assert main(run) == 1
    assert "--resume" in capsys.readouterr().err
    train = [f"--model.encoder.{setting}" for setting in (*SIZES, "in_channels=1", "levels=[1,4]")]
    data = yaml.safe_load(recipe.read_text())["data"]
    train += [f"--data.{name}={data[name]}" for name in ("train", "samples_per_epoch", "batch_size")]
    train += ["--data.crop_size=32", "--model.num_classes=3", "--model.decoder_widths=[8,8,4]", "--model.stem_width=4"]
    train += ["--run.epochs=1", "--run.accelerator=cpu", "--run.progress=false"]
    start = [f"--init.encoder={tmp_path / 'pretrained'}", "--init.mode=frozen"]
    assert main(["train", "--output", str(tmp_path / "tuned"), *train, *start]) == 0
    tuned = Segmenter.from_folder(tmp_path / "tuned").encoder.state_dict()
    for name, tensor in MuViTMAE2d.from_folder(tmp_path / "pretrained").encoder.state_dict().items():
        assert torch.equal(tuned[name], tensor)


def test_recipes_of_earlier_versions_are_read(recipe, tmp_path):
    settings = yaml.safe_load(recipe.read_text())
    flat = ENCODER | {"dim_decoder": 16, "input_space": "real", "masking_ratio": 0.5}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(settings | {"model": flat}))
    run = ["pretrain", "--config", str(tmp_path / "old.yaml"), "--output", str(tmp_path / "run")]
    assert main([*run, "--run.pictures", "0", "--model.encoder.rotary_base", "50"]) == 0
    config = MuViTMAE.from_folder(tmp_path / "run").config
    assert config == MAEConfig(encoder=EncoderConfig(**ENCODER, rotary_base=50), dim_decoder=16, masking_ratio=0.5)
    old = read_settings(tmp_path / "old.yaml", PretrainRecipe)
    assert old.model.encoder == EncoderConfig(**ENCODER)
    # a run that an earlier version began is recognised as the same
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    encoder = written["model"].pop("encoder") | {"input_space": "real"}
    for name in ("rotary_param", "coarse_copies", "fixed_positions"):  # which masked autoencoders had no choice of
        del encoder[name]
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(written | {"model": encoder | written["model"]}))
    more = ["--run.pictures", "0", "--model.encoder.rotary_base", "50", "--resume", "--run.epochs", "2"]
    assert main([*run, *more]) == 0


def test_settings_that_do_not_fit_are_refused(recipe, tmp_path, capsys):
    run = ["pretrain", "--config", str(recipe), "--output", str(tmp_path / "run")]
    assert main([*run, "--model.masking_ratio", "2"]) in (1, 2)
    assert "masking_ratio" in capsys.readouterr().err
    assert main([*run, "--model.encoder.levels", "[1, 3.5]"]) == 1
    assert main([*run, "--model.depth", "3"]) == 2
    assert not (tmp_path / "run").exists()


def test_help_tells_every_setting(capsys):
    assert main(["pretrain", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "Share of all tokens that is masked",
        "Random crops per epoch",
        "exponential moving average",
    ):
        assert words in text
    assert "ignore_labels" not in text
