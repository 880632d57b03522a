"""Pictures of a report: training curves, and test images beside their truth and predictions."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muvit.data.slides.slide import Slide
from muvit.evaluation.charts import MANY_POINTS, plot_curves
from muvit.evaluation.report.content import (
    Example,
    ModelResult,
    check_example,
    format_score,
    join_lines,
    warn_if_it_fails,
)
from muvit.pictures import IGNORED_COLOR, RGB, Color, colorize, fit, outline_boxes, to_rgb

PICTURE_PX = 1024
"""Longest side of a slide as shown in the report."""

LabelledSlide = tuple[Slide, Slide]
"""An image and its true labels."""


def spread(pairs: Sequence[LabelledSlide], count: int) -> list[LabelledSlide]:
    """At most ``count`` of the slides, evenly spaced."""
    chosen = (
        np.linspace(0, len(pairs) - 1, min(count, len(pairs)) + 2)[1:-1] if len(pairs) > count else range(len(pairs))
    )
    return [pairs[int(i)] for i in chosen]


def read_examples(pairs: Sequence[LabelledSlide], labels: Mapping[str, Mapping[str, Slide]]) -> list[Example]:
    """Read slides with their true and predicted labels, small enough for a report.

    Args:
        pairs: images with their true labels.
        labels: predicted labels by name of the model, and by name of the slide.
    """
    examples = []
    for image, truth in pairs:
        with warn_if_it_fails(f"{image.name} in the report"):
            predictions = {name: found[truth.name] for name, found in labels.items()}
            shown, true, *predicted = read_aligned([image, truth, *predictions.values()])
            examples.append(
                Example(
                    title=image.name,
                    image=to_rgb(shown),
                    truth=true[0],
                    predictions={name: own[0] for name, own in zip(predictions, predicted, strict=True)},
                )
            )
    return examples


def read_aligned(slides: Sequence[Slide]) -> list[NDArray[np.generic]]:
    """The same pixels of slides of one shape, each ``(C, H, W)``; of volumes the middle slice.

    They are those of a level that all store, every n-th along each axis if even the coarsest is larger than
    `PICTURE_PX`; nothing larger than a row is read then.
    """
    common = [level for level in slides[0].levels if all(level in slide.levels for slide in slides)]
    fitting = [level for level in common if max(slides[0].level_shape(level)) <= PICTURE_PX]
    level = fitting[0] if fitting else common[-1]
    # pyramids of other make may round the extent of a level up or down
    *slices, height, width = np.min([slide.level_shape(level) for slide in slides], axis=0).tolist()
    step = -(-max(height, width) // PICTURE_PX)
    rows = [(0, height)] if step == 1 else [(row, 1) for row in range(step // 2, height, step)]

    def read(slide: Slide, row: int, count: int) -> NDArray[np.generic]:
        pixels = slide.read(level, (*(n // 2 for n in slices), row, 0), (*(1 for _ in slices), count, width))
        return pixels.reshape(-1, count, width)[..., step // 2 :: step]

    return [np.concatenate([read(slide, *band) for band in rows], axis=1) for slide in slides]


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


_PICTURE_PX = 640  # longer side of a whole picture, enough for the widest column at double density
_INSET_PX = 480
_INSET_FRACTION = 4  # the inset shows one of so many parts of the shorter side
_INSET_COLOR: Color = (255, 255, 255)


def examples_section(
    examples: Sequence[Example],
    models: Sequence[ModelResult],
    names: Sequence[str],
    colors: Sequence[Color],
    ignore: Sequence[int],
    pictures: Path,
) -> str:
    """HTML of the section with the examples; empty if there are none.

    Args:
        examples: what to show.
        models: whose predictions, in this order.
        names: of the classes.
        colors: of the classes.
        ignore: label values that are no classes.
        pictures: folder that receives the PNG files.
    """
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
<h2 id="examples">Examples</h2>
<p>Each column shows the whole image above and the framed part of it, magnified, below. The part was chosen by the
truth alone, where most classes meet.</p>
<ul class="legend" aria-label="Colours of the classes">{legend}</ul>
{join_lines(articles)}
</section>"""


def _article(
    stem: str,
    example: Example,
    models: Sequence[ModelResult],
    colors: Sequence[Color],
    ignore: Sequence[int],
    pictures: Path,
) -> str:
    check_example(example, models)
    window = inset_window(example.truth, ignore)
    columns = [("Input", example.image, False), ("Truth", colorize(example.truth, colors, ignore=ignore), True)]
    for model in models:
        columns.append((model.name, colorize(example.predictions[model.name], colors, ignore=ignore), True))
    figures = [
        _figure(pictures, f"{stem}-{column}", example.title, *picture, window=window)
        for column, picture in enumerate(columns)
    ]
    return f'<article><h3>{escape(example.title)}</h3>\n<div class="row">\n{join_lines(figures)}\n</div></article>'


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
    side = max(1, min(truth.shape) // _INSET_FRACTION)
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
