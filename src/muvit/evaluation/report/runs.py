"""Pages of training runs and of predictions."""

import logging
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from muvit.data.crops.preprocessing import FILE, Preprocessing
from muvit.data.slides.slide import Slide
from muvit.durable import write_whole
from muvit.errors import CheckpointError, MuViTError, ReadError
from muvit.evaluation.report import parts
from muvit.evaluation.report.content import format_duration, format_score, join_lines, warn_if_it_fails
from muvit.evaluation.report.parts import render_page
from muvit.evaluation.report.viewer import SCRIPT, TILES, VIEW_PX, render_viewer
from muvit.evaluation.studies.epochs import log_names, read_curves
from muvit.inference.export.labelled import LabelledImage
from muvit.inference.export.summaries import draw_overview
from muvit.models.card import read_card
from muvit.models.hub import CARD

PAGE = "index.html"
_LOG = logging.getLogger(__name__)
_OVERVIEW_PX = 900
_MAX_READ_PX = 1 << 26
_CHARTS = {
    "Loss": ("train_loss", "val_loss"),
    "Validation scores": ("val_mdsc", "val_mean_iou", "val_mean_foreground_iou", "val_accuracy"),
}
_PER_CLASS = "val_dice/"


def write_page(file: Path, text: str) -> None:
    """Write a page, in place of an earlier one; a file of the same name that is no page of muvit is kept."""
    if file.exists() and parts.MARK not in file.read_text(errors="replace"):
        _LOG.warning("%s: no report of muvit, and kept as it is", file)
        return
    write_whole(file, text.encode())


def write_run_page(run: Path, seconds: float | None = None) -> Path:
    """Write ``index.html`` of a training run, from what is in its folder: curves, scores, pictures, recipe, card.

    Args:
        run: folder of a run, finished or not.
        seconds: time that the training took.

    Returns:
        The page.
    """
    names = log_names(run)
    curves = {name: curve for name, curve in read_curves(run, names).items() if curve[0]}
    charts = [
        parts.line_chart({n: curves[n] for n in shown if n in curves}, xlabel="step", title=title)
        for title, shown in _CHARTS.items()
    ]
    per_class = {name.removeprefix(_PER_CLASS): curve for name, curve in curves.items() if name.startswith(_PER_CLASS)}
    charts.append(parts.line_chart(per_class, xlabel="step", title="Validation Dice of each class"))
    rates = {name: curve for name, curve in curves.items() if name.startswith("lr")}
    charts.append(parts.line_chart(rates, xlabel="step", title="Learning rate"))
    best = next((run / name for name in ("best", "last") if (run / name / CARD).is_file()), None)
    sections = [
        parts.section("training", "Training", f'<div class="plots">\n{join_lines(filter(None, charts))}\n</div>'),
        _model_section(best) if best is not None else "",
        _pictures_section(run, best),
        parts.section("recipe", "Recipe", parts.details("recipe.yaml", (run / "recipe.yaml").read_text())),
        parts.section("environment", "Environment", parts.facts_list(parts.environment())),
    ]
    page = run / PAGE
    title = f"Training run {run.resolve().name}"
    write_page(page, render_page(title, "Losses and scores of a training run.", _findings(curves, seconds), sections))
    return page


def _findings(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], seconds: float | None) -> list[str]:
    steps = max((x[-1] for x, _ in curves.values()), default=0)
    found = [f"{int(steps) + 1} steps{'' if seconds is None else f' in {format_duration(seconds)}'}."]
    for name, choose in (("val_mdsc", max), ("val_loss", min)):
        if name in curves:
            x, y = curves[name]
            best = choose(range(len(y)), key=y.__getitem__)
            said = "mDSC" if name == "val_mdsc" else "validation loss"
            found.append(f"The best {said}, {format_score(y[best])}, was reached after step {int(x[best])}.")
            break
    return found


def _model_section(folder: Path) -> str:
    try:
        card = read_card(folder)
    except ReadError:
        return ""
    scores = {name: value for name, value in card.scores.items() if not name.startswith(_PER_CLASS)}
    dice = [{"class": name, "Dice": card.scores.get(_PER_CLASS + name)} for name in card.classes]
    dice = [row for row in dice if row["Dice"] is not None]
    facts: dict[str, object] = {"kind": card.kind, "weights": f"{card.parameters:,}", "folder": folder.name}
    body = [
        parts.facts_list(facts | {name: format_score(value) for name, value in scores.items()} | dict(card.data)),
        parts.rows_table(dice, "Dice of each class on all validation pixels, of the weights that were kept."),
        f'<p class="note">More in its card, <a href="{folder.name}/{CARD}">{folder.name}/{CARD}</a>.</p>',
    ]
    return parts.section("model", "Model", join_lines(filter(None, body)))


