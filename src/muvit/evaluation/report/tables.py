"""Scores of all models as HTML tables."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from muvit.evaluation.report.content import ModelResult
from muvit.evaluation.report.words import format_count, format_duration, format_score, join_lines, list_names

_MAX_CLASS_COLUMNS = 6  # more classes get a table of their own, one row each


def results_section(models: Sequence[ModelResult]) -> str:
    """HTML of the section with the scores."""
    classes = [name for name in models[0].dice if not all(math.isnan(model.dice[name]) for model in models)]
    is_wide = len(classes) > _MAX_CLASS_COLUMNS
    columns = ["mDSC", *([] if is_wide else classes)]
    table = [[model.mean_dice, *(model.dice[name] for name in columns[1:])] for model in models]
    marked = zip(*(_mark_best(column) for column in zip(*table, strict=True)), strict=True)
    rows = []
    for model, cells in zip(models, marked, strict=True):
        share = 0.0 if math.isnan(model.mean_dice) else 100 * min(max(model.mean_dice, 0.0), 1.0)
        rows.append(
            f'<tr><th scope="row">{escape(model.name)}<span class="note">{escape(model.description)}</span>'
            f'<span class="bar" aria-hidden="true"><span style="width:{share:.1f}%"></span></span></th>'
            f"{_cells([*cells, format_count(model.parameters), format_duration(model.seconds)])}</tr>"
        )
    caption = (
        "Mean of the Dice scores of the foreground classes (mDSC)"
        if is_wide
        else "Dice score of each foreground class, and their mean (mDSC),"
    ) + " on the test images, 0 to 1, higher is better. Bars show the mDSC."
    tables = [_table("results", caption, ["Model", *columns, "Parameters", "Training"], rows, len(models))]
    if is_wide:
        rows = [
            f'<tr><th scope="row">{escape(name)}</th>{_cells(_mark_best([m.dice[name] for m in models]))}</tr>'
            for name in classes
        ]
        head = ["Class", *(model.name for model in models)]
        tables.append(_table("results", "Dice score of each foreground class.", head, rows, len(models)))
    unscored = [name for name in models[0].dice if name not in classes]
    if unscored:
        tables.append(f'<p class="note">Neither in the test images nor predicted: {escape(list_names(unscored))}.</p>')
    return f"""<section aria-labelledby="results">
<h2 id="results">Results</h2>
{join_lines(tables)}
</section>"""


def _table(label: str, caption: str, head: Sequence[str], rows: Sequence[str], num_models: int) -> str:
    headings = "".join(
        f'<th scope="col"{" class=number" if column else ""}>{escape(name)}</th>' for column, name in enumerate(head)
    )
    bold = " The best is bold." if num_models > 1 else ""
    return f"""<div class="scroll" role="region" aria-labelledby="{label}" tabindex="0"><table>
<caption>{caption}{bold}</caption>
<thead><tr>{headings}</tr></thead>
<tbody>
{join_lines(rows)}
</tbody>
</table></div>"""


def _cells(texts: Iterable[str]) -> str:
    return "".join(f'<td class="number">{text}</td>' for text in texts)


def _mark_best(values: Sequence[float]) -> list[str]:
    """Scores as written, the highest of several in bold; what is written equal is bold together."""
    texts = list(map(format_score, values))
    known = [value for value in values if not math.isnan(value)]
    best = format_score(max(known)) if known and len(values) > 1 else None
    return [f"<strong>{text}</strong>" if text == best else text for text in texts]
