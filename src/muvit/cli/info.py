"""``muvit info``."""

import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.slides import add_selection, selection
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.levels import level_name


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("image", nargs="+", type=Path, help="image or OME-Zarr folder")
    add_selection(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, one object per image")


def run(arguments: Namespace) -> None:
    """Print the properties of each image."""
    for path in arguments.image:
        facts = describe(open_slide(path, **selection(arguments)))
        if arguments.json:
            print(json.dumps(facts))
            continue
        print(path)
        for name, value in facts.items():
            print(f"  {name.replace('_', ' '):<16}{_words(value)}")


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
