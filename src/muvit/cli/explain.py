"""``muvit explain``."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.slides import add_pixel_size, add_selection, selection
from muvit.errors import ExistsError, InputError

_FILES = ("index.html", "explanation.png", "explanation.json")


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", type=Path, help="folder of a trained multi-resolution segmenter, or of its run")
    parser.add_argument("slide", type=Path, help="image with the point")
    parser.add_argument(
        "--at", type=str, required=True, help="the point y,x (volumes: z,y,x) in pixels of the finest level"
    )
    parser.add_argument("--output", type=Path, required=True, help=f"folder that receives {', '.join(_FILES)}")
    parser.add_argument(
        "--label", type=str | None, default=None, help="class to explain (default: the most likely one at the point)"
    )
    parser.add_argument("--draws", type=int, default=8, help="repetitions of what is random, of which means are taken")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws")
    parser.add_argument(
        "--device", type=str | None, default=None, help="cpu, cuda, mps (default: a GPU if there is one)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier explanation")
    add_pixel_size(parser)
    add_selection(parser)


def run(arguments: Namespace) -> None:
    """Explain the point, write page, picture and numbers, and print the ablations."""
    point = _point(arguments.at)
    if arguments.draws < 1:
        raise InputError("draws", expected="a whole number of at least 1", got=arguments.draws)
    page, png, numbers = (arguments.output / name for name in _FILES)
    for file in (page, png, numbers):
        if file.exists() and not arguments.overwrite:
            raise ExistsError(file)

    from muvit.data.slides.open import open_slide
    from muvit.evaluation.report.explanation import draw_explanation, explanation_page
    from muvit.evaluation.results import write_results
    from muvit.inference.explain import explain_point
    from muvit.models.segmenter import Segmenter
    from muvit.models.trained import load_model

    trained = load_model(arguments.model, kind=Segmenter)
    slide = open_slide(arguments.slide, pixel_size_um=arguments.pixel_size_um, **selection(arguments))
    chosen = {name: arguments[name] for name in ("label", "draws", "seed", "device")}
    found = explain_point(trained, slide, point, **chosen)
    picture = draw_explanation(found)
    write_results([page, png, numbers], found.to_json, list, lambda: picture, lambda: explanation_page(found, picture))
    for ablation in found.ablations:
        print(f"{ablation.case:<50} {found.explained} {ablation.probability:.4f} ({ablation.change:+.4f})")
    print(page)


def _point(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError("--at", expected="numbers y,x", got=text) from error
