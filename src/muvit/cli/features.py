"""``muvit features``."""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.progress import Progress
from muvit.cli.slides import SlideFailures, slide_targets
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.folders import image_files
from muvit.data.slides.formats import slide_name
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.inference.features import plan_extraction, run_extraction
from muvit.inference.inputs import prepare_slide
from muvit.inference.run.feature_plan import FeaturePlan
from muvit.models.classifier import Classifier
from muvit.models.folder import model_folder
from muvit.models.segmentation_model import encoder_views
from muvit.models.segmenter import Segmenter
from muvit.models.trained import encoder_of, load_network

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
    parser.add_argument("--batch_size", type=int, default=8, help="tiles computed at once")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read ahead")
    parser.add_argument(
        "--device", type=str | None, default=None, help="cpu, cuda, mps (default: a GPU if there is one)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there already, begun or done")


def run(arguments: Namespace) -> None:
    """Encode each slide, going on where an earlier call stopped; a slide that fails does not stop the others."""
    folder = model_folder(arguments.model)
    model = load_network(folder)
    if isinstance(model, Segmenter | Classifier) and model.config.boxes == "naive":
        raise InputError(arguments.model, expected="a model that knows where its views lie", got="one with naive boxes")
    preprocessing = Preprocessing.load(arguments.preprocessing or folder)
    targets, encoder = _targets(arguments), encoder_of(model, folder)
    planned: dict[Path, tuple[Slide, FeaturePlan]] = {}
    failures = SlideFailures(len(targets))
    common = {"device": arguments.device, "overwrite": arguments.overwrite}
    for target, path in targets.items():  # all before any work starts
        with failures.of(slide_name(path)):
            slide = prepare_slide(encoder_views(encoder.config), open_slide(path), preprocessing)
            kept = {"levels": arguments.levels, "dtype": arguments.dtype}
            planned[target] = slide, plan_extraction(encoder, slide, target, preprocessing, **kept, **common)
    failures.require_none("that can be encoded", hint="None was encoded: mend these, or leave them out.")
    reading = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
    for target, (slide, plan) in planned.items():
        with failures.of(slide.name), Progress(slide.name, "tile") as progress:
            run_extraction(plan, encoder, slide, target, **reading, **common, progress=progress)
            print(target)
    failures.require_none("encoded")


def _targets(arguments: Namespace) -> dict[Path, Path]:
    """The slide that belongs to each output."""
    output: Path = arguments.output
    if output.suffix != _SUFFIX:
        return slide_targets(arguments.slide, output, _SUFFIX)
    files = image_files(arguments.slide)
    if len(files) > 1:
        raise InputError("--output", expected="a folder, for several images", got=output)
    return {output: files[0]}
