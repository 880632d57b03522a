from dataclasses import replace

import pytest
import yaml

from muvit.errors import ReadError
from muvit.models.card import ModelCard, read_card, with_license
from muvit.models.hub import CARD

FULL = ModelCard(
    title="nuclei",
    kind="muvit",
    levels=(1, (1, 4, 4), 8.5),
    channels=3,
    parameters=1234567,
    crop_size=(64, 64),
    pixel_size_um=(0.25, 0.5),
    classes=("background", "Zellkern µ"),
    data={"slides to train on": 8},
    scores={"val_mdsc": 0.81234},
    provenance={"muvit": "1", "seed": 3},
    license="mit",
    recipe="data: {train: data/train}\n",
)
PLAIN = ModelCard(title="mae", kind="mae", levels=(1, 4), channels=1, parameters=10)


@pytest.mark.parametrize("card", [FULL, PLAIN], ids=["full", "plain"])
def test_the_facts_of_a_card_can_be_read_again(card, tmp_path):
    (tmp_path / CARD).write_text(card.to_markdown())
    assert read_card(tmp_path) == replace(card, recipe=None)


def test_a_card_is_text_for_people_and_for_hubs():
    _, head, text = FULL.to_markdown().split("---\n", 2)
    values = yaml.safe_load(head)
    assert (values["library_name"], values["license"]) == ("muvit", "mit")
    assert values["pipeline_tag"] == "image-segmentation" and "muvit" in values["tags"]
    for said in (
        "# nuclei",
        "| levels | 1, 1x4x4, 8.5 |",
        "| 1 | Zellkern µ |",
        "| val_mdsc | 0.8123 |",
        "0.25 x 0.5 um",
    ):
        assert said in text
    assert "```yaml\ndata: {train: data/train}\n```" in text
    assert "license" not in yaml.safe_load(PLAIN.to_markdown().split("---\n", 2)[1])


def test_a_licence_is_written_and_the_rest_of_a_card_kept(tmp_path):
    (tmp_path / CARD).write_text(PLAIN.to_markdown() + "\nWritten by hand.\n")
    for license in ("cc-by-4.0", "mit"):
        (tmp_path / CARD).write_text(with_license(tmp_path, license))
        assert read_card(tmp_path) == replace(PLAIN, license=license)
    assert (tmp_path / CARD).read_text().endswith("\nWritten by hand.\n")


@pytest.mark.parametrize("text", ["", "# words", "---\na: [\n---\n", "---\nmuvit: {a: 1}\n---\n", "---\n- 1\n---\n"])
def test_other_text_is_no_card(text, tmp_path):
    (tmp_path / CARD).write_text(text)
    with pytest.raises(ReadError, match=CARD):
        read_card(tmp_path)
