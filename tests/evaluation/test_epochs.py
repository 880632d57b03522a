import csv

import numpy as np
import pytest

from muvit.errors import InputError
from muvit.evaluation.epochs import draw_epochs, epoch_rows, read_epochs


def log(run, version, rows):
    folder = run / "logs" / f"version_{version}"
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("epoch", "step", "train_loss", "val_mdsc"))
        writer.writeheader()
        writer.writerows(rows)


def test_scores_are_told_by_epoch_also_of_a_resumed_run(tmp_path):
    log(tmp_path, 0, [{"epoch": 0, "step": 4, "train_loss": 1.5}, {"epoch": 0, "step": 9, "val_mdsc": 0.25}])
    log(tmp_path, 1, [{"epoch": 1, "step": 14, "train_loss": 1.5}, {"epoch": 2, "step": 29, "val_mdsc": 0.5}])
    curve = read_epochs(tmp_path)
    assert curve == {1: 0.25, 3: 0.5}
    assert epoch_rows({"a": curve}, "val_mdsc") == [
        {"run": "a", "epoch": 1, "val_mdsc": 0.25},
        {"run": "a", "epoch": 3, "val_mdsc": 0.5},
    ]
    assert np.asarray(draw_epochs({"a": curve, "b": {1: 0.1}}, "val_mdsc")).std() > 0


def test_a_run_without_the_score_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a run that logged 'val_mdsc', got none of it"):
        read_epochs(tmp_path)
    log(tmp_path, 0, [{"epoch": 0, "step": 9, "val_mdsc": 0.25}])
    with pytest.raises(InputError, match="logged 'val_auc'"):
        read_epochs(tmp_path, "val_auc")
