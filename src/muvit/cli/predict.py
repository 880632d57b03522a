"""``muvit predict``."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.checkpoints import model_folder
from muvit.cli.progress import Progress
from muvit.data.preprocessing import Preprocessing
from muvit.data.slides import Slide, open_slide
from muvit.errors import ExistsError, InputError
from muvit.inference.predict import SlideTiles, predict_slide
from muvit.segmentation import Segmenter


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
    parser.add_argument("--overwrite", action="store_true", help="replace labels that are there already")


def run(arguments: Namespace) -> None:
    """Label each slide."""
    folder = model_folder(arguments.model)
    model, preprocessing = Segmenter.from_folder(folder), Preprocessing.load(folder)
    targets: dict[Path, Slide] = {}
    for slide in map(open_slide, arguments.slide):  # all before any work starts
        target = arguments.output / f"{slide.name}.ome.zarr"
        if target in targets:
            raise InputError(
                "slide", expected="images of different names", got=f"{targets[target].path} and {slide.path}"
            )
        if target.exists() and not arguments.overwrite:
            raise ExistsError(target)
        SlideTiles(model, slide, preprocessing).check()
        targets[target] = slide
    for target, slide in targets.items():
        with Progress(slide.name, "tile") as progress:
            written = predict_slide(
                model,
                slide,
                target,
                preprocessing,
                batch_size=arguments.batch_size,
                num_workers=arguments.num_workers,
                device=arguments.device,
                overwrite=arguments.overwrite,
                progress=progress,
            )
        print(written)
