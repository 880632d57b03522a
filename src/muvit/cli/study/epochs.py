"""``muvit study epochs``."""

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.study.output import add_output, named_paths
from muvit.evaluation.results import result_files, write_results


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the study."""
    parser.add_argument("run", nargs="+", help="training runs, as folder or name=folder")
    parser.add_argument("--metric", type=str, default="val_mdsc", help="logged score to compare")
    parser.add_argument("--epochs", type=list[int], default=[1, 10, 25, 50], help="epochs to print the score of")
    add_output(parser, "epochs")


def run(arguments: Namespace) -> None:
    """Read the logs, and write a table and a picture."""
    from muvit.evaluation.studies.epochs import draw_epochs, epoch_rows, read_epochs

    files = result_files(arguments.output, "epochs", overwrite=arguments.overwrite)
    metric = arguments.metric
    curves = {name: read_epochs(path, metric) for name, path in named_paths(arguments.run, "run").items()}
    rows = epoch_rows(curves, metric)
    write_results(files, lambda: {metric: curves}, lambda: rows, lambda: draw_epochs(curves, metric))
    for name, curve in curves.items():
        shown = [f"E{epoch} {curve[epoch]:.3f}" for epoch in arguments.epochs if epoch in curve]
        print("  ".join([name, *shown, f"last (E{max(curve)}) {curve[max(curve)]:.3f}"]))
