"""``muvit features``."""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.progress import Progress
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.open import open_slide
from muvit.errors import InputError
from muvit.inference.features import extract_features
from muvit.models.classifier import Classifier
from muvit.models.folder import model_folder
from muvit.models.segmenter import Segmenter
from muvit.models.trained import encoder_of, load_network


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", type=Path, help="folder of an encoder, masked autoencoder or segmenter, or of its run")
    parser.add_argument("slide", type=Path, help="image to encode")
    parser.add_argument("--output", type=Path, required=True, help="folder to create, named *.zarr")
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
    """Encode a slide, going on where an earlier call stopped."""
    folder = model_folder(arguments.model)
    model = load_network(folder)
    if isinstance(model, Segmenter | Classifier) and model.config.boxes == "naive":
        raise InputError(arguments.model, expected="a model that knows where its views lie", got="one with naive boxes")
    preprocessing = Preprocessing.load(arguments.preprocessing or folder)
    slide = open_slide(arguments.slide)
    encoder = encoder_of(model, folder)
    with Progress(slide.name, "tile") as progress:
        written = extract_features(
            encoder,
            slide,
            arguments.output,
            preprocessing,
            levels=arguments.levels,
            dtype=arguments.dtype,
            batch_size=arguments.batch_size,
            device=arguments.device,
            num_workers=arguments.num_workers,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(written)
