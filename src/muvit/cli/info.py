"""``muvit info``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.slides import add_selection, selection
from muvit.data.folders import labels_beside, open_images, open_pairs
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.data.slides.open import open_slide
from muvit.data.slides.pixel_size import OWN_PIXELS
from muvit.data.slides.slide import Slide
from muvit.data.tables import SlideFiles
from muvit.errors import ExistsError, InputError
from muvit.levels import level_name


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("image", nargs="+", type=Path, help="image or OME-Zarr folder")
    add_selection(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, one object per image")
    parser.add_argument(
        "--picture",
        type=Path | None,
        default=None,
        help="PNG to write: the image with outlines of its tissue and labels, and crops of a recipe",
    )
    parser.add_argument(
        "--labels",
        type=Path | None,
        default=None,
        help="labels or annotations in the picture; unset, those of that name in the folder labels beside images",
    )
    parser.add_argument(
        "--recipe", type=Path | None, default=None, help="recipe of muvit train, whose nested crops the picture shows"
    )
    parser.add_argument(
        "--tissue",
        type=Literal["auto", "dark", "bright", "stained"],
        default="auto",
        help="way to find the tissue, as in muvit predict",
    )
    parser.add_argument(
        "--tissue_output", type=Path | None, default=None, help="GeoJSON to write the outlines of the tissue to"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the picture and the GeoJSON")


def run(arguments: Namespace) -> None:
    """Print the properties of each image; draw it, and write its tissue."""
    outputs = [file for file in (arguments.picture, arguments.tissue_output) if file is not None]
    if outputs and len(arguments.image) > 1:
        raise InputError("image", expected="a single one, to draw it or write its tissue", got=len(arguments.image))
    if arguments.picture is not None and arguments.picture.suffix.lower() != ".png":
        raise InputError("picture", expected="a file ending in .png", got=arguments.picture)
    for file in outputs:
        if file.exists() and not arguments.overwrite:
            raise ExistsError(file)
    for path in arguments.image:
        facts = describe(open_slide(path, **selection(arguments)))
        if arguments.json:
            print(json.dumps(facts))
            continue
        print(path)
        for name, value in facts.items():
            print(f"  {name.replace('_', ' '):<16}{_words(value)}")
    if arguments.tissue_output is not None:
        _write_tissue(arguments)
    if arguments.picture is not None:
        _draw(arguments)
    if outputs and not arguments.json:
        print(*outputs, sep="\n")


def _write_tissue(arguments: Namespace) -> None:
    from muvit.inference.tiling.region import write_region
    from muvit.inference.tiling.tissue import find_tissue

    slide = open_slide(arguments.image[0], **selection(arguments))
    outlines = find_tissue(slide, arguments.tissue).polygons(slide.shape)
    write_region(outlines, slide, arguments.tissue_output, overwrite=arguments.overwrite)


def _draw(arguments: Namespace) -> None:
    """Write the picture."""
    from muvit.durable import whole_file
    from muvit.inference.export.summaries import Outlines, draw_slide, label_outlines
    from muvit.inference.tiling.tissue import find_tissue
    from muvit.pictures import stack

    (path,) = arguments.image
    recipe = None
    if arguments.recipe is not None:
        from muvit.settings import read_settings
        from muvit.training.recipes import Recipe

        recipe = read_settings(arguments.recipe, Recipe)
    levels, pixels = ((), OWN_PIXELS) if recipe is None else (recipe.model.levels, recipe.data.pixels)
    chosen = {name: value for name, value in selection(arguments).items() if value is not None}
    pixels = replace(pixels, **chosen)
    files = SlideFiles(image=path, labels=arguments.labels or labels_beside(path))
    if files.labels is None:
        (slide,), labels = open_images([files], levels, pixels), None
    else:
        annotations = None if recipe is None else recipe.data.annotations
        ((slide, labels),) = open_pairs([files], levels, annotations=annotations, pixels=pixels)
    tissue = find_tissue(slide, arguments.tissue)
    outlines = [Outlines(name="tissue", color=_TISSUE_COLOR, polygons=tissue.polygons(slide.shape))]
    outlines += [] if labels is None else label_outlines(labels)
    if recipe is None:
        picture = draw_slide(slide, outlines)
    else:
        from muvit.training.samples import draw_crops, place_crops

        placed = place_crops(slide, recipe, tissue.points())
        boxes = [views.boxes.numpy() for views in placed]
        crops = draw_crops(slide, recipe, placed)
        picture = stack([draw_slide(slide, outlines, boxes, size=crops.width), crops])
    with whole_file(arguments.picture) as stream:
        picture.save(stream, format="png")


_TISSUE_COLOR = (240, 60, 200)


def describe(slide: Slide) -> dict[str, Any]:
    """Properties of a slide as plain data; sizes in pixels, axis order (t)(z)yx."""
    facts: dict[str, Any] = {
        "path": str(slide.path),
        "shape": list(slide.shape),
        "dtype": str(slide.dtype),
        "channels": list(slide.channel_names),
        "levels": {level_name(level): list(slide.level_shape(level)) for level in slide.levels},
        "pixel_size_um": None if slide.pixel_size_um is None else list(slide.pixel_size_um),
    }
    if isinstance(slide, OmeZarrSlide):
        facts["labels"] = list(slide.labels())
        if slide.label_names:
            facts["classes"] = {str(value): name for value, name in slide.label_names.items()}
    return facts


def _words(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_words(v)}" for k, v in value.items())
    if isinstance(value, list):
        numeric = all(isinstance(v, int | float) for v in value)
        return (" x " if numeric else ", ").join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) or "none"
    return str(value)
