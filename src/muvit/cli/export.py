"""``muvit export``."""

from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.terminal import Progress
from muvit.data.folders import image_files, open_label_images
from muvit.data.slides.formats import slide_name, store_path
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.errors import ExistsError, InputError
from muvit.inference.export.geojson import GeoJsonConfig, ObjectType, write_geojson
from muvit.inference.export.instances import CleaningConfig
from muvit.inference.export.labelled import LabelledImage
from muvit.inference.export.summaries import area_rows, count_pixels, write_areas, write_overview

AREAS = "areas.csv"
_KINDS = ("geojson", "areas", "overview")


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("labels", nargs="+", type=Path, help="label images, or folders of them")
    parser.add_argument(
        "--image",
        type=Path | None,
        default=None,
        help="the image that is labelled, or a folder with those of the same names; it tells the place and the "
        "pixel size of coarser labels, and is shown in pictures",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder that receives the files")
    parser.add_argument("--geojson", action="store_true", help="write <name>.geojson: polygons for QuPath")
    parser.add_argument("--areas", action="store_true", help=f"write {AREAS}: the area of each class on each slide")
    parser.add_argument(
        "--overview",
        action="store_true",
        help="write <name>.png: the labels in small, over the image; without any of the three, all are written",
    )
    parser.add_argument("--object_type", type=ObjectType, default="annotation", help="what polygons become in QuPath")
    parser.add_argument(
        "--simplify",
        type=float | None,
        default=None,
        help="how far outlines may move to get by with fewer corners, in label pixels; 0 keeps every pixel's edge "
        "(default: as far as no pixel's centre changes sides, so that the polygons are the same labels)",
    )
    parser.add_argument(
        "--min_area_um2", type=float | None, default=None, help="leave out polygons smaller than this (default: none)"
    )
    parser.add_argument(
        "--smooth_um",
        type=float,
        default=0.0,
        help="give each pixel the class that most of its surroundings within this radius have; 0 does not smooth",
    )
    parser.add_argument(
        "--fill_holes_um",
        type=float,
        default=0.0,
        help="fill background inside an object that is at most this wide and high; 0 fills none",
    )
    parser.add_argument(
        "--split_um",
        type=float,
        default=0.0,
        help="split touching objects of a class, by a watershed, into polygons whose middles are at least this far "
        "apart; 0 splits none",
    )
    parser.add_argument(
        "--pixel_size_um",
        type=float | None,
        default=None,
        help="micrometers per label pixel (default: what the labels say, or else the image)",
    )
    parser.add_argument("--overview_px", type=int, default=1600, help="longer side of the pictures at most")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")


def run(arguments: Namespace) -> None:
    """Write what is asked for of each label image."""
    kinds = [kind for kind in _KINDS if arguments[kind]] or list(_KINDS)
    config = GeoJsonConfig(
        object_type=arguments.object_type,
        simplify_px=arguments.simplify,
        min_area_um2=arguments.min_area_um2,
        split_um=arguments.split_um,
    )
    sources, output, overwrite = _sources(arguments), arguments.output, arguments.overwrite
    for file in _files(output, list(sources), kinds):  # all before any work starts
        if file.exists() and not overwrite:
            raise ExistsError(file)
    for source in sources.values() if "geojson" in kinds else ():
        config.check(source)
    rows = []
    for name, source in sources.items():
        polygons, picture = output / f"{name}.geojson", output / f"{name}.png"
        if "geojson" in kinds:
            with Progress(f"{name}: polygons", "block") as progress:
                count = write_geojson(source, polygons, config, overwrite=overwrite, progress=progress)
            print(f"{polygons}: {count} {config.object_type}{'' if count == 1 else 's'}")
        if "areas" in kinds:
            with Progress(f"{name}: areas", "block") as progress:
                rows += area_rows(source, count_pixels(source.labels, progress))
        if "overview" in kinds:
            write_overview(source, picture, size=arguments.overview_px, overwrite=overwrite)
            print(picture)
    if "areas" in kinds:
        write_areas(rows, output / AREAS, overwrite=overwrite)
        print(output / AREAS)


def _files(output: Path, names: list[str], kinds: list[str]) -> list[Path]:
    """Files to write."""
    files = [output / f"{name}.geojson" for name in names] if "geojson" in kinds else []
    files += [output / f"{name}.png" for name in names] if "overview" in kinds else []
    return [*files, output / AREAS] if "areas" in kinds else files


def _sources(arguments: Namespace) -> dict[str, LabelledImage]:
    """The label images with their images, by name."""
    if arguments.output.is_file():
        raise InputError("--output", expected="a folder", got=f"the file {arguments.output}")
    if arguments.overview_px < 1:
        raise InputError("--overview_px", expected="a positive number", got=arguments.overview_px)
    labels = open_label_images(arguments.labels)
    images = _images(arguments.image, labels) if arguments.image else {}
    cleaning = CleaningConfig(smooth_um=arguments.smooth_um, fill_holes_um=arguments.fill_holes_um)
    sources = {}
    for name, slide in labels.items():
        stored = store_path(slide.path, "probabilities")
        source = LabelledImage(
            labels=slide,
            image=images.get(name),
            pixel_size_um=arguments.pixel_size_um,
            probabilities=open_slide(stored) if stored.is_dir() else None,
        )
        sources[name] = replace(source, labels=cleaning.clean(source))
    return sources


def _images(path: Path, labels: dict[str, Slide]) -> dict[str, Slide]:
    """The image of each label image."""
    files = image_files([path])
    if files == [path]:
        if len(labels) > 1:
            raise InputError("--image", expected="a folder of images, for several label images", got=path)
        return dict.fromkeys(labels, open_slide(path))
    images = {slide_name(file): file for file in files}
    missing = sorted(set(labels) - set(images))
    if missing:
        raise InputError(path, expected="the image of every label image", got=f"none of {missing[0]!r}")
    return {name: open_slide(images[name]) for name in labels}
