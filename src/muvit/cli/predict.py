"""``muvit predict``."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.progress import Progress
from muvit.data.preprocessing import Preprocessing
from muvit.data.slides import open_slide
from muvit.inference.predict import predict_slide
from muvit.segmentation import Segmenter


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", type=Path, help="folder of a trained model, such as runs/x/best")
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
    model, preprocessing = Segmenter.from_folder(arguments.model), Preprocessing.load(arguments.model)
    slides = [open_slide(path) for path in arguments.slide]
    for slide in slides:
        with Progress(slide.name, "tile") as progress:
            written = predict_slide(
                model,
                slide,
                arguments.output / f"{slide.name}.ome.zarr",
                preprocessing,
                batch_size=arguments.batch_size,
                num_workers=arguments.num_workers,
                device=arguments.device,
                overwrite=arguments.overwrite,
                progress=progress,
            )
        print(written)
