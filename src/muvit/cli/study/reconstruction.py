"""``muvit study reconstruction``."""

from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.study.output import add_output, named_paths
from muvit.cli.terminal import Progress
from muvit.evaluation.results import result_files, write_results

if TYPE_CHECKING:
    from muvit.evaluation.studies.reconstruction import PretrainedModel


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the study."""
    parser.add_argument("model", nargs="+", help="pre-trained models or their runs, as folder or name=folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with images to reconstruct")
    parser.add_argument("--num_crops", type=int, default=256, help="random nested crops to average over")
    parser.add_argument("--batch_size", type=int, default=16, help="crops computed at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of crops and masks")
    parser.add_argument(
        "--device", type=str | None, default=None, help="cpu, cuda, mps (default: a GPU if there is one)"
    )
    add_output(parser, "reconstruction")


def run(arguments: Namespace) -> None:
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
    import yaml

    from muvit.evaluation.studies.reconstruction import PretrainedModel
    from muvit.models.folder import model_folder
    from muvit.models.mae import MuViTMAE
    from muvit.models.trained import load_model
    from muvit.training.runs import RECIPE

    folder = model_folder(path)
    trained = load_model(folder, kind=MuViTMAE)
    recipe = folder.parent / RECIPE
    settings = yaml.safe_load(recipe.read_text()) if recipe.is_file() else {}
    return PretrainedModel(
        model=trained.model,
        preprocessing=trained.preprocessing,
        trained_boxes="naive" if settings.get("boxes") == "naive" else "true",
    )
