"""Conclusion of a comparison in sentences, no stronger than the intervals over the test slides allow."""

import math
from collections.abc import Sequence

from muvit.evaluation.report.content import ModelResult
from muvit.evaluation.report.words import format_score, list_names

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
    sentences.append("Each model was trained once; another seed would move these figures a little.")
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
    if low <= 0 <= high or abs(gain) < SMALL_DIFFERENCE:
        return [f"{others}: this run does not tell which is better."]
    if gain > 0:
        return [f"{others}.", "In this run, the task needs what the control lacks."]
    return [f"{others}.", f"This run gives no reason to prefer {first.name}: the control is better."]
