"""``muvit evaluate``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.progress import Progress
from muvit.data.folders import class_legend, open_folder
from muvit.data.slides.formats import SLIDE_SUFFIXES
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.evaluation.results import result_files, write_results
from muvit.evaluation.score_picture import draw_scores
from muvit.evaluation.scores.bootstrap import BootstrapConfig
from muvit.evaluation.scores.boundaries import BoundaryConfig
from muvit.evaluation.scores.segmentation import Evaluation, evaluate_slides


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("prediction", type=Path, help="predicted labels: an image, or a folder of them")
    parser.add_argument("truth", type=Path, help="true labels: an image, or a folder with those of the same names")
    add_class_arguments(parser)
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
        help="folder for scores.json, scores.csv and scores.png, or a file with one of these suffixes",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace those files")


def add_class_arguments(parser: ArgumentParser) -> None:
    """Which labels are classes."""
    parser.add_argument(
        "--num_classes",
        type=int | None,
        default=None,
        help="classes, background included (default: as named in the labels)",
    )
    parser.add_argument(
        "--ignore_labels", type=list[int], default=[], help="true values that count nowhere, such as [14]"
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
    result = evaluate_paths(
        arguments.prediction, arguments.truth, arguments.num_classes, arguments.ignore_labels, boundary
    )
    write_results(
        files,
        lambda: result.to_dict(bootstrap),
        lambda: result.rows(bootstrap),
        lambda: draw_scores(result, bootstrap),
    )
    print("\n".join(_lines(result.table())))


def evaluate_paths(
    prediction: Path,
    truth: Path,
    num_classes: int | None,
    ignore: Sequence[int],
    boundary: BoundaryConfig | None = None,
) -> Evaluation:
    """Score predicted labels, or a folder of them; classes that are not counted are those that the labels name."""
    pairs = _pairs(prediction, truth)
    num_classes = num_classes or _count_classes(pairs[0])
    names = class_legend(pairs[0][0], num_classes)[0] | class_legend(pairs[0][1], num_classes)[0]
    with Progress("Scoring", "block") as progress:
        return evaluate_slides(
            pairs,
            num_classes,
            ignore=ignore,
            class_names=[names.get(value, f"class {value}") for value in range(num_classes)],
            boundary=boundary,
            progress=progress,
        )


def _pairs(prediction: Path, truth: Path) -> list[tuple[Slide, Slide]]:
    predictions, truths = _slides(prediction), _slides(truth)
    if len(predictions) == len(truths) == 1:
        return [(next(iter(predictions.values())), next(iter(truths.values())))]
    missing = sorted(set(predictions) - set(truths))
    if missing:
        raise InputError(truth, expected="true labels of every predicted slide", got=f"none of {missing[0]!r}")
    return [(slide, truths[name]) for name, slide in predictions.items()]


def _slides(path: Path) -> dict[str, Slide]:
    if path.is_dir() and not path.name.endswith(SLIDE_SUFFIXES):
        return open_folder(path)
    slide = open_slide(path)
    return {slide.name: slide}


def _count_classes(pair: tuple[Slide, Slide]) -> int:
    named = [value for slide in pair for value in class_legend(slide, 1 << 16)[0]]
    if not named:
        raise InputError("--num_classes", expected="a number, since the labels name no classes", got="none")
    return max(named) + 1


def _lines(rows: list[dict[str, str | float]]) -> list[str]:
    """Rows as aligned text, a header first."""
    cells = [list(rows[0])] + [[v if isinstance(v, str) else f"{v:.4f}" for v in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
