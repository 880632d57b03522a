"""Pages of training runs and of predictions."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from lightning import Callback, LightningModule, Trainer

from muvit.data.crops.preprocessing import FILE, Preprocessing
from muvit.data.slides.slide import Slide
from muvit.durable import write_whole
from muvit.errors import CheckpointError, MuViTError, ReadError
from muvit.evaluation.report import parts
from muvit.evaluation.report.content import format_duration, format_score, join_lines, warn_if_it_fails
from muvit.evaluation.report.parts import REFRESH_S, render_page
from muvit.evaluation.report.scores import classes_table
from muvit.evaluation.report.viewer import SCRIPT, TILES, VIEW_PX, render_viewer
from muvit.evaluation.scores.bootstrap import BootstrapConfig
from muvit.evaluation.scores.segmentation import Evaluation, SlideCounts
from muvit.evaluation.studies.epochs import log_names, read_curves
from muvit.inference.export.labelled import LabelledImage
from muvit.inference.export.summaries import draw_overview
from muvit.models.card import read_card
from muvit.models.hub import CARD
from muvit.training.best_validation import VALIDATION, WORST_AND_BEST

PAGE = "index.html"
_LOG = logging.getLogger(__name__)
_OVERVIEW_PX = 900
_MAX_READ_PX = 1 << 26
_CHARTS = {
    "Loss": ("train_loss", "val_loss"),
    "Validation scores": ("val_mdsc", "val_mean_iou", "val_mean_foreground_iou", "val_accuracy"),
}
_PER_CLASS, _PER_LEVEL = "val_dice/", "val_loss/"


def write_page(file: Path, text: str) -> None:
    """Write a page, in place of an earlier one; a file of the same name that is no page of muvit is kept."""
    if file.exists() and parts.MARK not in file.read_text(errors="replace"):
        _LOG.warning("%s: no report of muvit, and kept as it is", file)
        return
    write_whole(file, text.encode())


class LivePage(Callback):
    """Writes the page of a run after each epoch, so that it can be watched in a browser.

    Args:
        run: folder of the run.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.began = time.monotonic()
        self.is_open = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page; the callbacks that save models and details have their turn before."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        with warn_if_it_fails(f"the report of {self.run}"):
            write_run_page(self.run, time.monotonic() - self.began, is_live=True)
            self.is_open = True

    def close(self) -> None:
        """Write the page for good, if there is one: of a run that is complete, or was stopped."""
        if self.is_open:
            write_run_page(self.run, time.monotonic() - self.began)


