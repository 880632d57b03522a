"""The report of an experiment: one HTML page with pictures that tells what was compared and what came out."""

import logging
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muvit.durable import write_whole
from muvit.errors import ExistsError, InputError, ShapeError
from muvit.evaluation.scores.bootstrap import Interval
from muvit.pictures import IGNORED_COLOR, MANY_POINTS, RGB, Color, colorize, fit, outline_boxes, plot_curves

_LOG = logging.getLogger(__name__)

SMALL_DIFFERENCE = 0.02
"""Differences of mDSC below this are called equal in the text: another seed can make as much."""

FOUND_DICE = 0.05
"""Dice from which a class counts as found by a model."""

_PICTURE_PX = 640  # longer side of a whole picture, enough for the widest column at double density
_INSET_PX = 480
_INSET_SHARE = 4  # the inset shows one of so many parts of the shorter side
_MAX_CLASS_COLUMNS = 6  # more classes get a table of their own, one row each
_INSET_COLOR: Color = (255, 255, 255)
_STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """What one model is and what it reached in one training run."""

    name: str
    description: str
    """What sets it apart, one sentence."""
    dice: Mapping[str, float]
    """Dice of each scored foreground class by name, 0 to 1; NaN where a class neither occurs nor is predicted."""
    mean_dice: float
    """mDSC: mean over the foreground classes."""
    behind: Interval | None = None
    """Interval, over the test slides, of the mDSC of the model in question minus this one's; None if there is none."""
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    """Training steps and values of each curve by name, as ``train_loss``; models share names to be drawn together."""
    seconds: float
    """Training time."""
    parameters: int
    """Trainable parameters."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One test image with its truth and what the models made of it, all of one size."""

    title: str
    image: RGB
    """``(H, W, 3)``, as `muvit.pictures.to_rgb` gives it."""
    truth: NDArray[np.integer]
    """``(H, W)``."""
    predictions: Mapping[str, NDArray[np.integer]]
    """``(H, W)`` of each model, by its name."""


def write_report(
    folder: str | Path,
    *,
    title: str,
    intro: str,
    models: Sequence[ModelResult],
    class_names: Sequence[str],
    class_colors: Sequence[Color],
    examples: Sequence[Example] = (),
    settings: Mapping[str, object] | None = None,
    outputs: Mapping[str, str] | None = None,
    ignore: Sequence[int] = (),
    overwrite: bool = False,
) -> Path:
    """Write ``index.html`` and ``pictures/`` into a folder; the page needs no network, no server and no JavaScript.

    The page appears as a whole or not at all: it is moved into place when all its pictures are there. A picture that
    cannot be drawn is left out, with a warning in the log.

    Args:
        folder: where to write; made if it is missing, other files in it are left alone.
        title: headline.
        intro: one paragraph: the task, and why the models differ.
        models: the model in question first, then its controls; all scored on the same images.
        class_names: of all classes, from class 0, the background.
        class_colors: of all classes, from class 0.
        examples: test images to show.
        settings: what somebody needs to know to run this again, value by name.
        outputs: OME-Zarr images and labels to open, path relative to ``folder`` by name, the image first.
        ignore: label values that are no classes, shown grey.
        overwrite: replace a report that is there already.

    Returns:
        Path of ``index.html``.

    Raises:
        ExistsError: there is a report and ``overwrite`` was not asked for.
        InputError: there are no models, two of one name, or names, classes and curves do not fit together; found before
            anything is written.
    """
    _check(models, class_names, class_colors)
    folder = Path(folder)
    page = folder / "index.html"
    if page.exists() and not overwrite:
        raise ExistsError(page)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    page.unlink(missing_ok=True)  # from here to the end its pictures would belong to another page
    sections = [
        _results(models),
        _examples(examples, models, class_names, class_colors, ignore, pictures),
        _curves(models, pictures),
        _settings(settings or {}),
        _outputs(outputs or {}),
    ]
    write_whole(page, _page(title, intro, conclusion(models), sections).encode())
    return page


def conclusion(models: Sequence[ModelResult]) -> list[str]:
    """What the scores say, as sentences: how the first model compares with the best of the others, good or bad."""
    first, controls = models[0], [model for model in models[1:] if not math.isnan(model.mean_dice)]
    if math.isnan(first.mean_dice):
        return [f"No foreground class occurs in the test images or in what {first.name} predicts: there is no score."]
    score = f"{first.name} reaches an mDSC of {_score(first.mean_dice)}"
    if not controls:
        return [f"{score}. There is no control to compare it with."]
    best = max(controls, key=lambda model: model.mean_dice)
    gain = first.mean_dice - best.mean_dice
    rival = f"{'the control' if len(models) == 2 else 'the best control'}, {best.name} ({_score(best.mean_dice)})"
    if abs(gain) < SMALL_DIFFERENCE:
        sentences = [f"{score}, and {rival} is as good within {SMALL_DIFFERENCE:.2f}."]
    else:
        sentences = [f"{score}, {_score(abs(gain))} {'above' if gain > 0 else 'below'} {rival}."]
    sentences += _verdict(first, best, gain)
    lost = [name for name, dice in first.dice.items() if any(m.dice[name] > dice for m in controls)]
    if lost and gain > -SMALL_DIFFERENCE:
        sentences.append(f"A control has the higher Dice on {_listed(lost)}.")
    sentences.append("Each model was trained once; another seed would move these figures a little.")
    return sentences


