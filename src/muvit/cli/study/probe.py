"""``muvit study probe``."""

from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.study.output import add_output, named_paths
from muvit.cli.terminal import Progress
from muvit.evaluation.results import result_files, write_results


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the study."""
    from muvit.evaluation.studies.probe import ProbeConfig

    parser.add_argument("--config", action="config", help="these settings in YAML; later arguments override them")
    parser.add_argument("model", nargs="+", help="pre-trained models or their runs, as folder or name=folder")
    parser.add_argument("--train", type=Path, required=True, help="folder with images to learn the classes from")
    parser.add_argument("--test", type=Path, required=True, help="folder with images to score on")
    parser.add_argument("--classes", type=Path, required=True, help="CSV file with a column name and one of classes")
    parser.add_argument("--column", type=str, default="group", help="name of the column of classes")
    parser.add_argument(
        "--levels",
        type=list[float | list[float]] | None,
        default=None,
        help="levels that the encoder sees (default: all levels of the model)",
    )
    parser.add_class_arguments(ProbeConfig, as_group=False)
    parser.add_argument(
        "--device", type=str | None, default=None, help="cpu, cuda, mps (default: a GPU if there is one)"
    )
    add_output(parser, "probe")


def run(arguments: Namespace) -> None:
    """Classify frozen features, and write a table and a picture."""
    from muvit.data.tables import read_column
    from muvit.evaluation.studies.probe import ProbeConfig, check_sklearn, draw_probe, study_probe
    from muvit.levels import plain_level
    from muvit.models.trained import encoder_of, load_model

    check_sklearn()
    files = result_files(arguments.output, "probe", overwrite=arguments.overwrite)
    classes = read_column(arguments.classes, arguments.column)
    config = ProbeConfig(**{field.name: arguments[field.name] for field in fields(ProbeConfig)})
    scores = []
    for name, path in named_paths(arguments.model, "model").items():
        trained = load_model(path)
        encoder = encoder_of(trained.model, path)
        if arguments.levels is not None:
            encoder = encoder.extract_levels([plain_level(level) for level in arguments.levels])
        with Progress(name, "crop") as progress:
            scores += study_probe(
                name,
                encoder,
                trained.preprocessing,
                arguments.train,
                arguments.test,
                classes,
                config,
                device=arguments.device,
                progress=progress,
            )
    rows = [score.row() for score in scores]
    write_results(files, lambda: {"probe": rows}, lambda: rows, lambda: draw_probe(scores))
    for score in scores:
        print(
            f"{score.model}  {score.classifier:<19} {score.unit:<5}  AUC {score.mean_auc:.3f}  "
            f"accuracy {score.accuracy:.3f}"
        )
