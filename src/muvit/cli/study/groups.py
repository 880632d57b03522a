"""``muvit study groups``."""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.evaluate import add_pair_arguments, evaluate_paths
from muvit.cli.study.output import add_output, named_paths
from muvit.data.tables import read_column
from muvit.evaluation.results import result_files, write_results


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the study."""
    parser.add_argument(
        "prediction",
        nargs="+",
        help="folders of predicted labels, one for each model, as folder or name=folder; the name is that of the group "
        "that the model was trained on, for example",
    )
    parser.add_argument("--truth", type=Path, required=True, help="folder with true labels of the same names")
    parser.add_argument("--groups", type=Path, required=True, help="CSV file with a column name and one of groups")
    parser.add_argument("--column", type=str, default="group", help="name of the column of groups")
    add_pair_arguments(parser)
    parser.add_argument(
        "--score",
        type=Literal["mean_dice", "mean_slide_dice"],
        default="mean_dice",
        help="mDSC of all pixels of a group together, or the mean of the mDSC of its slides",
    )
    add_output(parser, "groups")


def run(arguments: Namespace) -> None:
    """Score every model on every group, and write a table and a picture."""
    from muvit.evaluation.studies.groups import draw_groups, study_groups

    files = result_files(arguments.output, "groups", overwrite=arguments.overwrite)
    groups = read_column(arguments.groups, arguments.column)
    evaluations = {
        name: evaluate_paths(path, arguments) for name, path in named_paths(arguments.prediction, "prediction").items()
    }
    shift = study_groups(evaluations, groups)
    rows, matrix = shift.rows(), shift.matrix(arguments.score)
    data = {"models": list(shift.scores), "groups": shift.groups, arguments.score: matrix, "rows": rows}
    write_results(files, lambda: data, lambda: rows, lambda: draw_groups(shift, arguments.score))
    for model, scores in zip(shift.scores, matrix, strict=True):
        found = (f"{group} {score:.4f}" for group, score in zip(shift.groups, scores, strict=True))
        print(f"{model}:  {'  '.join(found)}")