def _verdict(first: ModelResult, best: ModelResult, gain: float) -> list[str]:
    """What the difference to the best control means, if it can be told."""
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


@contextmanager
def warn_if_it_fails(what: str) -> Iterator[None]:
    """Make an error one warning, where a page without this part is better than none."""
    try:
        yield
    except Exception as error:
        _LOG.warning("%s could not be drawn and is left out: %s", what, error)


def _check(models: Sequence[ModelResult], class_names: Sequence[str], class_colors: Sequence[Color]) -> None:
    names = [model.name for model in models]
    if not models or len(set(names)) != len(names):
        raise InputError("models", expected="at least one, of different names", got=names)
    for model in models:
        classes = list(models[0].dice)
        if list(model.dice) != classes:
            raise InputError(f"dice of {model.name!r}", expected=f"the classes {classes}", got=list(model.dice))
        for curve, (steps, values) in model.curves.items():
            if len(steps) != len(values):
                raise ShapeError(f"{curve} of {model.name!r}", expected=f"{len(steps)} values", got=len(values))
    if len(class_names) != len(class_colors):
        raise InputError("class_colors", expected=f"{len(class_names)} colours, one per class", got=len(class_colors))


def _check_example(example: Example, models: Sequence[ModelResult]) -> None:
    names = [model.name for model in models]
    if set(example.predictions) != set(names):
        expected, got = f"one of each model, {names}", [*example.predictions]
        raise InputError(f"predictions of {example.title!r}", expected=expected, got=got)
    shape = example.image.shape[:2]
    for name, labels in {"truth": example.truth, **example.predictions}.items():
        if labels.shape != shape:
            raise ShapeError(f"{name} of {example.title!r}", expected=f"{shape}, as its image", got=labels.shape)


# -- sections ------------------------------------------------------------------------------------------------------


def _results(models: Sequence[ModelResult]) -> str:
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
            f"{_cells([*cells, _count(model.parameters), _duration(model.seconds)])}</tr>"
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
        tables.append(f'<p class="note">Neither in the test images nor predicted: {escape(_listed(unscored))}.</p>')
    return f"""<section aria-labelledby="results">
<h2 id="results">Results</h2>
{_lines(tables)}
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
{_lines(rows)}
</tbody>
</table></div>"""


def _cells(texts: Iterable[str]) -> str:
    return "".join(f'<td class="number">{text}</td>' for text in texts)


def _mark_best(values: Sequence[float]) -> list[str]:
    """Scores as written, the highest of several in bold; what is written equal is bold together."""
    texts = list(map(_score, values))
    known = [value for value in values if not math.isnan(value)]
    best = _score(max(known)) if known and len(values) > 1 else None
    return [f"<strong>{text}</strong>" if text == best else text for text in texts]


def _examples(
    examples: Sequence[Example],
    models: Sequence[ModelResult],
    names: Sequence[str],
    colors: Sequence[Color],
    ignore: Sequence[int],
    pictures: Path,
) -> str:
    if not examples:
        return ""
    entries = list(zip(names, colors, strict=True))
    if any(np.isin(example.truth, tuple(ignore)).any() for example in examples):
        entries.append(("not scored", IGNORED_COLOR))
    legend = "".join(
        f'<li><span class="swatch" style="background:rgb({r} {g} {b})"></span>{escape(name)}</li>'
        for name, (r, g, b) in entries
    )
    articles = []
    for number, example in enumerate(examples):
        with warn_if_it_fails(example.title):
            articles.append(_article(f"example-{number}", example, models, colors, ignore, pictures))
    if not articles:
        return ""
    return f"""<section aria-labelledby="examples">
<h2 id="examples">What the models see and say</h2>
<p>Each column shows the whole image above and the framed part of it, magnified, below. The part was chosen by the
truth alone, where most classes meet.</p>
<ul class="legend" aria-label="Colours of the classes">{legend}</ul>
{_lines(articles)}
</section>"""


def _article(
    stem: str,
    example: Example,
    models: Sequence[ModelResult],
    colors: Sequence[Color],
    ignore: Sequence[int],
    pictures: Path,
) -> str:
    _check_example(example, models)
    window = inset_window(example.truth, ignore)
    columns = [("Input", example.image, False), ("Truth", colorize(example.truth, colors, ignore=ignore), True)]
    for model in models:
        columns.append((model.name, colorize(example.predictions[model.name], colors, ignore=ignore), True))
    figures = [
        _figure(pictures, f"{stem}-{column}", example.title, *picture, window=window)
        for column, picture in enumerate(columns)
    ]
    return f'<article><h3>{escape(example.title)}</h3>\n<div class="row">\n{_lines(figures)}\n</div></article>'


