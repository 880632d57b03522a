"""Worst and best places of predicted labels: where on the slide they lie, and what is there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muvit.data.folders import class_legend
from muvit.data.slides.derived import match_grid
from muvit.data.slides.slide import Slide
from muvit.evaluation.report import parts
from muvit.evaluation.report.content import join_lines, warn_if_it_fails
from muvit.evaluation.report.examples import read_aligned
from muvit.evaluation.scores.segmentation import Evaluation
from muvit.metrics import confusion_matrix, scores
from muvit.pictures import Color, Picture, class_colors, colorize, outline_boxes, panel, to_rgb

_SIDE_PX = 256
_WINDOW_FRACTION = 5
_COUNT = 2


@dataclass(frozen=True, kw_only=True)
class LabelledPlace:
    """A square of a slide, and its score."""

    title: str
    score: float
    """mDSC of the square, of labels as read for a page."""
    window: NDArray[np.int64]
    """Box ``(2, 2)`` in yx, in pixels of the arrays."""
    image: NDArray[np.generic] | None
    """``(C, H, W)`` of the whole slide; None if there is no image."""
    truth: NDArray[np.integer]
    """``(H, W)``."""
    prediction: NDArray[np.integer]
    """``(H, W)``."""


def find_places(
    result: Evaluation, pairs: Sequence[tuple[Slide, Slide]], images: Mapping[str, Slide] | None = None
) -> list[LabelledPlace]:
    """The worst place of each of the two worst slides, and the best place of each of the two best.

    Places are squares of a fifth of the shorter side, on a grid of half squares, scored in pixels as large as a page
    shows them; squares without foreground are left out.

    Args:
        result: scores of the slides.
        pairs: predicted and true labels of the slides, of equal shapes, in the order of ``result.slides``.
        images: image of a slide by the name of its true labels, as far as there are any.
    """
    known = [i for i, alone in enumerate(result.slide_scores) if not np.isnan(alone.mean_dice)]
    order = sorted(known, key=lambda i: result.slide_scores[i].mean_dice)
    count = min(_COUNT, -(-len(order) // 2))
    chosen = [("worst", i, 1) for i in order[:count]] + [("best", i, -1) for i in reversed(order[-count:])]
    places = []
    for title, index, sign in chosen if order else []:
        prediction, truth = pairs[index]
        with warn_if_it_fails(f"a place of {truth.name}"):
            image = (images or {}).get(truth.name)
            shown = [truth, prediction, *([image] if image is not None and image.shape == truth.shape else [])]
            true, predicted, *pixels = read_aligned(shown)
            found = _score_windows(result, true[0], predicted[0])
            if found:
                score, window = min(found, key=lambda one: sign * one[0])
                places.append(
                    LabelledPlace(
                        title=f"{title}: {truth.name}, mDSC of the place {score:.3f}",
                        score=score,
                        window=window,
                        image=pixels[0] if pixels else None,
                        truth=true[0],
                        prediction=predicted[0],
                    )
                )
    return places


def _score_windows(
    result: Evaluation, truth: NDArray[np.integer], prediction: NDArray[np.integer]
) -> list[tuple[float, NDArray[np.int64]]]:
    """Scores and boxes of the squares of a label image that hold foreground."""
    side = max(1, min(truth.shape) // _WINDOW_FRACTION)
    starts = [sorted({*range(0, extent - side, max(1, side // 2)), extent - side}) for extent in truth.shape]
    found = []
    for y in starts[0]:
        for x in starts[1]:
            part = np.s_[y : y + side, x : x + side]
            confusion = confusion_matrix(truth[part], prediction[part], len(result.class_names), result.ignore)
            score = scores(confusion, ignore=result.ignore, has_background=result.has_background).mean_dice
            if not np.isnan(score):
                found.append((score, np.array([[y, x], [y + side, x + side]])))
    return found


def places_section(
    result: Evaluation, pairs: Sequence[tuple[Slide, Slide]], images: Mapping[str, Slide] | None = None
) -> str:
    """HTML of `find_places` with pictures and a legend; empty if there are none."""
    pairs = [(match_grid(prediction, truth), truth) for prediction, truth in pairs]
    places = find_places(result, pairs, images)
    if not places:
        return ""
    names, count = result.class_names, len(result.class_names)
    own = class_legend(pairs[0][0], count)[1] | class_legend(pairs[0][1], count)[1]
    colors = [own.get(value, default) for value, default in enumerate(class_colors(count))]
    rows = [_row(place, colors, result.ignore) for place in places]
    picture = panel(rows, size=_SIDE_PX, captions=[place.title for place in places])
    note = (
        "Places of the lowest mDSC in the worst slides, and of the highest in the best: whole slides, and their frames."
    )
    body = [
        parts.class_legend_list(names, colors),
        f"<article>{parts.inline_picture(picture, note)}</article>",
        f'<p class="note">{note}</p>',
    ]
    return parts.section("places", "Worst and best places", join_lines(body))


def _row(place: LabelledPlace, colors: Sequence[Color], ignore: Sequence[int]) -> list[Picture]:
    truth, prediction = (colorize(labels, colors, ignore=ignore) for labels in (place.truth, place.prediction))
    whole = truth if place.image is None else to_rgb(place.image)
    (top, left), (bottom, right) = place.window
    part = np.s_[top:bottom, left:right]
    framed = outline_boxes(whole, place.window[None], colors=[(255, 255, 255)])
    shown = [] if place.image is None else [Picture("image", whole[part])]
    return [
        Picture("slide", framed),
        *shown,
        Picture("truth", truth[part], True),
        Picture("prediction", prediction[part], True),
    ]
