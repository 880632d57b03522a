"""Training curves of all models, as HTML with PNG files."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from muvit.evaluation.charts import MANY_POINTS, plot_curves
from muvit.evaluation.report.content import ModelResult
from muvit.evaluation.report.failures import warn_if_it_fails
from muvit.evaluation.report.words import format_score, join_lines


def curves_section(models: Sequence[ModelResult], pictures: Path) -> str:
    """HTML of the section on the training curves, whose pictures go to ``pictures``; empty if there are none."""
    names = dict.fromkeys(name for model in models for name in model.curves)
    figures = []
    for number, name in enumerate(names):
        series = {model.name: model.curves[name] for model in models if name in model.curves}
        label = _CURVE_LABELS.get(name, name.replace("_", " "))
        with warn_if_it_fails(f"the curve of the {label}"):
            figures.append(_curve(f"curve-{number}", label, series, pictures))
    if not figures:
        return ""
    is_averaged = any(len(y) > MANY_POINTS for model in models for _, y in model.curves.values())
    note = '<p class="note">The faint line is the curve, the strong one its running mean.</p>\n' if is_averaged else ""
    return f"""<section aria-labelledby="training">
<h2 id="training">Training</h2>
{note}<div class="plots">
{join_lines(figures)}
</div>
</section>"""


def _curve(stem: str, label: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], pictures: Path) -> str:
    for is_dark, suffix in ((False, "light"), (True, "dark")):
        plot = plot_curves(series, xlabel="training step", ylabel=label, is_dark=is_dark)
        plot.save(pictures / f"{stem}-{suffix}.png", optimize=True)
    last = "; ".join(f"{model} ends at {format_score(y[-1])}" for model, (_, y) in series.items() if len(y))
    return (
        f"<figure><figcaption>{escape(label[:1].upper() + label[1:])}</figcaption><picture>"
        f'<source srcset="pictures/{stem}-dark.png" media="(prefers-color-scheme: dark)">'
        f'<img src="pictures/{stem}-light.png" width="{plot.width}" height="{plot.height}" loading="lazy"'
        f' alt="{escape(f"{label} over training steps: {last}.")}"></picture></figure>'
    )


_CURVE_LABELS = {
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "val_mdsc": "validation mDSC",
}
