"""``muvit predict``."""

import sys
from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.checkpoints import model_folder
from muvit.cli.progress import Progress
from muvit.data.preprocessing import Preprocessing
from muvit.data.slides import open_slide, slide_name
from muvit.errors import InputError, MuViTError
from muvit.inference.output import prediction_status
from muvit.inference.plan import PredictOptions
from muvit.inference.predict import plan_prediction, run_prediction
from muvit.models import load_model

_TTA_FLIPS = (-2, -1)


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", type=Path, help="folder of a trained model, or of the run that made it")
    parser.add_argument("slide", nargs="+", type=Path, help="images to label")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder that receives <slide>.ome.zarr with the labels of each slide"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="tiles computed at once")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read ahead")
    parser.add_argument(
        "--device", type=str | None, default=None, help="cpu, cuda, mps (default: a GPU if there is one)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace labels that are there already, begun or done")
    parser.add_argument("--status", action="store_true", help="only tell what is done")
    parser.add_argument("--tta", action="store_true", help="average over the flips of each tile along y and x")
    parser.add_class_arguments(PredictOptions, as_group=False, skip={"flips"})


def run(arguments: Namespace) -> None:
    """Label each slide, going on where an earlier call stopped; a slide that fails does not stop the others."""
    targets = _targets(arguments)
    if arguments.status:
        for target in targets:
            print(_status(target))
        return
    folder = model_folder(arguments.model)
    model, preprocessing = load_model(folder), Preprocessing.load(folder)
    device, overwrite = arguments.device, arguments.overwrite
    plans = {}
    for target, path in targets.items():  # all before any work starts
        slide = open_slide(path)
        plan = plan_prediction(
            model, slide, target, preprocessing, options=_options(arguments), device=device, overwrite=overwrite
        )
        plans[target] = slide, plan
    failed: list[Exception] = []
    for target, (slide, plan) in plans.items():
        try:
            with Progress(slide.name, "tile") as progress:
                run_prediction(
                    plan,
                    model,
                    slide,
                    target,
                    batch_size=arguments.batch_size,
                    num_workers=arguments.num_workers,
                    device=device,
                    overwrite=overwrite,
                    progress=progress,
                )
        except (MuViTError, OSError) as error:
            if len(plans) == 1:
                raise
            failed.append(error)
            print(f"muvit: {error}", *getattr(error, "__notes__", ()), file=sys.stderr)
        else:
            print(target)
    if failed:
        raise InputError("slides", expected=f"{len(plans)} labelled", got=f"{len(plans) - len(failed)}")


def _targets(arguments: Namespace) -> dict[Path, Path]:
    """The slide that belongs to each output."""
    targets: dict[Path, Path] = {}
    for path in arguments.slide:
        target = arguments.output / f"{slide_name(path)}.ome.zarr"
        if target in targets:
            raise InputError("slide", expected="images of different names", got=f"{targets[target]} and {path}")
        targets[target] = path
    return targets


def _options(arguments: Namespace) -> PredictOptions:
    given = {field.name: arguments[field.name] for field in fields(PredictOptions) if field.name in arguments}
    return PredictOptions(**given, flips=_TTA_FLIPS if arguments.tta else ())


def _status(target: Path) -> str:
    status = prediction_status(target)
    if status.state in ("missing", "foreign"):
        return f"{target}: {'not begun' if status.state == 'missing' else 'no prediction'}"
    seams = status.seams.ratio if status.seams else None
    return (
        f"{target}: {status.state}, {status.blocks} of {status.num_blocks} blocks, "
        f"{status.shards} of {status.num_shards} shards of coarser levels"
        + ("" if seams is None else f", labels change {seams:.2f} times as often across seams as inside tiles")
    )
