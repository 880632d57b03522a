"""``muvit classify``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.slides import add_nonfinite, add_pixel_size, add_selection, open_selected, with_nonfinite
from muvit.cli.terminal import Progress
from muvit.errors import InputError
from muvit.evaluation.results import result_files, write_results

if TYPE_CHECKING:
    from muvit.inference.classify import SlideClass


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", type=Path, help="folder of a trained classifier, or of the run that made it")
    parser.add_argument("slide", nargs="+", type=Path, help="images to classify, or folders of them")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for classes.json, classes.csv and classes.png, or a file with one of these suffixes",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace those files")
    parser.add_argument(
        "--num_crops", type=int | None, default=64, help="random crops of each image; null takes every tile"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the crops")
    parser.add_argument("--batch_size", type=int, default=8, help="crops computed at once")
    parser.add_argument(
        "--device", type=str | None, default=None, help="cpu, cuda, mps (default: a GPU if there is one)"
    )
    add_nonfinite(parser)
    add_pixel_size(parser)
    add_selection(parser)
    parser.add_argument(
        "--classes",
        type=Path | None,
        default=None,
        help="CSV file with a column name and one of true classes, to score the answers",
    )
    parser.add_argument("--column", type=str, default="group", help="name of the column of classes")


def run(arguments: Namespace) -> None:
    """Classify each slide."""
    from muvit.data.folders import image_files
    from muvit.data.tables import read_column, values_of
    from muvit.inference.classify import plan_classification, run_classification
    from muvit.models.classifier import Classifier
    from muvit.models.trained import load_model

    files = result_files(arguments.output, "classes", overwrite=arguments.overwrite)
    trained = load_model(arguments.model, kind=Classifier)
    preprocessing = with_nonfinite(trained.preprocessing, arguments)
    trained = replace(trained, preprocessing=preprocessing)
    settings = {name: arguments[name] for name in ("num_crops", "seed", "batch_size", "device")}
    planned = [  # all before any work starts
        plan_classification(trained, open_selected(arguments, path), **settings)
        for path in image_files(arguments.slide)
    ]
    names = [one.name for one in planned]
    if len(set(names)) < len(names):
        raise InputError("slide", expected="images of different names", got=", ".join(names))
    truth = None
    if arguments.classes is not None:
        truth = values_of(names, read_column(arguments.classes, arguments.column), arguments.classes)
        _check_classes(truth, preprocessing.class_names, arguments.classes)
    found = []
    for one in planned:
        with Progress(one.name, "crop") as progress:
            found.append(run_classification(one, progress=progress))
    _report(found, preprocessing.class_names, truth, files)


def _report(
    found: Sequence["SlideClass"], class_names: Sequence[str], truth: Mapping[str, str] | None, files: list[Path]
) -> None:
    """Write the classes of the slides, and print them."""
    import numpy as np

    from muvit.evaluation.charts import draw_matrix, new_figure, to_image
    from muvit.metrics import class_scores

    rows: list[dict[str, Any]] = []
    for slide in found:
        shares = slide.probabilities
        row = {"name": slide.name, "class": class_names[int(shares.argmax())]}
        row |= {} if truth is None else {"truth": truth[slide.name]}
        rows.append(row | {f"probability/{c}": float(p) for c, p in zip(class_names, shares, strict=True)})
    data: dict[str, Any] = {"class_names": list(class_names), "slides": rows}
    if truth is not None:
        answers = np.array([class_names.index(truth[slide.name]) for slide in found])
        accuracy, auc = class_scores(np.stack([slide.probabilities for slide in found]), answers)
        data |= {"accuracy": accuracy, "mean_auc": auc}

    def draw() -> Any:
        figure, axes = new_figure(max(4.0, 0.9 * len(class_names) + 2), max(2.5, 0.3 * len(found) + 1.5))
        shares = [slide.probabilities for slide in found]
        titles = [f"{row['name']} ({row['truth']})" if truth else row["name"] for row in rows]
        draw_matrix(
            axes[0, 0], shares, titles, class_names, xlabel="class", ylabel="slide", title="mean probability of crops"
        )
        return to_image(figure)

    write_results(files, lambda: data, lambda: rows, draw)
    for row in rows:
        print(f"{row['name']}  {row['class']}  {row['probability/' + row['class']]:.3f}")
    if truth is not None:
        print(f"accuracy {data['accuracy']:.3f}  AUC {data['mean_auc']:.3f}")


def _check_classes(truth: Mapping[str, str], class_names: Sequence[str], source: Path) -> None:
    for name, value in truth.items():
        if value not in class_names:
            raise InputError(
                f"{source}, {name}", expected=f"a class of the model: {', '.join(class_names)}", got=repr(value)
            )
