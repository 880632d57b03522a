"""A data set on disk: its slides with their files, splits and groups, and checks of its completeness."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Palette, Slide
from muvit.data.sources.derived import Decode, classified, columns, reduced
from muvit.data.sources.label_map import LabelMap
from muvit.errors import InputError, ReadError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_SHOWN_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True)
class Item:
    """One slide of a data set with its labels."""

    name: str
    """Name of the converted slide."""
    split: Split
    """Its split: train, val or test."""
    images: tuple[Path, ...]
    """File of the image; several make up its channels."""
    labels: tuple[Path, ...]
    """File of the labels, or one mask for each class; of several by several annotators, the majority decides."""
    factor: int = 1
    """Downsampling factor of the stored slide relative to its files."""
    columns: tuple[int, int] | None = None
    """First column of the files' pixels that belong to the slide, and the one after the last; unset, all."""
    pixel_size_um: float | None = None
    """Micrometers per pixel of the files, where they do not state it."""
    group: str = ""
    """Group of the slide: a disease model, a city, a scanner."""
    animal: str = ""
    """The animal it is of, where that is known: none is in two splits."""


def open_image(item: Item) -> Slide:
    """The image of an item from its only file: its columns, reduced."""
    slide = open_slide(item.images[0], pixel_size_um=item.pixel_size_um)
    return reduced(columns(slide, item.columns), item.factor, kind="image")


@dataclass(frozen=True, kw_only=True)
class Source:
    """All slides of a downloaded data set."""

    dataset: str
    """Name of the data set."""
    folder: Path
    """Folder of the download."""
    items: tuple[Item, ...]
    """Its slides."""
    class_names: tuple[str, ...]
    """Names of the classes, from class 0."""
    open_labels: Callable[[Item], Slide]
    """Gives the classes of a slide as they are to be stored, uint8; ignored pixels are `IGNORED`."""
    has_background: bool = True
    """Whether class 0 is background; else all classes are foreground."""
    open_image: Callable[[Item], Slide] = open_image
    """Gives the image of a slide as it is to be stored."""
    levels: tuple[int, ...] = (1, 2, 4, 8)
    """Downsampling factors to store, unless others are asked for."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Choices of the user that the conversion depends on; JSON."""
    problems: tuple[str, ...] = ()
    """Missing or contradictory files, which must be resolved before anything is converted."""
    warnings: tuple[str, ...] = ()
    """Differences from the published data set."""


def mapped(label_map: LabelMap) -> dict[str, Any]:
    """The fields of a `Source` whose label files a label map describes."""
    palette: Palette = "rgb" if label_map.is_colors else "index"
    return {
        "class_names": label_map.names,
        "open_labels": labels_by(label_map.decode, len(label_map.names), palette=palette),
    }


def labels_by(decode: Decode, num_classes: int, *, palette: Palette = "index") -> Callable[[Item], Slide]:
    """Function that opens the labels of an item: its files, decoded, combined by majority vote and reduced."""
    return partial(_open_labels, decode, num_classes, palette)


def _open_labels(decode: Decode, num_classes: int, palette: Palette, item: Item) -> Slide:
    stored = [columns(open_slide(file, palette=palette), item.columns) for file in item.labels]
    return reduced(classified(stored, decode, num_classes), item.factor, kind="label")


def check_source(source: Source) -> dict[Item, int]:
    """Find everything that prevents the conversion of a data set, without reading its pixels.

    Returns:
        The number of pixels of each slide.

    Raises:
        ReadError: the folder is not there.
        InputError: lists everything that is missing, unreadable or contradictory.
    """
    if not source.folder.is_dir():
        raise ReadError(source.folder, expected=f"the folder of {source.dataset}", got="nothing there")
    problems = [*source.problems, *_contradictions(source.items)]
    pixels: dict[Item, int] = {}
    formats: dict[tuple[int, str], Item] = {}
    for item in source.items:
        try:
            image, labels = source.open_image(item), source.open_labels(item)
        except InputError as error:
            problems.append(str(error).rstrip("."))
            continue
        if image.shape != labels.shape:
            files = f"{item.images[0]} has shape {image.shape}, {item.labels[0].name} {labels.shape}"
            problems.append(files if item.factor == 1 else f"{files} (reduced by {item.factor})")
        formats.setdefault((image.num_channels, image.dtype.name), item)
        pixels[item] = image.shape[-1] * image.shape[-2]
    if len(formats) > 1:
        described = (f"{i.images[0]} has {n} channel(s) of {dtype}" for (n, dtype), i in formats.items())
        problems.append(f"images differ: {'; '.join(described)}")
    if not source.items and not problems:
        problems.append("no images with labels were found")
    if problems:
        listed = problems[:_SHOWN_PROBLEMS]
        if len(problems) > len(listed):
            listed.append(f"and {len(problems) - len(listed)} more")
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError(
            source.folder, expected=f"the complete {source.dataset} data", got=f"{count}:\n  " + "\n  ".join(listed)
        )
    return pixels


def _contradictions(items: Iterable[Item]) -> list[str]:
    """Names that occur twice, and animals in two splits."""
    found = []
    names = Counter(item.name for item in items)
    for name in (name for name, count in names.items() if count > 1):
        files = ", ".join(str(item.images[0]) for item in items if item.name == name)
        found.append(f"several slides are called {name}: {files}")
    splits: dict[str, set[str]] = {}
    for item in items:
        if item.animal:
            splits.setdefault(item.animal, set()).add(item.split)
    for animal, where in splits.items():
        if len(where) > 1:
            found.append(f"slides of one animal, {animal}, are in {' and '.join(s for s in SPLITS if s in where)}")
    return found


def compare_counts(items: Iterable[Item], expected: Mapping[tuple[str, str], int], *, what: str) -> list[str]:
    """Sentences on how numbers of slides differ from the published ones, none where there are no slides at all.

    Args:
        items: the slides that were found.
        expected: number of slides for each (split, group); an empty group stands for all.
        what: the word for the slides.
    """
    items = tuple(items)
    found = {key: sum(item.split == key[0] and key[1] in ("", item.group) for item in items) for key in expected}
    return [
        f"{' '.join(part for part in key if part)}: {found[key]} {what} instead of the published {count}"
        for key, count in expected.items()
        if items and found[key] != count
    ]