def _pictures_section(run: Path, model: Path | None) -> str:
    pictures = sorted((run / "pictures").glob("*.png")) if (run / "pictures").is_dir() else []
    if not pictures:
        return ""
    legend = ""
    if model is not None and (model / FILE).is_file():
        preprocessing = Preprocessing.load(model)
        if len(preprocessing.class_colors) == len(preprocessing.class_names):
            legend = parts.class_legend_list(preprocessing.class_names, preprocessing.class_colors)
    shown = parts.inline_picture(pictures[-1].read_bytes(), "validation crops after the last epoch")
    note = '<p class="note">Validation crops after the last epoch; a frame shows the place of the finest view.</p>'
    return parts.section("examples", "Examples", f"{legend}\n<article>{shown}</article>\n{note}")


def write_prediction_page(
    folder: Path,
    slides: Mapping[Path, Slide],
    facts: Mapping[str, object],
    *,
    model: Path | None = None,
    view_px: int = VIEW_PX,
) -> Path | None:
    """Write ``index.html`` beside labels: each over its image, to be moved and zoomed, and what they were made by.

    Args:
        folder: of the page.
        slides: the image of each label image, by the path of the labels; those that are not complete, or no 2D images,
            are left out.
        facts: what the labels were made by, by name.
        model: folder of the model, whose card the page shows.
        view_px: longest side of the finest pixels shown; the tiles of larger slides than 1024 pixels lie beside the
            page.

    Returns:
        The page; None if no overview can be drawn.
    """
    from muvit.data.slides.open import open_slide

    articles = []
    for path, image in slides.items():
        with warn_if_it_fails(f"the overview of {path}"):
            try:
                labels = open_slide(path)
            except (ReadError, CheckpointError):  # unfinished
                continue
            if labels.axes == "yx":
                articles.append(_slide(folder, labels, image, view_px))
    if not articles:
        return None
    sections = [
        parts.section("slides", "Slides", f"{join_lines(articles)}\n<script>{SCRIPT}</script>"),
        _model_section(model) if model is not None else "",
        parts.section("settings", "Settings", parts.facts_list(facts)),
        parts.section("environment", "Environment", parts.facts_list(parts.environment())),
    ]
    done = f"{len(articles)} slide{'' if len(articles) == 1 else 's'} labelled."
    intro = "Labels over their images. In napari and in Python, open the OME-Zarr folders that are named."
    if (folder / TILES).is_dir():
        intro += f" The tiles of large slides are in {TILES}/ beside this page; without them they are shown coarsely."
    page = folder / PAGE
    write_page(page, render_page("Predictions", intro, [done], sections))
    return page


def _slide(folder: Path, labels: Slide, image: Slide, view_px: int) -> str:
    small = [level for level in image.stored_levels if _num_pixels(image, level) <= _MAX_READ_PX]
    shown: Slide | None = image if small else None
    try:
        source = LabelledImage(labels=labels, image=shown)
    except MuViTError:  # labels of another grid
        source = LabelledImage(labels=labels)
    picture = parts.inline_picture(draw_overview(source, size=_OVERVIEW_PX), f"labels of {labels.name}")
    name = labels.path.relative_to(folder) if labels.path.is_relative_to(folder) else labels.path
    size = " x ".join(map(str, labels.shape))
    unit = "" if source.pixel_um is None else f", {' x '.join(f'{um:g}' for um in source.pixel_um)} um each"
    return (
        f"<article><h3>{escape(labels.name)}</h3>\n{render_viewer(folder, source, view_px=view_px)}\n"
        f"<noscript>{picture}</noscript>\n"
        f'<p class="note"><code>{escape(str(name))}</code>: {size} pixels{unit}, of {escape(str(image.path))}</p>'
        "</article>"
    )


def _num_pixels(slide: Slide, level: Any) -> int:
    height, width = slide.level_shape(level)
    return int(height * width)
