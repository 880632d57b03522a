"""``muvit evaluate``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.terminal import Progress
from muvit.data.annotations.objects import read_config
from muvit.data.annotations.open import config_of
from muvit.data.folders import (
    class_legend,
    has_annotations,
    images_of_labels,
    is_slide_folder,
    label_files,
    open_label_images,
    open_labels,
)
from muvit.data.slides.slide import Slide
from muvit.errors import InputError, MuViTError
from muvit.evaluation.report.content import warn_if_it_fails
from muvit.evaluation.report.places import places_section
from muvit.evaluation.report.scores import scores_page
from muvit.evaluation.results import result_files, write_results
from muvit.evaluation.score_picture import draw_scores
from muvit.evaluation.scores.bootstrap import BootstrapConfig
from muvit.evaluation.scores.boundaries import BoundaryConfig
from muvit.evaluation.scores.segmentation import Evaluation, evaluate_slides
from muvit.levels import Level

MAX_CLASSES = 4096
"""Most classes to score: their confusion matrix is counted per slide."""


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("prediction", type=Path, help="predicted labels: an image, or a folder of them")
    parser.add_argument(
        "truth", type=Path, help="true labels: a label image or annotations, or a folder with those of the same names"
    )
    add_pair_arguments(parser)
    parser.add_argument(
        "--levels",
        type=list[float | list[float]],
        default=[],
        help="coarser levels to score as well, such as [8,32]: majority votes of true and of predicted labels",
    )
    parser.add_argument(
        "--boundary_tolerance",
        type=float | None,
        default=2.0,
        help="how far apart outlines may lie and still agree; null leaves boundary F1 and Hausdorff distance out",
    )
    parser.add_argument(
        "--boundary_unit", type=Literal["px", "um"], default="px", help="unit of that: finest pixels, or micrometers"
    )
    parser.add_argument(
        "--boundary_level", type=float, default=1.0, help="level of the labels to find outlines at; coarser is faster"
    )
    parser.add_argument("--num_resamples", type=int, default=1000, help="draws of the slides that make the intervals")
    parser.add_argument(
        "--output",
        type=Path | None,
        default=None,
        help="folder for scores.json, scores.csv, scores.png and scores.html, or a file with one of these suffixes",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace those files")


def add_pair_arguments(parser: ArgumentParser) -> None:
    """Add the options on classes, and on true slides without a prediction."""
    parser.add_argument(
        "--num_classes",
        type=int | None,
        default=None,
        help="classes, background included (default: as named in the labels)",
    )
    parser.add_argument(
        "--image",
        type=Path | None,
        default=None,
        help="the annotated image, or a folder of them (default: images/ beside the folder of the annotations)",
    )
    parser.add_argument(
        "--ignore_labels", type=list[int], default=[], help="true label values ignored in the scores, such as [14]"
    )
    parser.add_argument(
        "--has_background",
        type=bool | None,
        default=None,
        help="whether class 0 is background, which mDSC and the mean foreground IoU leave out (default: true, unless "
        "the predictions or the true labels say otherwise)",
    )
    parser.add_argument(
        "--allow_missing",
        "--allow-missing",
        action="store_true",
        help="score the slides that have a prediction, and name the others, instead of refusing",
    )


def run(arguments: Namespace) -> None:
    """Print the scores, and write them if asked for."""
    output = arguments.output
    files = [] if output is None else result_files(output, "scores", overwrite=arguments.overwrite)
    bootstrap = BootstrapConfig(num_resamples=arguments.num_resamples)
    boundary = None
    if arguments.boundary_tolerance is not None:
        boundary = BoundaryConfig(
            tolerance=arguments.boundary_tolerance, unit=arguments.boundary_unit, level=arguments.boundary_level
        )
    result = evaluate_paths(arguments.prediction, arguments, boundary, arguments.levels)
    write_results(
        files,
        lambda: result.to_dict(bootstrap),
        lambda: result.rows(bootstrap),
        lambda: draw_scores(result, bootstrap),
        lambda: scores_page(result, bootstrap, _places(arguments, result)),
    )
    print("\n".join(_report(result)))


def _places(arguments: Namespace, result: Evaluation) -> str:
    """Section of the report with the worst and best places; images are shown if they are where images usually are."""
    pairs, _ = _pairs(arguments.prediction, arguments.truth, arguments.image, arguments.allow_missing)
    try:
        images = images_of_labels(label_files(arguments.truth), arguments.image)
    except MuViTError:
        images = {}
    with warn_if_it_fails("the worst and best places"):
        return places_section(result, pairs, images)
    return ""


def evaluate_paths(
    prediction: Path, arguments: Namespace, boundary: BoundaryConfig | None = None, levels: Sequence[Level] = ()
) -> Evaluation:
    """Score predicted labels, or a folder of them; classes that are not counted are those that the labels name.

    Args:
        prediction: labels, or a folder of them.
        arguments: ``truth`` and what `add_pair_arguments` adds.
        boundary: how to compare outlines.
        levels: coarser levels to score as well.
    """
    pairs, missing = _pairs(prediction, arguments.truth, arguments.image, arguments.allow_missing)
    num_classes = arguments.num_classes or _count_classes(pairs[0])
    if not 1 <= num_classes <= MAX_CLASSES:
        raise InputError("--num_classes", expected=f"1 to {MAX_CLASSES}", got=num_classes)
    names = class_legend(pairs[0][0], num_classes)[0] | class_legend(pairs[0][1], num_classes)[0]
    has_background = arguments.has_background
    if has_background is None:
        has_background = all(slide.has_background for pair in pairs for slide in pair)
    with Progress("Scoring", "block") as progress:
        result = evaluate_slides(
            pairs,
            num_classes,
            ignore=arguments.ignore_labels,
            class_names=[names.get(value, f"class {value}") for value in range(num_classes)],
            has_background=has_background,
            levels=levels,
            boundary=boundary,
            progress=progress,
        )
    return replace(result, missing=tuple(missing))


def _pairs(
    prediction: Path, truth: Path, image: Path | None, allow_missing: bool
) -> tuple[list[tuple[Slide, Slide]], list[str]]:
    """Predictions with their truth, and the names of true slides without a prediction.

    A prediction that is no folder is the one that shall be scored: then no other is missing.
    """
    predictions = open_label_images([prediction])
    truths = (
        _annotated(truth, image, next(iter(predictions.values())))
        if has_annotations(truth)
        else open_label_images([truth])
    )
    if len(predictions) == len(truths) == 1:
        return [(next(iter(predictions.values())), next(iter(truths.values())))], []
    unknown = sorted(set(predictions) - set(truths))
    if unknown:
        raise InputError(truth, expected="true labels of every predicted slide", got=f"none of {_quoted(unknown)}")
    missing = sorted(set(truths) - set(predictions)) if is_slide_folder(prediction) else []
    if missing and not allow_missing:
        raise InputError(
            prediction,
            expected=f"a prediction of every slide in {truth}",
            got=f"none of {_quoted(missing)}",
            hint="Predict them, or score the others alone (--allow_missing).",
        )
    return [(slide, truths[name]) for name, slide in predictions.items()], missing


def _annotated(truth: Path, image: Path | None, prediction: Slide) -> dict[str, Slide]:
    """True labels from annotations; classes that are not stated have the values that they have in the predictions."""
    stated = read_config(truth if truth.is_dir() else truth.parent)
    files = label_files(truth)
    return open_labels(files, images_of_labels(files, image), annotations=stated or config_of(prediction))


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _count_classes(pair: tuple[Slide, Slide]) -> int:
    named = [value for slide in pair for value in class_legend(slide, 1 << 16)[0]]
    if not named:
        raise InputError("--num_classes", expected="a number, since the labels name no classes", got="none")
    return max(named) + 1


def _report(result: Evaluation) -> list[str]:
    """Dice of each slide, the scores of each class, and what no table holds."""
    values = result.summary()
    totals = {"mDSC": "mean_dice", "mIoU": "mean_iou", "mean foreground IoU": "mean_foreground_iou"}
    totals |= {"accuracy": "accuracy", "mean slide Dice": "mean_slide_dice"}
    lines = [*_lines(result.table()), "", *_lines(result.class_table()), ""]
    lines += [*_lines(result.level_table()), ""] if result.levels else []
    lines += [f"{title:<19}  {values[name]:.4f}" for title, name in totals.items()]
    if result.missing:
        lines += ["", f"Not scored, as there is no prediction: {', '.join(result.missing)}"]
    return lines


def _lines(rows: list[dict[str, str | float]]) -> list[str]:
    """Rows as aligned text, a header first."""
    cells = [list(rows[0])] + [[v if isinstance(v, str) else f"{v:.4f}" for v in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
