"""``muvit study``: one sub-verb for each experiment on trained models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.evaluate import add_pair_arguments, evaluate_paths
from muvit.cli.parser import Parser
from muvit.cli.terminal import Progress
from muvit.data.tables import read_column
from muvit.errors import InputError
from muvit.evaluation.results import result_files, write_results

if TYPE_CHECKING:
    from muvit.evaluation.studies.reconstruction import PretrainedModel


class _StudyParser(Parser):
    """A parser that checks its own settings: that of all verbs cannot name a setting that a verb of a verb lacks."""

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """Parsed settings, which may still be incomplete."""
        settings = super().parse_args(*args, **options)
        self.validate(settings, skip_required=True)
        return settings


def add_arguments(parser: Parser) -> None:
    """Arguments of the verb."""
    studies = parser.add_subcommands(required=True, dest="study", metavar="STUDY", help="the experiment")
    for name, study in STUDIES.items():
        study_parser = _StudyParser(description=f"{study.summary[0].upper()}{study.summary[1:]}.")
        if parser.given is None or name in parser.given:
            study.add_arguments(study_parser)
        studies.add_subcommand(name, study_parser, help=study.summary)
        study_parser.prog = f"muvit study {name}"


def run(arguments: Namespace) -> None:
    """Run the chosen study."""
    STUDIES[arguments.study].run(arguments[arguments.study])


def _add_output(parser: ArgumentParser, name: str) -> None:
    """Add the options of the output."""
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help=f"folder for {name}.json, {name}.csv, {name}.png and {name}.html, or a file with one of these suffixes",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def named_paths(texts: Sequence[str], subject: str) -> dict[str, Path]:
    """Paths by name, from ``name=path`` or ``path``, whose last part is then the name.

    Raises:
        InputError: two have one name.
    """
    paths: dict[str, Path] = {}
    for text in texts:
        name, is_named, path = text.partition("=")
        path = path if is_named else text
        name = name if is_named else Path(path).resolve().name
        if name in paths:
            hint = f"Write {subject}s as name=path."
            raise InputError(subject, expected="different names", got=f"{name!r} twice", hint=hint)
        paths[name] = Path(path)
    return paths


def _add_device(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=str | None, default=None, help="cpu, cuda, mps (default: a GPU if there is one)"
    )


def _add_noise(parser: ArgumentParser) -> None:
    """Arguments of ``muvit study noise``."""
    parser.add_argument("model", nargs="+", help="trained models or their runs, as folder or name=folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with images and labels to score on")
    parser.add_argument(
        "--sigmas",
        type=list[float],
        default=[0, 1, 2, 4, 8, 16, 32, 64, 128, 256],
        help="standard deviations of the noise in pixels of the finest level",
    )
    parser.add_argument("--ignore_labels", type=list[int], default=[], help="label values ignored in the scores")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--batch_size", type=int, default=8, help="tiles computed at once")
    _add_device(parser)
    _add_output(parser, "noise")


def _run_noise(arguments: Namespace) -> None:
    """Score the models under noise, and write a table and a picture."""
    from muvit.evaluation.studies.box_noise import draw_noise, study_noise
    from muvit.models.segmentation_model import SegmentationModel
    from muvit.models.trained import load_model

    files = result_files(arguments.output, "noise", overwrite=arguments.overwrite)
    paths = named_paths(arguments.model, "model")
    models = {name: load_model(path, kind=SegmentationModel) for name, path in paths.items()}
    studies = []
    for name, trained in models.items():
        with Progress(name, "tile") as progress:
            studies.append(
                study_noise(
                    name,
                    trained.model,
                    trained.preprocessing,
                    arguments.data,
                    sigmas=arguments.sigmas,
                    ignore=arguments.ignore_labels,
                    seed=arguments.seed,
                    batch_size=arguments.batch_size,
                    device=arguments.device,
                    progress=progress,
                )
            )
    rows = [row for study in studies for row in study.rows()]
    write_results(files, lambda: {"noise": rows}, lambda: rows, lambda: draw_noise(studies))
    for row in rows:
        place = "naive boxes" if row["sigma_px"] is None else f"sigma {row['sigma_px']:g} px"
        print(f"{row['model']}  {place:<14} mDSC {row['mean_dice']:.4f}")


def _add_scaling(parser: ArgumentParser) -> None:
    """Arguments of ``muvit study scaling``."""
    from muvit.evaluation.studies.scaling import ScalingConfig
    from muvit.models.segmenter import SegmenterConfig

    parser.add_class_arguments(ScalingConfig, as_group=False)
    parser.add_class_arguments(SegmenterConfig, "model", as_group=False)
    parser.set_defaults({"model.encoder.in_channels": 1, "model.encoder.levels": [1], "model.num_classes": 12})
    _add_device(parser)
    _add_output(parser, "scaling")


def _run_scaling(arguments: Namespace) -> None:
    """Measure, and write a table and a picture."""
    from muvit.evaluation.studies.scaling import ScalingConfig, draw_scaling, measure_scaling, scaling_rows
    from muvit.models.segmenter import SegmenterConfig

    parser = ArgumentParser()
    parser.add_class_arguments(ScalingConfig, "config")
    parser.add_class_arguments(SegmenterConfig, "model")
    config = Namespace({field.name: arguments[field.name] for field in fields(ScalingConfig)})
    settings = parser.instantiate(Namespace(config=config, model=arguments.model))
    files = result_files(arguments.output, "scaling", overwrite=arguments.overwrite)
    with Progress("Measuring", "pass") as progress:
        measured = measure_scaling(settings.model, settings.config, device=arguments.device, progress=progress)
    rows = scaling_rows(measured)
    write_results(files, lambda: {"scaling": rows}, lambda: rows, lambda: draw_scaling(measured))
    for row in rows:
        print(
            f"[{row['levels']}] {row['size_px']} px  {row['pass']:<20}  {row['seconds']:.4f} s  "
            f"{row['peak_mib']:.0f} MiB"
        )


def _add_probe(parser: ArgumentParser) -> None:
    """Arguments of ``muvit study probe``."""
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
    _add_device(parser)
    _add_output(parser, "probe")


def _run_probe(arguments: Namespace) -> None:
    """Classify frozen features, and write a table and a picture."""
    from muvit.data.tables import read_column
    from muvit.evaluation.studies.probe import ProbeConfig, check_sklearn, draw_probe, study_probe
    from muvit.levels import plain_level
    from muvit.models.hierarchy import RegionEncoder
    from muvit.models.trained import encoder_of, load_model

    check_sklearn()
    files = result_files(arguments.output, "probe", overwrite=arguments.overwrite)
    classes = read_column(arguments.classes, arguments.column)
    config = ProbeConfig(**{field.name: arguments[field.name] for field in fields(ProbeConfig)})
    scores = []
    for name, path in named_paths(arguments.model, "model").items():
        trained = load_model(path)
        model = trained.model
        encoder = model if isinstance(model, RegionEncoder) else encoder_of(model, path)
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


def _add_epochs(parser: ArgumentParser) -> None:
    """Arguments of ``muvit study epochs``."""
    parser.add_argument("run", nargs="+", help="training runs, as folder or name=folder")
    parser.add_argument("--metric", type=str, default="val_mdsc", help="logged score to compare")
    parser.add_argument("--epochs", type=list[int], default=[1, 10, 25, 50], help="epochs to print the score of")
    _add_output(parser, "epochs")


def _run_epochs(arguments: Namespace) -> None:
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


def _add_reconstruction(parser: ArgumentParser) -> None:
    """Arguments of ``muvit study reconstruction``."""
    parser.add_argument("model", nargs="+", help="pre-trained models or their runs, as folder or name=folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with images to reconstruct")
    parser.add_argument("--num_crops", type=int, default=256, help="random nested crops to average over")
    parser.add_argument("--batch_size", type=int, default=16, help="crops computed at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of crops and masks")
    _add_device(parser)
    _add_output(parser, "reconstruction")


def _run_reconstruction(arguments: Namespace) -> None:
    """Mask and reconstruct, and write a table and a picture."""
    from muvit.evaluation.studies.reconstruction import draw_reconstruction, study_reconstruction

    files = result_files(arguments.output, "reconstruction", overwrite=arguments.overwrite)
    models = {name: _load(path) for name, path in named_paths(arguments.model, "model").items()}
    with Progress("Reconstructing", "batch") as progress:
        results = study_reconstruction(
            models,
            arguments.data,
            num_crops=arguments.num_crops,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            device=arguments.device,
            progress=progress,
        )
    rows = [row for result in results for row in result.rows()]
    write_results(files, lambda: {"reconstruction": rows}, lambda: rows, lambda: draw_reconstruction(results))
    for row in rows:
        print(
            f"{row['model']}  trained with {row['trained_boxes']:<5}  boxes {row['boxes']:<5}  "
            f"level {row['level']:<4}  MSE {row['mse']:.5f}"
        )


def _load(path: Path) -> "PretrainedModel":
    """A model with the boxes that its recipe names."""
    from muvit.evaluation.studies.reconstruction import PretrainedModel
    from muvit.models.folder import model_folder
    from muvit.models.mae import MuViTMAE
    from muvit.models.trained import load_model
    from muvit.plain_yaml import read_yaml
    from muvit.training.runs import RECIPE

    folder = model_folder(path)
    trained = load_model(folder, kind=MuViTMAE)
    recipe = folder.parent / RECIPE
    settings = read_yaml(recipe) if recipe.is_file() else {}
    if not isinstance(settings, dict):
        raise InputError(recipe, expected="the settings of a run", got=type(settings).__name__)
    return PretrainedModel(
        model=trained.model,
        preprocessing=trained.preprocessing,
        trained_boxes="naive" if settings.get("boxes") == "naive" else "true",
    )


def _add_groups(parser: ArgumentParser) -> None:
    """Arguments of ``muvit study groups``."""
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
    _add_output(parser, "groups")


def _run_groups(arguments: Namespace) -> None:
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


@dataclass(frozen=True)
class Study:
    """A sub-verb."""

    summary: str
    add_arguments: Callable[[Parser], None]
    run: Callable[[Namespace], None]


STUDIES = {
    "noise": Study("mDSC against noise on the boxes, at inference only", _add_noise, _run_noise),
    "scaling": Study(
        "run time and peak memory against the number of levels and the crop size", _add_scaling, _run_scaling
    ),
    "probe": Study("classify images by the frozen features of an encoder", _add_probe, _run_probe),
    "epochs": Study("a logged score of several runs against the epochs", _add_epochs, _run_epochs),
    "reconstruction": Study(
        "errors of masked autoencoders at each level, with true and with naive boxes",
        _add_reconstruction,
        _run_reconstruction,
    ),
    "groups": Study(
        "scores of each group of slides, by models trained on one group or another", _add_groups, _run_groups
    ),
}
"""Sub-verbs by name."""
