"""Today's code gives what the code of the record gave: for models and data sets built anew, and for its own folders."""

import json

import pytest
from cases import CASES, DATA
from folders import MODELS, model_outputs, prediction, resumed
from record import RECORD, differences, summaries

RECORDED = json.loads(RECORD.read_text())
FOLDERS = RECORDED.pop("folders")

RESUMED_TOLERANCE = 1e-3
"""After three steps of an optimiser that may sum in another order."""


def test_nothing_is_missing_from_the_record():
    assert list(RECORDED) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_built_anew(name):
    assert not differences(summaries(CASES[name]()), RECORDED[name])


@pytest.mark.parametrize("kind", [*MODELS, "run"])
def test_old_model_folders_load_and_give_the_same(kind):
    folder, kind_of_model = (DATA / "run", "segmenter") if kind == "run" else (DATA / "models" / kind, kind)
    assert not differences(model_outputs(kind_of_model, folder), FOLDERS["models"][kind])


def test_a_slide_of_old_is_labelled_by_a_model_of_old_as_ever(tmp_path):
    assert prediction(tmp_path) == FOLDERS["prediction"]


def test_an_old_run_resumes(tmp_path):
    found, recorded = resumed(tmp_path), FOLDERS["resumed"]
    assert found["steps"] == recorded["steps"]
    for part in ("logged", "last"):
        assert not differences(found[part], recorded[part], RESUMED_TOLERANCE)
