"""``muvit predict``."""

import sys
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from jsonargparse import Namespace

from muvit.cli.parser import Parser
from muvit.cli.slides import (
    SlideFailures,
    add_nonfinite,
    add_pixel_size,
    add_selection,
    open_selected,
    slide_targets,
    with_nonfinite,
)
from muvit.cli.terminal import Progress
from muvit.errors import InputError
from muvit.inference.run.execution import Execution
from muvit.inference.run.plan import PredictOptions, Tissue

if TYPE_CHECKING:  # imported where they are used, so that the help needs no torch
    from muvit.data.crops.preprocessing import Preprocessing
    from muvit.data.slides.slide import Slide
    from muvit.inference.run.blocks import Job
    from muvit.inference.run.label_blocks import Status
    from muvit.models.trained import TrainedModel

_TTA_FLIPS = (-2, -1)


def add_arguments(parser: Parser) -> None:
    """Arguments of the verb."""
    parser.renamed = {"--engine": "--backend"}
    parser.add_argument("model", type=Path, help="folder of a trained model, or of the run that made it")
    parser.add_argument("slide", nargs="+", type=Path, help="images to label, or folders of them")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder that receives <slide>.ome.zarr with the labels of each slide"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing labels, complete or not")
    parser.add_argument("--status", action="store_true", help="only show the progress")
    parser.add_argument(
        "--verify", action="store_true", help="read all complete labels, and compare them with their checksums"
    )
    parser.add_argument("--tta", action="store_true", help="average over the flips of each tile along y and x")
    parser.add_argument(
        "--region",
        type=str | None,
        default=None,
        help="compute only tiles that meet this: a GeoJSON file (or a folder of <slide>.geojson), or a box y0,x0,y1,x1 "
        "in pixels of the finest level",
    )
    parser.add_argument(
        "--tissue",
        type=str,
        default="all",
        help="compute all tiles, or only those with tissue, which is dark or bright against the background (auto: dark "
        "in RGB images of 8 bits, else bright), or stained: coloured, without grey, black and blue or green pen (for "
        "haematoxylin with eosin or DAB); or inside the polygons of a GeoJSON file (or a folder of <slide>.geojson)",
    )
    parser.add_argument(
        "--context", type=Literal["auto", "centered", "grid"], default="auto", help="older spelling of --placement"
    )
    add_nonfinite(parser)
    parser.add_class_arguments(PredictOptions, as_group=False, skip={"flips", "region", "tissue"})
    parser.add_argument(
        "--view_px",
        type=int | None,
        default=None,
        help="longest side of what the report shows of a slide, in its finest pixels (default: 8192); their tiles lie "
        "beside it",
    )
    add_pixel_size(parser)
    add_selection(parser)
    parser.add_class_arguments(Execution, as_group=False)


def run(arguments: Namespace) -> None:
    """Label each slide, or resume an earlier call; a slide that fails does not stop the others."""
    from muvit.data.slides.formats import slide_name

    if arguments.view_px is not None and arguments.view_px < 1:
        raise InputError("--view_px", expected="a positive number", got=arguments.view_px)
    targets = slide_targets(arguments.slide, arguments.output, ".ome.zarr")
    failures = SlideFailures(len(targets))
    if arguments.status:
        for target, path in targets.items():
            with failures.of(slide_name(path)):
                print(_status(target))
        failures.require_none("whose labels are whole")
        return
    from muvit.inference.run.engine import verify_job
    from muvit.models.segmentation_model import SegmentationModel
    from muvit.models.trained import load_model

    start = time.monotonic()
    trained = load_model(arguments.model, kind=SegmentationModel)
    trained = replace(trained, preprocessing=with_nonfinite(trained.preprocessing, arguments))
    execution = Execution(**{field.name: arguments[field.name] for field in fields(Execution)})
    planned = _plan(arguments, targets, trained, execution)
    # by an earlier call, or by the other parts
    complete = {target for target, job in planned.items() if not arguments.overwrite and job.store.is_complete()}
    for target, job in planned.items():
        with failures.of(job.slide.name):
            if target in complete:
                print(target)
                print(f"{target.name}: complete already", file=sys.stderr)
            else:
                _label(target, job, execution, overwrite=arguments.overwrite)
            if arguments.verify and job.store.is_complete():
                verify_job(job, execution)
                print(f"{target.name}: verified, every byte is as it was written", file=sys.stderr)
    if len(targets) > 1:
        failed = len(failures.names)
        part = "" if execution.part is None else f" (part {execution.part})"
        done = f"{len(planned) - len(complete) - failed} labelled{part}"
        print(f"{len(targets)} slides: {done}, {len(complete)} complete already, {failed} failed", file=sys.stderr)
    if all(job.store.is_complete() for job in planned.values()):  # of several parts, the last
        seconds = time.monotonic() - start if set(planned) - complete else None
        _write_page(arguments, planned, trained, seconds)
    failures.require_none("labelled")


