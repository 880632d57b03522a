"""Learning curves: a logged score after each epoch of several runs (MuViT table 3)."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from muvit.errors import InputError
from muvit.evaluation.charts import Line, draw_lines, new_figure, to_image
from muvit.evaluation.results import Row


def read_curves(run: Path, names: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Training steps and values of logged quantities of a run, also of one that was resumed."""
    curves: dict[str, dict[float, float]] = {name: {} for name in names}
    # a complete run that is resumed has a log without a step, and no file
    logs = sorted((run / "logs").glob("version_*/metrics.csv"), key=lambda file: int(file.parent.name.split("_")[1]))
    for log in logs:
        rows = csv.DictReader(_whole_lines(log))
        if "step" not in (rows.fieldnames or ()):  # the disk was full when its head was written
            continue
        for row in rows:
            for name in names:
                if row.get(name):  # a resumed run repeats the steps after its last checkpoint
                    curves[name][float(row["step"])] = float(row[name])
    return {name: (sorted(curve), [curve[step] for step in sorted(curve)]) for name, curve in curves.items()}


def log_names(run: Path) -> list[str]:
    """Names of the quantities that a run logged, steps and epochs apart."""
    names: dict[str, None] = {}
    for log in sorted((run / "logs").glob("version_*/metrics.csv")):
        names |= dict.fromkeys(next(csv.reader(_whole_lines(log)), []))
    return [name for name in names if name not in ("step", "epoch")]


def _whole_lines(log: Path) -> list[str]:
    """Lines of a log but for the last one if it is cut, as where a process was killed or a disk was full."""
    return [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_epochs(run: Path, metric: str = "val_mdsc") -> dict[int, float]:
    """A score of a run by the number of epochs that it was trained for (1 is after the first).

    Args:
        run: folder of a run, finished or not.
        metric: name of the score in its log.

    Raises:
        InputError: the run has no such log.
    """
    curves = read_curves(run, ("epoch", metric)) if (run / "logs").is_dir() else {metric: ([], [])}
    steps, scores = curves[metric]
    if not steps:
        raise InputError(run, expected=f"a run that logged {metric!r}", got="none of it")
    epoch_of = dict(zip(*curves["epoch"], strict=True))
    return {int(epoch_of[step]) + 1: score for step, score in zip(steps, scores, strict=True)}


def epoch_rows(curves: Mapping[str, Mapping[int, float]], metric: str) -> list[Row]:
    """Lines of a table: ``run``, ``epoch`` and the score."""
    return [
        {"run": run, "epoch": epoch, metric: score} for run, curve in curves.items() for epoch, score in curve.items()
    ]


def draw_epochs(curves: Mapping[str, Mapping[int, float]], metric: str) -> Image.Image:
    """Curves of the score against the epochs."""
    figure, axes = new_figure(7, 4.5)
    lines = {run: Line(list(curve), list(curve.values())) for run, curve in curves.items()}
    draw_lines(axes[0, 0], lines, xlabel="epochs", ylabel=metric)
    return to_image(figure)
