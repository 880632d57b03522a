"""``muvit demo``."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.terminal import Progress
from muvit.errors import ExistsError

if TYPE_CHECKING:
    from muvit.data.synthetic.images import SyntheticConfig
    from muvit.training.recipes import Recipe

TITLE = "Cells whose class shows only from afar"
INTRO = (
    "Every image holds rings of small cells. Cells in the outer half of a ring are one class, those in the inner half "
    "another, and both look alike: which is which depends on the side that the ring encloses, which no small crop "
    "shows. A coarse view shows that side as a shade, but no cells. A model that sees both views, and knows where they "
    "lie relative to each other, can tell. Two controls show that it takes both: one sees the fine view only, the "
    "other sees both views without true positions."
)


MODEL = "muvit-synthetic-small"
"""Model of this package that labels an image at once: that of a whole demo, in half precision."""

FIRST_UNSEEN = 100_000
"""Index of the first image that no training uses."""

_QUICK = (
    "This was the quick demo: long enough to find cells, too short to tell their classes apart. What a whole one "
    "learns is in the report of {model}: {page}"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write everything into")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a minute to see that all works: long enough to find cells, not their class",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the images and of the training")
    parser.add_argument(
        "--devices",
        type=str | None,
        default=None,
        help="where to train, as of muvit compare; unset, every GPU, else the CPU",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a demo that was stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo")


def run(arguments: Namespace) -> None:
    """Show a trained model; make images, train three models, label and score the test images, write the report."""
    from muvit.data.synthetic.folders import RECORD_NAME
    from muvit.data.synthetic.images import write_synthetic
    from muvit.evaluation.comparison import compare
    from muvit.evaluation.report.tables import conclusion
    from muvit.evaluation.variants import with_controls

    began, output = time.perf_counter(), arguments.output
    again = arguments.overwrite or arguments.resume
    if output.exists() and any(output.iterdir()) and not again:
        raise ExistsError(output, hint="Choose another output, or pass --resume or --overwrite.")
    first = output / "first"
    if not (arguments.resume and (first / "index.html").exists()):
        print(f"labels by {MODEL}, a model that was trained before: {show_shipped(first)}", flush=True)
    train, val, test = (12, 2, 2) if arguments.quick else (240, 12, 16)
    data = output / "data"
    if not (arguments.resume and (data / RECORD_NAME).exists()):
        with Progress("Synthetic images", "image") as progress:
            write_synthetic(
                data,
                num_train=train,
                num_val=val,
                num_test=test,
                config=config(),
                overwrite=again,
                progress=progress,
            )
    with Progress("Training three models", "step") as progress:
        results = compare(
            with_controls(recipe(data, arguments.seed, quick=arguments.quick)),
            data / "test",
            output,
            title=TITLE,
            intro=INTRO,
            settings={"images": f"{train} for training, {val} for validation, {test} for testing"},
            devices=arguments.devices,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    for result in results:
        print(f"{result.name:<24} mDSC {result.mean_dice:.3f}")
    print(*conclusion(results))
    if arguments.quick:
        print(_QUICK.format(model=MODEL, page=first / "index.html"))
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes; see {output / 'index.html'}")


def show_shipped(output: Path) -> Path:
    """Label an image by the model of this package, and write the report; its path. An earlier one is replaced."""
    from muvit.data.slides.open import open_slide
    from muvit.evaluation.report.runs import write_prediction_page
    from muvit.inference.predict import predict_slide
    from muvit.models.folder import model_folder
    from muvit.models.segmentation_model import SegmentationModel
    from muvit.models.trained import load_model

    slide = open_slide(write_unseen(output, 1)[0][0])
    labels = output / f"{slide.name}.ome.zarr"
    with Progress(f"Labels by {MODEL}", "tile") as progress:
        trained = load_model(MODEL, kind=SegmentationModel)
        predict_slide(trained, slide, labels, device="cpu", overwrite=True, progress=progress)
    facts = {"model": MODEL, "classes": ", ".join(trained.preprocessing.class_names)}
    page = write_prediction_page(output, {labels: slide}, facts, model=model_folder(MODEL))
    assert page is not None  # the labels are complete, and of two axes
    return page


def write_unseen(output: Path, count: int) -> list[tuple[Path, Path]]:
    """Write images that no training of this data set uses, each with its true labels; the paths of each pair."""
    from functools import partial

    from muvit.data.synthetic.folders import write_pairs
    from muvit.data.synthetic.images import STORE, draw

    indices = range(FIRST_UNSEEN, FIRST_UNSEEN + count)
    pairs = [tuple(output / kind / f"{index:05d}.ome.zarr" for kind in ("images", "labels")) for index in indices]
    for path in (path for pair in pairs for path in pair):
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
    write_pairs([(index, output) for index in indices], partial(draw, config=config()), STORE, workers=1)
    return [(image, labels) for image, labels in pairs]


def config() -> "SyntheticConfig":
    """Appearance of the images of the demo."""
    from muvit.data.synthetic.images import SyntheticConfig

    return SyntheticConfig.scattered().at_size(512)


def recipe(data: Path, seed: int = 0, *, quick: bool = False) -> "Recipe":
    """A small MuViT[1,8] that two CPU cores train in minutes, on images of scattered rings of 512 px in ``data``."""
    from muvit.data.crops.augment import Augmentation
    from muvit.data.synthetic.folders import GREY_LEVELS_PER_UNIT
    from muvit.models.encoder import EncoderConfig
    from muvit.models.segmenter import SegmenterConfig
    from muvit.training.optim import OptimConfig
    from muvit.training.recipes import DataConfig, LossConfig, Recipe
    from muvit.training.run_config import RunConfig

    return Recipe(
        data=DataConfig(
            train=str(data / "train"),
            val=str(data / "val"),
            crop_size=64,
            normalization={"kind": "range", "low": 0, "high": GREY_LEVELS_PER_UNIT},
            augmentation=Augmentation.geometric(quarter_turns=True),
            samples_per_epoch=128 if quick else 1600,
            val_samples=16 if quick else 256,
            batch_size=4 if quick else 16,
            balance="foreground",  # about half of all crops hold no cells, and teach little
            foreground_fraction=0.9,
        ),
        model=SegmenterConfig(
            encoder=EncoderConfig(
                in_channels=1,
                levels=(1, 8),
                dim=128,
                num_layers=4,
                heads=4,
            ),
            num_classes=3,
            decoder_widths=(32, 16, 16, 8),
            stem_width=8,
        ),
        # as long as the cells cannot be told apart, soft Dice favours one label for all of them and delays learning
        loss=LossConfig(dice_weight=0.0),
        optim=OptimConfig(lr=2e-3, encoder_lr_factor=1.0),
        run=RunConfig(epochs=2 if quick else 6, seed=seed, progress=False),
        preset="modern",
    )