def _write_page(
    arguments: Namespace, planned: Mapping[Path, "Job"], trained: "TrainedModel[Any]", seconds: float | None
) -> None:
    """The report beside the labels; that of an earlier call is kept if nothing was labelled (``seconds`` is None)."""
    from muvit.evaluation.report.content import format_duration
    from muvit.evaluation.report.runs import PAGE, write_prediction_page
    from muvit.evaluation.report.viewer import VIEW_PX
    from muvit.models.folder import model_folder

    if seconds is None and arguments.view_px is None and (arguments.output / PAGE).exists():
        return
    shown = ("model", "overlap", "blend", "refine", "tissue", "region", "placement", "tta")
    given = {name: arguments[name] for name in shown}
    facts = {name: value for name, value in given.items() if value is not None and value is not False}
    facts["classes"] = ", ".join(trained.preprocessing.class_names)
    facts |= {} if seconds is None else {"time": format_duration(seconds)}
    write_prediction_page(
        arguments.output,
        {target: job.slide for target, job in planned.items()},
        facts,
        model=model_folder(arguments.model),
        view_px=arguments.view_px or VIEW_PX,
    )


def _label(target: Path, job: "Job", execution: Execution, *, overwrite: bool) -> None:
    from muvit.inference.predict import run_prediction

    with Progress(job.slide.name, "tile") as progress:
        status = run_prediction(job, execution, overwrite=overwrite, progress=progress)
    print(target)
    for line in () if status is None else _counts(status):
        print(f"{target.name}: {line}", file=sys.stderr)


def _counts(status: "Status") -> list[str]:
    """Sentences about the tiles of a prediction."""
    return [str(counts) for counts in (status.tiles, status.seams) if counts is not None and str(counts)]


def _plan(
    arguments: Namespace, targets: Mapping[Path, Path], trained: "TrainedModel[Any]", execution: Execution
) -> "dict[Path, Job]":
    """The jobs of the slides; all are checked before any work starts."""
    from muvit.data.slides.formats import slide_name
    from muvit.inference.predict import plan_prediction

    planned = {}
    failures = SlideFailures(len(targets))
    for target, path in targets.items():
        with failures.of(slide_name(path)):
            slide = open_selected(arguments, path, backend=execution.backend)
            options = _options(arguments, slide, trained.preprocessing)
            planning = {"options": options, "execution": execution, "overwrite": arguments.overwrite}
            planned[target] = plan_prediction(trained, slide, target, **planning)
    failures.require_none("that can be labelled", hint="None was labelled: fix these, or leave them out.")
    return planned


def _options(arguments: Namespace, slide: "Slide", preprocessing: "Preprocessing") -> PredictOptions:
    from muvit.inference.tiling.region import join_regions, read_region

    made = ("flips", "region", "tissue")
    given: dict[str, Any] = {f.name: arguments[f.name] for f in fields(PredictOptions) if f.name not in made}
    if arguments.context != "auto" and arguments.placement == "auto":
        given["placement"] = "grid" if arguments.context == "grid" else preprocessing.placement
    is_drawn = _is_file(arguments.tissue)
    given["tissue"] = "all" if is_drawn else arguments.tissue
    drawn = [arguments.region, arguments.tissue if is_drawn else None]
    region = join_regions([read_region(source, slide) for source in drawn if source is not None])
    return PredictOptions(**given, region=region, flips=_TTA_FLIPS if arguments.tta else ())


def _is_file(tissue: str) -> bool:
    return tissue not in get_args(Tissue) and (Path(tissue).suffix != "" or Path(tissue).exists())


def _status(target: Path) -> str:
    from muvit.inference.run.label_blocks import prediction_status

    status = prediction_status(target)
    if status.state in ("missing", "foreign"):
        return f"{target}: {'not started' if status.state == 'missing' else 'not a prediction'}"
    done = f"{status.blocks} of {status.num_blocks} blocks, {status.shards} of {status.num_shards} coarser shards"
    return "; ".join([f"{target}: {status.state}, {done}", *_counts(status)])
