"""A picture of an evaluation: Dice of each class with its interval, and the confusion matrix."""

import numpy as np
from PIL import Image

from muvit.evaluation.charts import draw_bars, draw_matrix, new_figure, to_image
from muvit.evaluation.scores.bootstrap import BootstrapConfig
from muvit.evaluation.scores.segmentation import Evaluation


def draw_scores(evaluation: Evaluation, bootstrap: BootstrapConfig | None = None) -> Image.Image:
    """Bars of Dice (and boundary F1, if it was computed), and the confusion matrix as fractions of the true pixels."""
    bootstrap = BootstrapConfig() if bootstrap is None else bootstrap
    values, intervals = evaluation.summary(), evaluation.intervals(bootstrap)
    kinds = {"Dice": "dice"} if evaluation.boundary is None else {"Dice": "dice", "boundary F1": "boundary_f1"}
    classes, shown = evaluation.class_names, evaluation.names(evaluation.foreground)
    keys = {title: [*(f"{kind}/{c}" for c in shown), f"mean_{kind}"] for title, kind in kinds.items()}
    side = max(4.0, 0.34 * len(classes) + 2)
    figure, axes = new_figure(2 * side + 1, side, columns=2)
    covered = f", bars: {bootstrap.coverage:.0%} over {len(evaluation.slides)} slides"
    draw_bars(
        axes[0, 0],
        [*shown, "mean"],
        {title: [values[key] for key in names] for title, names in keys.items()},
        intervals={title: [intervals[key] for key in names] for title, names in keys.items()},
        label="score, all pixels pooled" + (covered if len(evaluation.slides) > 1 else ""),
    )
    axes[0, 0].set_xlim(0, 1)
    confusion = evaluation.confusion
    with np.errstate(invalid="ignore"):
        shares = confusion / confusion.sum(1, keepdims=True)
    draw_matrix(
        axes[0, 1],
        shares,
        classes,
        classes,
        xlabel="predicted class",
        ylabel="true class",
        title="fraction of each true class",
    )
    return to_image(figure)
