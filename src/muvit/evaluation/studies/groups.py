"""Domain shift: scores of each group of slides, by models that were trained on one group or another."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Literal

from PIL import Image

from muvit.data.tables import values_of
from muvit.evaluation.charts import draw_matrix, new_figure, to_image
from muvit.evaluation.results import Row
from muvit.evaluation.scores.bootstrap import BootstrapConfig
from muvit.evaluation.scores.segmentation import Evaluation

Score = Literal["mean_dice", "mean_slide_dice"]
"""mDSC of all pixels of a group together, or the mean of the mDSC of its slides."""


@dataclass(frozen=True, kw_only=True)
class DomainShift:
    """Scores of models on groups of slides."""

    groups: tuple[str, ...]
    """Names of the groups, in alphabetical order."""
    scores: Mapping[str, Mapping[str, Evaluation]]
    """By name of the model, what it reached on each group; a group that it did not label is missing."""

    def matrix(self, score: Score = "mean_dice") -> list[list[float]]:
        """Scores, a row for each model and a column for each group; NaN where there is none."""
        return [
            [found[group].summary()[score] if group in found else nan for group in self.groups]
            for found in self.scores.values()
        ]

    def rows(self, bootstrap: BootstrapConfig | None = None) -> list[Row]:
        """Lines of a table: ``model``, ``group``, ``slides``, and both scores with the bounds of their intervals."""
        rows: list[Row] = []
        for model, found in self.scores.items():
            for group, scored in found.items():
                row: dict[str, str | float] = {"model": model, "group": group, "slides": len(scored.slides)}
                values, intervals = scored.summary(), scored.intervals(bootstrap)
                for score in ("mean_dice", "mean_slide_dice"):
                    low, high = intervals[score]
                    row |= {score: values[score], f"{score}_low": low, f"{score}_high": high}
                rows.append(row)
        return rows


def study_groups(evaluations: Mapping[str, Evaluation], group_of: Mapping[str, str]) -> DomainShift:
    """Sort scored slides by group.

    Args:
        evaluations: what each model reached, by its name: that of the group that it was trained on, for example.
        group_of: group of each slide by its name.

    Raises:
        InputError: a slide has no group.
    """
    scores: dict[str, dict[str, Evaluation]] = {}
    for model, scored in evaluations.items():
        groups = values_of((slide.name for slide in scored.slides), dict(group_of), "groups")
        scores[model] = {
            group: scored.select([name for name, own in groups.items() if own == group])
            for group in sorted(set(groups.values()))
        }
    return DomainShift(groups=tuple(sorted({group for found in scores.values() for group in found})), scores=scores)


def draw_groups(shift: DomainShift, score: Score = "mean_dice") -> Image.Image:
    """The matrix of scores as a heat map."""
    models = list(shift.scores)
    figure, axes = new_figure(max(4.0, 0.9 * len(shift.groups) + 2), max(2.5, 0.5 * len(models) + 1.5))
    title = "mDSC of all pixels" if score == "mean_dice" else "mean mDSC of the slides"
    draw_matrix(
        axes[0, 0], shift.matrix(score), models, shift.groups, xlabel="group of the slides", ylabel="model", title=title
    )
    return to_image(figure)
