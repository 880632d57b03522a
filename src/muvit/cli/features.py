"""``muvit features``."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.slides import (
    SlideFailures,
    add_nonfinite,
    add_pixel_size,
    add_selection,
    file_or_folder_targets,
    open_selected,
    with_nonfinite,
)
from muvit.cli.terminal import Progress
from muvit.errors import InputError
from muvit.inference.run.execution import Execution

_SUFFIX = ".zarr"


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", type=Path, help="folder of an encoder, masked autoencoder or segmenter, or of its run")
    parser.add_argument("slide", nargs="+", type=Path, help="images to encode, or folders of them")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help=f"folder that receives <slide>{_SUFFIX} of each image; for one image also a path that ends in {_SUFFIX}",
    )
    parser.add_argument(
        "--levels", type=list[float] | None, default=None, help="levels whose features to write (default: all)"
    )
    parser.add_argument("--dtype", type=Literal["float16", "float32"], default="float16", help="of the stored features")
    parser.add_argument(
        "--preprocessing",
        type=Path | None,
        default=None,
        help="folder whose preprocessing.yaml to use (default: the model's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing features, complete or not")
    parser.add_argument(
        "--verify", action="store_true", help="read all complete features, and compare them with their checksums"
    )
    add_nonfinite(parser)
    add_pixel_size(parser)
    add_selection(parser)
    parser.add_class_arguments(Execution, as_group=False)


def run(arguments: Namespace) -> None:
    """Encode each slide, or resume an earlier call; a slide that fails does not stop the others."""
    from muvit.data.crops.preprocessing import Preprocessing
    from muvit.data.slides.formats import slide_name
    from muvit.inference.features import plan_extraction, run_extraction
    from muvit.inference.run.engine import verify_job
    from muvit.models.classifier import Classifier
    from muvit.models.folder import model_folder
    from muvit.models.segmenter import Segmenter
    from muvit.models.trained import encoder_of, load_network

    folder = model_folder(arguments.model)
    model = load_network(folder)
    if isinstance(model, Segmenter | Classifier) and model.config.boxes == "naive":
        raise InputError(arguments.model, expected="a model that knows where its views lie", got="one with naive boxes")
    stored = Preprocessing.load(model_folder(arguments.preprocessing or folder))
    preprocessing = with_nonfinite(stored, arguments)
    targets, encoder = file_or_folder_targets(arguments.slide, arguments.output, _SUFFIX), encoder_of(model, folder)
    execution = Execution(**{field.name: arguments[field.name] for field in fields(Execution)})
    planned = {}
    failures = SlideFailures(len(targets))
    kept = {"levels": arguments.levels, "dtype": arguments.dtype, "overwrite": arguments.overwrite}
    for target, path in targets.items():  # all before any work starts
        with failures.of(slide_name(path)):
            slide = open_selected(arguments, path, backend=execution.backend)
            planned[target] = plan_extraction(encoder, slide, target, preprocessing, execution=execution, **kept)
    failures.require_none("that can be encoded", hint="None was encoded: fix these, or leave them out.")
    for target, job in planned.items():
        with failures.of(job.slide.name):
            with Progress(job.slide.name, "tile") as progress:
                run_extraction(job, execution, overwrite=arguments.overwrite, progress=progress)
            print(target)
            if arguments.verify and job.store.is_complete():
                verify_job(job, execution)
                print(f"{target.name}: verified, every byte is as it was written", file=sys.stderr)
    failures.require_none("encoded")
