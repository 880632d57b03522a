from dataclasses import asdict, replace
from resource import RUSAGE_SELF, getrusage

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from muvit.cli import _parser, main
from muvit.errors import InputError, ReadError
from muvit.models.baselines import BaselineConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.folder import plain
from muvit.models.relay.config import RelayConfig
from muvit.models.segmenter import SegmenterConfig
from muvit.settings import read_settings, sentence, settings_from, yaml_mode
from muvit.training.recipes import DataConfig, Recipe

GIVEN = [
    "--data.train",
    "t",
    "--model.encoder.in_channels",
    "1",
    "--model.encoder.levels",
    "[1]",
    "--model.num_classes",
    "2",
]


def refusal(*arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe.of_kind("muvit"), as_group=False)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_args([*GIVEN, *arguments])
    return sentence(str(caught.value))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.decoder", "fpn"], "model.decoder: expected one of unetr, mask2former, got fpn"),
        (
            ["--model.encoder.attention_mode", "some"],
            "model.encoder.attention_mode: expected one of all, causal, same, random, coarse_to_fine, got some",
        ),
        (
            ["--init.encoder", "e", "--init.mode", "half"],
            "init.mode: expected one of full, frozen, lora, got half",
        ),
    ],
)
def test_a_wrong_choice_is_one_sentence_with_the_choices(arguments, said):
    assert refusal(*arguments) == said


def test_what_a_group_of_settings_refuses_is_told_by_its_own_sentence(capsys, tmp_path):
    wrong = ["--data.train", "t", "--model.kind", "swinunetr", "--model.width", "10"]
    assert main(["train", *wrong, "--output", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("muvit: width: expected a multiple of 12 for swinunetr, got 10")
    assert said.count("\n") == 1


WHOLE = "data: {train: t}\nmodel: {num_classes: 2, encoder: {in_channels: 1, levels: [1, 8]}}\n"


def test_a_file_gives_the_same_settings_as_the_command_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text(WHOLE + "run: {epochs: 7}\n")
    recipe = read_settings(tmp_path / "recipe.yaml", Recipe)
    parser = ArgumentParser()
    parser.add_class_arguments(Recipe.of_kind("muvit"), as_group=False)
    given = parser.parse_args([*GIVEN, "--model.encoder.levels", "[1, 8]", "--run.epochs", "7"])
    assert recipe == settings_from(given, Recipe)
    assert (recipe.run.epochs, recipe.model.encoder.levels) == (7, (1, 8))


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        (None, ReadError, "expected settings in YAML, got"),
        ("a: [", ReadError, "expected settings in YAML, got"),
        ("[1, 8]", InputError, r"expected settings of a Recipe, got \[1, 8\]"),
        ("data: {train: t}", InputError, "required: model.encoder.levels"),
        (WHOLE + "run: {epoch: 3}", InputError, r"run: there is no setting 'epoch'; did you mean epochs\?"),
        (WHOLE + "init: {encodr: e}", InputError, r"init: there is no setting 'encodr'; did you mean encoder\?"),
        (
            WHOLE + "optim: {nonsense: 1}",
            InputError,
            "optim: expected one of lr, encoder_lr_factor, .*, got 'nonsense'",
        ),
        (WHOLE + "optm.lr: 1", InputError, r"there is no setting 'optm'; did you mean optim\?"),
        (WHOLE + "loss: null", InputError, "loss: expected settings as name: value, got null"),
        (WHOLE.replace("{in_channels: 1, levels: [1, 8]}", "null"), InputError, "model.encoder: expected settings"),
        (WHOLE + "run: {epochs: 3, epochs: 4}", ReadError, "the key 'epochs' twice, at lines 3 and 3"),
        (WHOLE + "data: {train: u}", ReadError, "the key 'data' twice, at lines 1 and 3"),
        (WHOLE + "run: {epochs: " + "9" * 5000 + "}", ReadError, "expected settings in YAML, got Exceeds the limit"),
        (
            "data: {train: t}\nmodel: {kind: unett}",
            InputError,
            "model.kind: expected one of muvit, relay, .*'unett'",
        ),
        ("data: {train: t}\nmodel: {kind: unet, widht: 3}", InputError, r"'widht'; did you mean width\?"),
        ("data: {train: t}\nmodel: {kind: unet, decoder: unetr}", InputError, "model: there is no setting 'decoder'"),
        ("data: {train: t}\nmodel: {kind: relay, levels: [1]}", InputError, "required: model.backbone"),
    ],
)
def test_settings_of_a_file_that_do_not_fit_are_told(tmp_path, text, error, said):
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(error, match=said):
        read_settings(file, Recipe)


def test_aliases_and_paths_of_settings_are_read(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        WHOLE + "loss: &loss {ce_weight: 2}\noptim.lr: 3.0e-4\nrun: {<<: {epochs: 7}}\n"
    )
    recipe = read_settings(tmp_path / "recipe.yaml", Recipe)
    assert (recipe.loss.ce_weight, recipe.optim.lr, recipe.run.epochs) == (2, 3e-4, 7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.encoder.dim: 10000000", "model: expected a model of at most 50 billion parameters"),
        ("model.encoder.num_layers: 1000000000", "model: expected a model of at most 50 billion parameters"),
        ("model.num_classes: 1000000000", "model: expected a model of at most 50 billion parameters"),
        ("data.crop_size: 1099511627776", "data.crop_size and data.batch_size: expected batches of at most"),
        ("run.seed: 1180591620717411303424", r"run.seed: expected a whole number >= 0 and < 4.29497e\+09"),
    ],
)
def test_sizes_that_no_machine_holds_are_refused_without_touching_memory(tmp_path, change, said):
    file = tmp_path / "recipe.yaml"
    file.write_text(WHOLE + change)
    before = getrusage(RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=said):
        read_settings(file, Recipe)
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_other_messages_are_only_brought_into_one_line():
    assert sentence("one\n  two") == "one two"