def write_run_page(run: Path, seconds: float | None = None, *, is_live: bool = False) -> Path:
    """Write ``index.html`` of a training run, from what is in its folder: curves, scores, pictures, recipe, card.

    Args:
        run: folder of a run, finished or not.
        seconds: time that the training took.
        is_live: whether the run goes on; browsers then load the page again and again.

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
    per_level = {n.removeprefix(_PER_LEVEL): curve for n, curve in curves.items() if n.startswith(_PER_LEVEL)}
    charts.append(parts.line_chart(per_level, xlabel="step", title="Validation loss of each level"))
    rates = {name: curve for name, curve in curves.items() if name.startswith("lr")}
    charts.append(parts.line_chart(rates, xlabel="step", title="Learning rate"))
    best = next((run / name for name in ("best", "last") if (run / name / CARD).is_file()), None)
    sections = [
        parts.section("training", "Training", f'<div class="plots">\n{join_lines(filter(None, charts))}\n</div>'),
        *_validation_sections(run),
        _pictures_section(run, best),
        _model_section(best, run) if best is not None else "",
        parts.section("recipe", "Recipe", parts.details("recipe.yaml", (run / "recipe.yaml").read_text())),
        parts.section("environment", "Environment", parts.facts_list(parts.environment())),
    ]
    page = run / PAGE
    title = f"Training run {run.resolve().name}"
    intro = "Losses and scores of a training run."
    if is_live:
        intro += " It goes on; this page is written anew after each epoch."
    write_page(page, render_page(title, intro, _findings(curves, seconds), sections, is_live=is_live))
    return page


class LiveComparison:
    """The page of models that are trained side by side, until the results replace it: their steps and scores so far.

    Args:
        folder: of the comparison.
        title: headline.
        runs: folder of each training relative to ``folder``, by its name.
    """

    def __init__(self, folder: Path, title: str, runs: Mapping[str, str]) -> None:
        self.folder, self.title, self.runs = folder, title, runs
        self.steps: Sequence[tuple[int, int]] = [(0, 0)] * len(runs)
        self._written = -math.inf

    def update(self, steps: Sequence[tuple[int, int]]) -> None:
        """Write the page, if browsers would load it again by now.

        Args:
            steps: of each training, those that are done, and all.
        """
        self.steps = steps
        if time.monotonic() - self._written >= REFRESH_S:
            self._write(f"It goes on; this page is written anew every {REFRESH_S} seconds.", is_live=True)
            self._written = time.monotonic()

    def close(self) -> None:
        """Write the page of a comparison that was stopped."""
        self._write("It was stopped, and goes on with --resume.", is_live=False)

    def _write(self, state: str, *, is_live: bool) -> None:
        # a folder with a page and no run would not be taken for that of a comparison to go on with
        if not any((self.folder / run).is_dir() for run in self.runs.values()):
            return
        with warn_if_it_fails(f"the report of {self.folder}"):
            rows: list[dict[str, object]] = []
            scores: dict[str, tuple[list[float], list[float]]] = {}
            links: list[str] = []
            for (name, run), (done, total) in zip(self.runs.items(), self.steps, strict=True):
                curve = read_curves(self.folder / run, ("val_mdsc",))["val_mdsc"]
                last, best = (curve[1][-1], max(curve[1])) if curve[1] else (None, None)
                rows.append({"model": name, "steps": done, "of": total, "last mDSC": last, "best mDSC": best})
                scores |= {name: curve} if curve[0] else {}
                if (self.folder / run / PAGE).is_file():
                    links.append(f'<li><a href="{quote(f"{run}/{PAGE}")}">{escape(name)}</a></li>')
            chart = parts.line_chart(scores, xlabel="step", title="Validation mDSC")
            listed = f"<ul>\n{join_lines(links)}\n</ul>" if links else ""
            sections = [
                parts.section("training", "Training", parts.rows_table(rows) + chart),
                parts.section("runs", "Reports of the trainings", listed),
            ]
            done, total = map(sum, zip(*self.steps, strict=True))
            found = [f"{done} of {total} steps are done."]
            intro = f"Models that are trained side by side. {state}"
            write_page(self.folder / PAGE, render_page(self.title, intro, found, sections, is_live=is_live))


def _validation_sections(run: Path) -> list[str]:
    """Scores of each class with intervals, and the confusion, of the best validation of a run."""
    file = run / VALIDATION
    if not file.is_file():
        return []
    content = json.loads(file.read_text())
    counted = [SlideCounts(name=one["name"], confusion=np.array(one["confusion"])) for one in content["slides"]]
    result = Evaluation(
        class_names=tuple(content["class_names"]),
        slides=tuple(counted),
        has_background=content["has_background"],
        ignore=tuple(content["ignore"]),
    )
    note = f"Validation crops after epoch {content['epoch'] + 1}, whose weights were kept"
    note += "; intervals over the slides." if len(counted) > 1 else "."
    return [
        parts.section("classes", "Classes", classes_table(result, BootstrapConfig(), note)),
        parts.section("confusion", "Confusion", parts.confusion_table(result.confusion, result.class_names)),
    ]


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


def _model_section(folder: Path, page: Path) -> str:
    """Facts of a model folder with its card, for a page in the folder ``page``."""
    try:
        card = read_card(folder)
    except ReadError:
        return ""
    scores = {name: value for name, value in card.scores.items() if not name.startswith(_PER_CLASS)}
    facts: dict[str, object] = {"kind": card.kind, "weights": f"{card.parameters:,}", "folder": folder.name}
    link = quote(os.path.relpath(folder / CARD, page))
    body = [
        parts.facts_list(facts | {name: format_score(value) for name, value in scores.items()} | dict(card.data)),
        parts.details("model card", (folder / CARD).read_text()),
        f'<p class="note">The card is <a href="{link}">{escape(folder.name)}/{CARD}</a>.</p>',
    ]
    return parts.section("model", "Model", join_lines(body))


def _pictures_section(run: Path, model: Path | None) -> str:
    folder = run / "pictures"
    latest = sorted(folder.glob("epoch_*.png"))[-1:]
    notes = {
        folder / WORST_AND_BEST: "The worst and best validation crops, by the weights that were kept",
        **dict.fromkeys(latest, "Validation crops after the last epoch"),
    }
    shown = [
        f"<article>{parts.inline_picture(file.read_bytes(), note)}</article>\n"
        f'<p class="note">{note}; a frame shows the place of the finest view.</p>'
        for file, note in notes.items()
        if file.is_file()
    ]
    if not shown:
        return ""
    legend = ""
    if model is not None and (model / FILE).is_file():
        preprocessing = Preprocessing.load(model)
        if len(preprocessing.class_colors) == len(preprocessing.class_names):
            legend = parts.class_legend_list(preprocessing.class_names, preprocessing.class_colors)
    return parts.section("examples", "Examples", join_lines([legend, *shown]))


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
        _model_section(model, folder) if model is not None else "",
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
