"""Models that are part of the package: their cards tell the truth."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from muvit.cli.demo import MODEL, recipe
from muvit.errors import CheckpointError
from muvit.models.card import read_card
from muvit.models.folder import PACKAGED, WEIGHTS, model_folder
from muvit.models.hub import CARD
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.trained import load_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ship_model


def test_a_packaged_model_is_found_by_its_name_unless_there_is_such_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_folder(MODEL) == PACKAGED / MODEL
    with pytest.raises(CheckpointError):
        load_model(f"../{MODEL}")
    (tmp_path / MODEL).mkdir()
    with pytest.raises(CheckpointError):
        load_model(MODEL)


def test_the_packaged_model_is_small_in_half_precision_and_that_of_the_demo():
    folder = PACKAGED / MODEL
    assert (folder / WEIGHTS).stat().st_size <= 1_500_000
    kinds = {weights.dtype for weights in load_file(folder / WEIGHTS).values()}
    assert {kind for kind in kinds if kind.kind == "f"} == {np.dtype(np.float16)}
    trained, own = load_model(MODEL, kind=SegmentationModel), recipe(Path("data"))
    assert trained.model.views.levels == own.model.levels and trained.preprocessing.crop_size == (64, 64)
    assert "## Recipe" in (folder / CARD).read_text() and read_card(folder).license == "bsd-3-clause"


def test_the_score_of_the_packaged_model_is_what_its_card_says(tmp_path):
    found = ship_model.score_unseen(load_model(MODEL, kind=SegmentationModel), tmp_path)
    card = read_card(PACKAGED / MODEL)
    assert found.pooled.mean_dice == pytest.approx(card.scores["test_mdsc"], abs=2e-3)
    assert card.scores["test_mdsc"] > 0.85  # a model that finds cells, but not their class, has about 0.5