def _figure(
    pictures: Path, stem: str, example: str, name: str, pixels: RGB, is_labels: bool, *, window: NDArray[np.int64]
) -> str:
    (top, left), (bottom, right) = window
    whole = fit(pixels, min(_PICTURE_PX, max(pixels.shape)), is_labels=is_labels)
    whole = outline_boxes(whole, window[None] * (whole.shape[0] / pixels.shape[0]), colors=[_INSET_COLOR])
    inset = fit(pixels[top:bottom, left:right], _INSET_PX, is_labels=is_labels)
    images = []
    for part, shown, what in (("whole", whole, "whole image"), ("inset", inset, "magnified part")):
        file = f"{stem}-{part}.png"
        Image.fromarray(shown).save(pictures / file, optimize=True)
        images.append(
            f'<img src="pictures/{file}" width="{shown.shape[1]}" height="{shown.shape[0]}" loading="lazy"'
            f' alt="{escape(f"{name} of {example}, {what}")}">'
        )
    return f"<figure><figcaption>{escape(name)}</figcaption>{''.join(images)}</figure>"


def inset_window(truth: NDArray[np.integer], ignore: Sequence[int] = ()) -> NDArray[np.int64]:
    """Box ``(2, 2)`` in yx of the square of a label image where most classes are well represented, corners on pixels.

    Of squares of a quarter of the shorter side on a grid of half squares, the one whose pixels are the most evenly
    shared by foreground classes: the sum over the classes of the square root of their pixels is largest.

    Args:
        truth: ``(H, W)``.
        ignore: label values that are no classes.
    """
    side = max(1, min(truth.shape) // _INSET_SHARE)
    step = max(1, side // 2)
    starts = [sorted({*range(0, extent - side, step), extent - side}) for extent in truth.shape]
    merit = np.zeros(tuple(map(len, starts)))
    for value in set(np.unique(truth).tolist()) - {0, *ignore}:
        sums = np.pad((truth == value).cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))
        rows, columns = np.ix_(*starts)
        merit += np.sqrt(
            sums[rows + side, columns + side]
            - sums[rows, columns + side]
            - sums[rows + side, columns]
            + sums[rows, columns]
        )
    row, column = np.unravel_index(int(merit.argmax()), merit.shape)
    corner = np.array([starts[0][row], starts[1][column]], dtype=np.int64)
    return np.stack([corner, corner + side])


def _curves(models: Sequence[ModelResult], pictures: Path) -> str:
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
{_lines(figures)}
</div>
</section>"""


def _curve(stem: str, label: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], pictures: Path) -> str:
    for is_dark, suffix in ((False, "light"), (True, "dark")):
        plot = plot_curves(series, xlabel="training step", ylabel=label, is_dark=is_dark)
        plot.save(pictures / f"{stem}-{suffix}.png", optimize=True)
    last = "; ".join(f"{model} ends at {_score(y[-1])}" for model, (_, y) in series.items() if len(y))
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


def _settings(settings: Mapping[str, object]) -> str:
    if not settings:
        return ""
    items = _lines(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in settings.items()
    )
    return f"""<section aria-labelledby="settings">
<h2 id="settings">Settings</h2>
<dl>
{items}
</dl>
</section>"""


def _outputs(outputs: Mapping[str, str]) -> str:
    if not outputs:
        return ""
    paths = list(outputs.values())
    napari = "napari --plugin napari-ome-zarr " + " ".join(map(shlex.quote, paths))
    python = f"""from muvit.data.slides.open import open_slide

slide = open_slide({paths[0]!r})
print(slide.shape, slide.levels, slide.channel_names)
pixels = slide.read(1, (0, 0), (256, 256))  # level, start, size -> (channels, y, x)"""
    items = _lines(f"<li>{escape(name)}: <code>{escape(path)}</code></li>" for name, path in outputs.items())
    return f"""<section aria-labelledby="open">
<h2 id="open">Open the images and labels</h2>
<p>They are OME-Zarr 0.5 pyramids; the paths start from the folder of this page:</p>
<ul>
{items}
</ul>
<p>In napari, started in that folder (<code>pip install "napari[all]" napari-ome-zarr</code>):</p>
<pre tabindex="0"><code>{escape(napari)}</code></pre>
<p>In Python:</p>
<pre tabindex="0"><code>{escape(python)}</code></pre>
</section>"""


# -- words and numbers ---------------------------------------------------------------------------------------------


def _score(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def _count(number: int) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s"


def _lines(parts: Iterable[str]) -> str:
    return "\n".join(parts)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# -- page ----------------------------------------------------------------------------------------------------------


def _page(title: str, intro: str, findings: Sequence[str], sections: Sequence[str]) -> str:
    lead, *rest = map(escape, findings)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="intro">{escape(intro)}</p>
<p class="finding"><strong>{lead}</strong> {" ".join(rest)}</p>
</header>
<main>
{_lines(filter(None, sections))}
</main>
<footer><p>Written by muvit: every token knows where in the world it is.</p></footer>
</body>
</html>
"""
