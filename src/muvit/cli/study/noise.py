"""``muvit study noise``."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.study.output import add_output, named_paths
from muvit.cli.terminal import Progress
from muvit.evaluation.results import result_files, write_results


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the study."""
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
    parser.add_argument(
        "--device", type=str | None, default=None, help="cpu, cuda, mps (default: a GPU if there is one)"
    )
    add_output(parser, "noise")


def run(arguments: Namespace) -> None:
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
