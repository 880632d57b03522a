"""Scores of all models as HTML tables, and the conclusion in sentences."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from muvit.evaluation.report.content import (
    ModelResult,
    format_count,
    format_duration,
    format_score,
    join_lines,
    list_names,
)
from muvit.evaluation.scores.bootstrap import seed_interval

SMALL_DIFFERENCE = 0.02
"""Differences of mDSC below this are called equal in the text: another seed can make as much."""

FOUND_DICE = 0.05
"""Dice from which a class counts as found by a model."""


def conclusion(models: Sequence[ModelResult]) -> list[str]:
    """Comparison of the first model with the best of the others, as sentences."""
    first, controls = models[0], [model for model in models[1:] if not math.isnan(model.mean_dice)]
    if math.isnan(first.mean_dice):
        return [f"No foreground class occurs in the test images or in what {first.name} predicts: there is no score."]
    score = f"{first.name} reaches an mDSC of {format_score(first.mean_dice)}"
    if not controls:
        return [f"{score}. There is no control to compare it with."]
    best = max(controls, key=lambda model: model.mean_dice)
    gain = first.mean_dice - best.mean_dice
    rival = f"{'the control' if len(models) == 2 else 'the best control'}, {best.name} ({format_score(best.mean_dice)})"
    if abs(gain) < SMALL_DIFFERENCE:
        sentences = [f"{score}, and {rival} is as good within {SMALL_DIFFERENCE:.2f}."]
    else:
        sentences = [f"{score}, {format_score(abs(gain))} {'above' if gain > 0 else 'below'} {rival}."]
    sentences += _verdict(first, best, gain)
    lost = [name for name, dice in first.dice.items() if any(m.dice[name] > dice for m in controls)]
    if lost and gain > -SMALL_DIFFERENCE:
        sentences.append(f"A control has the higher Dice on {list_names(lost)}.")
    sentences.append(
        f"Scores are means over {len(first.by_seed)} trainings of each model with different seeds."
        if first.by_seed
        else "Each model was trained once; another seed would move these figures."
    )
    return sentences


def _verdict(first: ModelResult, best: ModelResult, gain: float) -> list[str]:
    """Meaning of the difference to the best control, if the test slides support one."""
    known = [name for name, dice in first.dice.items() if not math.isnan(dice)]
    missed = [name for name in known if not max(first.dice[name], best.dice[name]) >= FOUND_DICE]
    if 2 * len(missed) > len(known):
        return [
            f"That is too little training to tell what sets them apart: neither finds {len(missed)} of the "
            f"{len(known)} classes (Dice below {FOUND_DICE})."
        ]
    if best.behind is None:
        return ["There are too few test slides to tell whether others would agree."]
    low, high = best.behind
    others = f"On other slides like these the difference would be {low:.3f} to {high:.3f}"
    is_open = low <= 0 <= high
    if best.behind_by_seed is not None:
        low, high = best.behind_by_seed
        others += f", with other seeds {low:.3f} to {high:.3f}"
        is_open = is_open or low <= 0 <= high
    if is_open or abs(gain) < SMALL_DIFFERENCE:
        return [f"{others}: this run does not tell which is better."]
    if gain > 0:
        return [f"{others}.", "In this run, the task needs what the control lacks."]
    return [f"{others}.", f"This run gives no reason to prefer {first.name}: the control is better."]


_MAX_CLASS_COLUMNS = 6  # more classes get a table of their own, one row each


def results_section(models: Sequence[ModelResult]) -> str:
    """HTML of the section with the scores."""
    classes = [name for name in models[0].dice if not all(math.isnan(model.dice[name]) for model in models)]
    is_wide = len(classes) > _MAX_CLASS_COLUMNS
    columns = ["mDSC", *([] if is_wide else classes)]
    table = [[model.mean_dice, *(model.dice[name] for name in columns[1:])] for model in models]
    marked = zip(*(_mark_best(column) for column in zip(*table, strict=True)), strict=True)
    rows = []
    for model, cells in zip(models, map(list, marked), strict=True):
        if (interval := seed_interval(model.by_seed, within=(0, 1))) is not None:
            cells[0] += f" ± {(interval[1] - interval[0]) / 2:.3f}"
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
    if models[0].by_seed:
        caption += f" Means over {len(models[0].by_seed)} seeds, ± half of the 95 % interval of the mean."
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
