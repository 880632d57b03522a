"""``muvit convert``."""

import json
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.slides import add_selection, selection
from muvit.cli.terminal import Progress
from muvit.data.annotations.objects import config_of_names, read_bytes
from muvit.data.annotations.open import is_annotation
from muvit.data.folders import images_of_labels, list_slides, open_images, open_labels, open_pairs
from muvit.data.nnunet import NnunetConfig, open_predictions, write_nnunet
from muvit.data.pyramids.convert import convert_image
from muvit.data.pyramids.exchange import SUFFIXES
from muvit.data.pyramids.spec import WholeLevel
from muvit.data.slides.formats import OME_ZARR_SUFFIXES, TIFF_SUFFIXES
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Palette, Slide
from muvit.errors import ExistsError, InputError, ReadError
from muvit.pictures import class_colors

_MAX_LABEL = 2**16 - 1
_MAX_BYTES = 2**24
_OF_DATA_SETS = ("test", "crop_px", "ignore_labels")
_OF_PYRAMIDS = ("image", "pixel_size_um", "series", "z", "t", "channels", "channel_names", "classes", "nnunet")


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "source",
        nargs="+",
        type=Path,
        help="images: PNG, JPEG, TIFF, OME-TIFF, SVS, NDPI, ... OME-Zarr; or, with --kind label, annotations: GeoJSON "
        "(QuPath), XML (ASAP, ImageScope), ROI (ImageJ), COCO; with --format nnunet, folders with images and labels, "
        "or tables of slides; with --nnunet, the folder of nnU-Net's predictions",
    )
    parser.add_argument(
        "--image",
        type=Path | None,
        default=None,
        help="the annotated image, or a folder of them (default: images/ beside the folder of the annotations)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder that receives <name>.ome.zarr (or <name>.ome.tif) of each image; for one image also a path that "
        "ends so",
    )
    parser.add_argument(
        "--format",
        type=Literal["ome-zarr-0.5", "ome-zarr-0.4", "ome-tiff", "nnunet"],
        default="ome-zarr-0.5",
        help="ome-zarr-0.4 and ome-tiff are for other software, such as QuPath and Fiji; nnunet makes one data set for "
        "nnU-Net v2 of all slides, --output nnUNet_raw/Dataset001_Name, at the one level of --levels",
    )
    parser.add_argument(
        "--test",
        type=Path | None,
        default=None,
        help="folder or table of slides that nnU-Net is to label (--format nnunet)",
    )
    parser.add_argument(
        "--crop_px", type=int | None, default=None, help="largest side of a crop for nnU-Net (default: 1024)"
    )
    parser.add_argument(
        "--ignore_labels",
        type=list[int] | None,
        default=None,
        help="label values that nnU-Net ignores, beside those that the labels state (--format nnunet)",
    )
    parser.add_argument(
        "--nnunet",
        type=Path | None,
        default=None,
        help="with --kind label: the data set for nnU-Net whose test slides the predictions label",
    )
    parser.add_argument(
        "--kind",
        type=Literal["image", "label"],
        default="image",
        help="label: coarser levels repeat stored values and never average them",
    )
    parser.add_argument(
        "--levels",
        type=list[WholeLevel] | None,
        default=None,
        help="downsampling factors to store, such as [1,4,8], or [1,[1,4,4]] where a volume's axes differ "
        "(default: powers of two down to 256 pixels)",
    )
    parser.add_argument(
        "--pixel_size_um",
        type=float | None,
        default=None,
        help="micrometers per pixel (default: as stored in the source)",
    )
    add_selection(parser)
    parser.add_argument(
        "--channel_names", type=list[str] | None, default=None, help="names of the channels, such as [DAPI,GFP]"
    )
    parser.add_argument(
        "--classes",
        type=Path | None,
        default=None,
        help='names of the label values: a JSON file such as {"0": "background", "1": "tumour"}',
    )
    parser.add_argument(
        "--nonfinite",
        type=Literal["error", "ignore"],
        default="error",
        help="pixels that are NaN or infinite: refused, or stored, and left out of the means of coarser levels",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing pyramids")


def run(arguments: Namespace) -> None:
    """Convert each image, or all slides to one data set."""
    if arguments.format == "nnunet":
        _write_nnunet(arguments)
        return
    for name in _OF_DATA_SETS:
        if arguments[name] is not None:
            raise InputError(f"--{name}", expected="--format nnunet", got=f"--format {arguments.format}")
    names = _class_names(arguments.classes) if arguments.classes else None
    if names and arguments.kind != "label":
        raise InputError("--classes", expected="--kind label", got=f"--kind {arguments.kind}")
    colors = None if names is None else dict(enumerate(class_colors(max(names) + 1)))
    targets: dict[Path, Slide] = {}
    for slide in _slides(arguments, names):
        target = _target(slide.name, arguments)
        if target in targets:
            raise InputError("source", expected="images of different names", got="two of one name")
        targets[target] = slide
    for target in targets:  # all before any work starts
        if target.exists() and not arguments.overwrite:
            raise ExistsError(target)
    for target, slide in targets.items():
        with Progress(target.name, "block") as progress:
            convert_image(
                slide,
                target,
                kind=arguments.kind,
                format=arguments.format,
                levels=arguments.levels,
                pixel_size_um=arguments.pixel_size_um,
                channel_names=arguments.channel_names,
                label_names=names,
                label_colors=None if colors is None else {value: colors[value] for value in names or ()},
                nonfinite=arguments.nonfinite,
                overwrite=arguments.overwrite,
                progress=progress,
            )
        print(target)


def _slides(arguments: Namespace, names: dict[int, str] | None) -> list[Slide]:
    """The images, the labels, and the annotations, which share their classes."""
    if arguments.nnunet is not None:
        if arguments.kind != "label" or len(arguments.source) > 1:
            expected = "--kind label, and one folder of predictions"
            raise InputError("--nnunet", expected=expected, got=f"--kind {arguments.kind}, {len(arguments.source)}")
        return open_predictions(arguments.source[0], arguments.nnunet)
    drawn = [source for source in arguments.source if is_annotation(source)]
    palette: Palette = "index" if arguments.kind == "label" else "rgb"
    slides = [
        open_slide(source, palette=palette, **selection(arguments))
        for source in arguments.source
        if source not in drawn
    ]
    if not drawn:
        return slides
    if arguments.kind != "label":
        raise InputError(drawn[0], expected="--kind label, for annotations", got=f"--kind {arguments.kind}")
    config = None if names is None else config_of_names(names)
    return [*slides, *open_labels(drawn, images_of_labels(drawn, arguments.image), annotations=config).values()]


def _write_nnunet(arguments: Namespace) -> None:
    """Write one data set of all slides."""
    unfit = [name for name in _OF_PYRAMIDS if arguments[name] is not None]
    if arguments.kind != "image" or unfit or len(arguments.levels or [1]) != 1:
        expected = "source, --output, --test, one level, --crop_px, --ignore_labels and --overwrite"
        got = ", ".join(f"--{name}" for name in unfit) or f"--kind {arguments.kind} and levels {arguments.levels}"
        raise InputError("--format nnunet", expected=expected, got=got)
    train = [files for source in arguments.source for files in list_slides(source, "train")]
    test = [] if arguments.test is None else list_slides(arguments.test, "test", labelled=False)
    config = NnunetConfig(
        level=(arguments.levels or [1])[0],
        crop_px=1024 if arguments.crop_px is None else arguments.crop_px,
        ignore_labels=tuple(arguments.ignore_labels or ()),
    )
    with Progress(arguments.output.name, "crop") as progress:
        write_nnunet(
            open_pairs(train),
            open_images(test),
            arguments.output,
            config,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(arguments.output)


def _target(name: str, arguments: Namespace) -> Path:
    output: Path = arguments.output
    if output.is_file() and not output.name.endswith(TIFF_SUFFIXES):
        raise InputError("--output", expected="a folder", got=f"the file {output}")
    suffix = SUFFIXES[arguments.format]
    if output.name.endswith(OME_ZARR_SUFFIXES if suffix == ".ome.zarr" else TIFF_SUFFIXES):
        if len(arguments.source) > 1:
            raise InputError("--output", expected="a folder, for several images", got=output)
        return output
    return output / f"{name}{suffix}"


def _class_names(file: Path) -> dict[int, str]:
    try:
        names = {int(value): str(name) for value, name in json.loads(read_bytes(file, limit=_MAX_BYTES)).items()}
    except RecursionError as error:
        raise ReadError(file, expected="JSON that names label values", got="lists nested too deeply") from error
    except (OSError, ValueError, AttributeError) as error:
        raise ReadError(file, expected="JSON that names label values", got=error) from error
    if not names or not 0 <= min(names) <= max(names) <= _MAX_LABEL:
        got = f"values {min(names)} to {max(names)}" if names else "no names"
        raise ReadError(file, expected=f"names of label values from 0 to {_MAX_LABEL}", got=got)
    return names
