import pytest
from jsonargparse import ArgumentError, ArgumentParser

from muvit.cli import main
from muvit.cli.messages import sentence
from muvit.training.recipe import Recipe

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
    parser.add_class_arguments(Recipe, as_group=False)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_args([*GIVEN, *arguments])
    return sentence(str(caught.value))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.decoder", "fpn"], "model.decoder: expected one of unetr, mask2former, got fpn"),
        (
            ["--baseline.network", "vgg"],
            "baseline.network: expected one of unet, deeplabv3, segformer, residual_unet, swinunetr, unetr, got vgg",
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
    wrong = ["--baseline.network", "unet", "--baseline.levels", "[1, 4]"]
    assert main(["train", *GIVEN, *wrong, "--output", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("muvit: levels: expected one level, as unet sees one view, got")
    assert said.count("\n") == 1


def test_other_messages_are_only_brought_into_one_line():
    assert sentence("one\n  two") == "one two"
