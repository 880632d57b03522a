"""``muvit evaluate``."""

import json
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.data.folders import class_legend, open_folder
from muvit.data.slides import SLIDE_SUFFIXES, Slide, open_slide
from muvit.errors import ExistsError, InputError
from muvit.evaluation.segmentation import evaluate_slides


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("prediction", type=Path, help="predicted labels: an image, or a folder of them")
    parser.add_argument("truth", type=Path, help="true labels: an image, or a folder with those of the same names")
    parser.add_argument(
        "--num_classes",
        type=int | None,
        default=None,
        help="classes, background included (default: as named in the labels)",
    )
    parser.add_argument(
        "--ignore_labels", type=list[int], default=[], help="true values that count nowhere, such as [14]"
    )
    parser.add_argument(
        "--output", type=Path | None, default=None, help="JSON file for the scores of every class and slide"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace that file")


def run(arguments: Namespace) -> None:
    """Print the scores, and write them if asked for."""
    output = arguments.output
    if output is not None and output.exists() and not arguments.overwrite:
        raise ExistsError(output)
    predictions, truths = _slides(arguments.prediction), _slides(arguments.truth)
    if len(predictions) == len(truths) == 1:
        pairs = [(next(iter(predictions.values())), next(iter(truths.values())))]
    else:
        missing = sorted(set(predictions) - set(truths))
        if missing:
            raise InputError(
                arguments.truth, expected="true labels of every predicted slide", got=f"none of {missing[0]!r}"
            )
        pairs = [(slide, truths[name]) for name, slide in predictions.items()]
    num_classes = arguments.num_classes or _count_classes(pairs[0])
    names = class_legend(pairs[0][0], num_classes)[0] | class_legend(pairs[0][1], num_classes)[0]
    result = evaluate_slides(
        pairs,
        num_classes,
        ignore=arguments.ignore_labels,
        class_names=[names.get(value, f"class {value}") for value in range(num_classes)],
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    print("\n".join(_lines(result.table())))


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