OLDER = [
    ("{context: random, free_views: null}", {"placement": "nested", "free_views": None}),
    ("{context: centered}", {"placement": "concentric"}),
    ("{free_views: {offset_px: [[-8, 8], [0, 0]]}}", {"placement": "free"}),
    ("{placement: grid}", {"placement": "grid"}),
]


@pytest.mark.parametrize(("older", "expected"), OLDER)
def test_older_spellings_of_a_recipe_are_read(tmp_path, older, expected):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(WHOLE) | {"data": {"train": "t"} | yaml.safe_load(older)}))
    data = read_settings(file, Recipe).data
    assert {name: getattr(data, name) for name in expected} == expected
    parser = ArgumentParser(exit_on_error=False, parser_mode=yaml_mode(Recipe))
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Recipe.of_kind("muvit"), as_group=False)
    arguments = parser.parse_args(["--config", str(file), "--data.batch_size", "2"])
    assert settings_from(arguments, Recipe).data == replace(data, batch_size=2)


def test_old_and_new_spelling_together_are_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(WHOLE.replace("train: t", "train: t, placement: grid, context: random"))
    with pytest.raises(InputError, match="context"):
        read_settings(tmp_path / "recipe.yaml", Recipe)


VIEWS = {"in_channels": 1, "num_classes": 2, "levels": (1, 8)}
BESIDE = [
    ("baseline: {network: unet, width: null}", BaselineConfig(kind="unet", **VIEWS | {"levels": (1,)})),
    ("baseline: {network: unet, views: stacked, levels: null}", BaselineConfig(kind="unet", **VIEWS)),
    ("relay: {backbone: vit, relay_tokens: 2}\nbaseline: null", RelayConfig(backbone="vit", relay_tokens=2, **VIEWS)),
    ("relay: {backbone: vit, levels: [1]}", RelayConfig(backbone="vit", **VIEWS | {"levels": (1,)})),
    (
        "relay: null\nbaseline: null",
        SegmenterConfig(encoder=EncoderConfig(in_channels=1, levels=(1, 8)), num_classes=2),
    ),
]


@pytest.mark.parametrize(("section", "model"), BESIDE)
def test_a_network_beside_the_model_is_read_as_the_model(tmp_path, section, model):
    (tmp_path / "recipe.yaml").write_text(WHOLE + section)
    assert read_settings(tmp_path / "recipe.yaml", Recipe).model == model


def parsed(*arguments):
    return settings_from(_parser("train", list(arguments)).parse_args(["train", *arguments]).train, Recipe)


def test_the_kind_of_model_is_changed_by_an_option_and_keeps_views_and_classes(tmp_path):
    file, output = tmp_path / "recipe.yaml", ["--output", "o"]
    file.write_text(WHOLE + "optim: {lr: 3.0e-4}\n")
    recipe = parsed("--config", str(file), "--model.kind", "unet", "--model.encoder_name", "resnet18", *output)
    assert recipe.model == BaselineConfig(kind="unet", encoder_name="resnet18", **VIEWS | {"levels": (1,)})
    assert recipe.optim.lr == 3e-4
    relay = parsed(f"--config={file}", "--model.kind=relay", "--model.backbone", "vit", *output)
    assert relay.model == RelayConfig(backbone="vit", **VIEWS)
    file.write_text("data: {train: t}\nmodel: {kind: relay, backbone: vit, levels: [1, 8]}")
    assert parsed("--config", str(file), "--model.relay_tokens", "2", *output).model.relay_tokens == 2
    back = parsed("--config", str(file), "--model.kind", "muvit", "--model.encoder.dim", "64", *output)
    assert back.model == SegmenterConfig(encoder=EncoderConfig(levels=(1, 8), dim=64))


def test_a_recipe_written_in_full_is_read_again(tmp_path):
    file = tmp_path / "recipe.yaml"
    for _, model in BESIDE:
        recipe = Recipe(data=DataConfig(train="t"), model=model)
        file.write_text(yaml.safe_dump(plain(asdict(recipe))))
        assert read_settings(file, Recipe) == recipe


@pytest.mark.parametrize(
    ("kind", "shown", "hidden"),
    [(None, "--model.encoder.dim", "--model.backbone"), ("relay", "--model.backbone", "--model.encoder.dim")],
)
def test_help_has_the_settings_of_the_kind(capsys, kind, shown, hidden):
    assert main(["train", *([] if kind is None else ["--model.kind", kind]), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"{shown} " in text
    assert hidden not in text


def test_an_unknown_kind_is_told_with_the_known_ones(capsys):
    assert main(["train", "--data.train", "t", "--model.kind", "unett", "--output", "o"]) != 0
    assert "model.kind: expected one of muvit, relay, unet, " in capsys.readouterr().err
