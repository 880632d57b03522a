import csv

import numpy as np
import pytest

from muvit.errors import InputError
from muvit.evaluation.studies.epochs import draw_epochs, epoch_rows, read_curves, read_epochs


def log(run, version, rows):
    folder = run / "logs" / f"version_{version}"
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("epoch", "step", "train_loss", "val_mdsc"))
        writer.writeheader()
        writer.writerows(rows)


def test_curves_are_read_in_the_order_of_the_runs_parts(tmp_path):
    log(tmp_path, 0, [{"step": 9, "train_loss": 1.5}, {"step": 9, "val_mdsc": 0.25}])
    log(tmp_path, 2, [{"step": 19, "train_loss": 1.25}])
    log(tmp_path, 10, [{"step": 29, "train_loss": 1.0}, {"step": 29, "val_mdsc": 0.5}])
    (tmp_path / "logs" / "version_11").mkdir()  # of a complete run that was resumed
    curves = read_curves(tmp_path, ("train_loss", "val_mdsc", "unheard"))
    assert curves == {
        "train_loss": ([9, 19, 29], [1.5, 1.25, 1.0]),
        "val_mdsc": ([9, 29], [0.25, 0.5]),
        "unheard": ([], []),
    }


@pytest.mark.parametrize("content", ["", "epoch,st", "epoch,st0,9,1.5\n0,19,1.25\n", "epoch,step,train_loss\n0,19,1."])
def test_a_log_that_a_full_disk_cut_is_read_as_far_as_it_is_whole(tmp_path, content):
    log(tmp_path, 0, [{"step": 9, "train_loss": 1.5}])
    (tmp_path / "logs" / "version_1").mkdir()
    (tmp_path / "logs" / "version_1" / "metrics.csv").write_text(content)
    assert read_curves(tmp_path, ("train_loss",)) == {"train_loss": ([9], [1.5])}


def test_steps_that_a_resumed_run_repeated_are_drawn_once(tmp_path):
    log(tmp_path, 2, [{"step": s, "train_loss": float(s)} for s in (9, 19, 29)])
    log(tmp_path, 10, [{"step": s, "train_loss": s + 0.5} for s in (19, 29, 39)])
    assert read_curves(tmp_path, ("train_loss",))["train_loss"] == ([9, 19, 29, 39], [9, 19.5, 29.5, 39.5])


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
