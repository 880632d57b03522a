"""Test images beside their truth and predictions, as HTML with PNG files."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muvit.evaluation.report.content import Example, ModelResult, check_example
from muvit.evaluation.report.failures import warn_if_it_fails
from muvit.evaluation.report.words import join_lines
from muvit.pictures import IGNORED_COLOR, RGB, Color, colorize, fit, outline_boxes

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
