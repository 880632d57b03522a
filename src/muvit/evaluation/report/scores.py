"""Pages of scores and of other results."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from muvit.evaluation.report import parts
from muvit.evaluation.report.content import format_score
from muvit.evaluation.report.parts import render_page
from muvit.evaluation.scores.bootstrap import BootstrapConfig
from muvit.evaluation.scores.segmentation import Evaluation


def scores_page(result: Evaluation, bootstrap: BootstrapConfig, places: str = "") -> str:
    """Page of the scores of predicted labels: of each class with intervals, of each slide, and the confusion matrix.

    Args:
        result: the scores.
        bootstrap: how the intervals are drawn.
        places: section of `muvit.evaluation.report.places.places_section`.
    """
    values = result.summary()
    intervals = result.intervals(bootstrap) if len(result.slides) > 1 else {}
    means: list[dict[str, Any]] = []
    for name, value in values.items():
        if "/" not in name:
            interval = {"interval": _interval(intervals[name])} if name in intervals else {}
            means.append({"score": name.replace("_", " "), "value": value} | interval)
    sections = [
        parts.section("classes", "Classes", classes_table(result, bootstrap)),
        parts.section("means", "All classes together", parts.rows_table(means)),
        *([parts.section("levels", "Levels", levels_table(result))] if result.levels else []),
        parts.section("slides", "Slides", parts.rows_table(result.table(), "Dice of each slide.")),
        parts.section("confusion", "Confusion", parts.confusion_table(result.confusion, result.class_names)),
        places,
        parts.section("environment", "Environment", parts.facts_list(parts.environment())),
    ]
    count = len(result.slides)
    found = [f"mDSC {format_score(values['mean_dice'])} on {count} slide{'' if count == 1 else 's'}."]
    if "mean_dice" in intervals:
        found.append(f"On other slides like these it would be {_interval(intervals['mean_dice'])}.")
    if result.missing:
        found.append(f"Not scored, as there is no prediction: {', '.join(result.missing)}.")
    return render_page("Scores", "Predicted labels against true ones.", found, sections)


def classes_table(result: Evaluation, bootstrap: BootstrapConfig, note: str = "") -> str:
    """Table of the scores of each class, with intervals over slides if there are several."""
    values = result.summary()
    intervals = result.intervals(bootstrap) if len(result.slides) > 1 else {}
    kinds = {name.split("/")[0]: None for name in values if "/" in name and "_level_" not in name}
    rows = []
    for name in result.names(result.scored):
        row: dict[str, Any] = {"class": name}
        for kind in kinds:
            key = f"{kind}/{name}"
            row[kind.replace("_", " ")] = values[key]
            if key in intervals:
                row[f"{kind.replace('_', ' ')}: {bootstrap.coverage:.0%} interval"] = _interval(intervals[key])
        rows.append(row)
    return parts.rows_table(rows, f"Of the pixels of all slides together. {note}".strip())


def levels_table(result: Evaluation) -> str:
    """Table of Dice at each level that was scored."""
    return parts.rows_table(result.level_table(), "Dice of true and predicted labels by majority at each level.")


def results_page(title: str, rows: Sequence[Mapping[str, Any]], picture: Image.Image) -> str:
    """Page of any results: their picture and their table."""
    sections = [
        parts.section("picture", "Picture", f"<article>{parts.inline_picture(picture, title)}</article>"),
        parts.section("numbers", "Numbers", parts.rows_table(rows)),
        parts.section("environment", "Environment", parts.facts_list(parts.environment())),
    ]
    return render_page(title, "", [f"{len(rows)} rows of results."], sections)


def _interval(bounds: Sequence[float]) -> str:
    low, high = bounds
    return "" if low != low or high != high else f"{low:.3f} to {high:.3f}"
