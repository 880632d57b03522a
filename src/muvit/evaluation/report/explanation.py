"""Page and picture of the explanation of one point: attention drawn on the views of every level, and ablations."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muvit.evaluation.report import parts
from muvit.evaluation.report.content import format_score
from muvit.evaluation.report.parts import render_page
from muvit.inference.explain import MAPS, Explanation
from muvit.levels import level_name
from muvit.pictures import RGB, Picture, outline_boxes, panel
from muvit.view_pictures import heat, view_row, with_one_contrast

_INTRO = (
    "The views of every level that the model sees, finest first, and over them the share of each patch in what reaches "
    "the marked point. Frames show the place of finer views in coarser ones."
)
_POINT_PX = 12


def draw_explanation(found: Explanation, *, size: int = 320) -> Image.Image:
    """The views side by side, and below them each map over all views; the point is a small square.

    Patches are as bright as their share, in a map all levels on one scale, whose top is the highest share but that of
    the point's own token. Of volumes, the planes that hold the point are shown.

    Args:
        found: the explanation.
        size: side of each picture, in pixels.
    """
    planes = with_one_contrast(np.stack([_plane(found, view, i) for i, view in enumerate(found.img)]))
    size_um = None if found.pixel_size_um is None else found.pixel_size_um[-1]
    rows = [_row(found, planes, size_um, size)]
    captions = [f"views of {found.slide}; the point is labelled {most_likely(found)}"]
    for name, shares in found.maps.items():
        others = shares.copy()
        others[(0, *found.token)] = 0
        scaled = shares / (others.max() or 1)
        heated = [heat(picture, _plane(found, scaled[i], i)) for i, picture in enumerate(planes)]
        parted = found.level_shares[name]
        titles = [f"level {level_name(v)}: {share:.0%}" for v, share in zip(found.levels, parted, strict=True)]
        row = _row(found, heated, size_um, size)
        rows.append([picture._replace(title=title) for picture, title in zip(row, titles, strict=True)])
        captions.append(MAPS[name])
    return panel(rows, size=size, captions=captions)


def explanation_page(found: Explanation, picture: Image.Image) -> str:
    """HTML of the page, which holds the picture and needs no other file."""
    shares = [
        {"map": name} | {f"level {level_name(v)}": s for v, s in zip(found.levels, of_levels, strict=True)}
        for name, of_levels in found.level_shares.items()
    ]
    classes = [{"class": name, "probability": value} for name, value in found.probabilities.items()]
    alt = f"views of {found.slide} around the point, and attention over them"
    sections = [
        parts.section("attention", "Attention", f"<article>{parts.inline_picture(picture, alt)}</article>"),
        parts.section("levels", "Share of each level", parts.rows_table(shares, "Shares of all patches of a level.")),
        parts.section("ablations", "Without parts of the input", parts.rows_table(ablation_rows(found), _CAPTION)),
        parts.section("classes", "Classes at the point", parts.rows_table(classes)),
        parts.section("environment", "Environment", parts.facts_list(parts.environment())),
    ]
    return render_page(f"Why {found.explained}?", _INTRO, _findings(found), sections)


_CAPTION = (
    "Probability of the explained class at the point, and its change; of what is random, means of several draws. "
    "Hidden tokens are seen by no other token; shuffled patches keep the pixels of a view, and lose their order."
)


def ablation_rows(found: Explanation) -> list[dict[str, Any]]:
    """A row for each ablation."""
    return [
        {
            "case": one.case,
            f"probability of {found.explained}": one.probability,
            "change": one.change,
            "label": one.label,
        }
        for one in found.ablations
    ]


def most_likely(found: Explanation) -> str:
    """The class of the point with its probability."""
    name = max(found.probabilities, key=found.probabilities.__getitem__)
    return f"{name} ({format_score(found.probabilities[name])})"


def _findings(found: Explanation) -> list[str]:
    place = ", ".join(f"{a:g}" for a in found.point)
    told = [f"The model labels the point {place} as {most_likely(found)}."]
    worst = min(found.ablations[1:], key=lambda one: one.change)
    if worst.change < 0:
        told.append(
            f"Of all that was taken away, most is lost with “{worst.case}”: the probability of {found.explained} falls "
            f"to {format_score(worst.probability)}, and the label is {worst.label}."
        )
    return told


def _plane(found: Explanation, values: NDArray[Any], level: int) -> NDArray[Any]:
    """The plane ``(..., H, W)`` of values ``(..., *space)`` of a view, in pixels or patches, that holds the point."""
    ndim = len(found.point)
    lower, upper = found.bbox[level]
    place = (np.asarray(found.point) - lower) / (upper - lower) * values.shape[-ndim:]
    last = np.array(values.shape[-ndim:]) - 1
    planes = np.clip(np.floor(place), 0, last).astype(int)[: ndim - 2]
    return np.asarray(values[(..., *planes.tolist(), slice(None), slice(None))])


def _row(found: Explanation, pictures: list[RGB], size_um: float | None, size: int) -> list[Picture]:
    """The views with frames and the point."""
    row = view_row(pictures, found.bbox, found.levels, size_um, size=size)
    marked = []
    for picture, (lower, upper) in zip(row, found.bbox[:, :, -2:], strict=True):
        center = (np.asarray(found.point[-2:]) - lower) / (upper - lower) * picture.pixels.shape[:2]
        box = np.stack([center - _POINT_PX / 2, center + _POINT_PX / 2])
        marked.append(picture._replace(pixels=outline_boxes(picture.pixels, box[None], colors=[(255, 255, 255)])))
    return marked
