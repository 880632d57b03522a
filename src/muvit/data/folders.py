"""Folders of images with their labels: ``<folder>/images/<name>.*`` and ``<folder>/labels/<name>.*``."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from muvit.data.pyramids.ngff import Kind, read_attributes
from muvit.data.slides.derived import complete_slides
from muvit.data.slides.formats import SLIDE_SUFFIXES
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.errors import InputError, ReadError
from muvit.levels import Level

IMAGES = "images"
LABELS = "labels"


def slide_files(path: Path) -> list[Path]:
    """The slides of a folder in alphabetical order, hidden files and other formats left out; a slide itself as it is.

    Raises:
        ReadError: the folder holds no slide.
    """
    if not _is_plain_folder(path):
        return [path]
    files = sorted(filter(_is_visible_slide, path.iterdir()))
    if not files:
        raise ReadError(path, expected="an image, or a folder of images", got="a folder without any")
    return files


def image_files(paths: Iterable[Path]) -> list[Path]:
    """The files of images, and of folders of images; of a folder with images and labels, those of its ``images``.

    Raises:
        ReadError: a folder holds no slide.
        InputError: a folder holds slides beside its ``images``.
    """
    return [file for path in paths for file in slide_files(image_folder(path))]


def image_folder(path: Path) -> Path:
    """Folder of the images of a folder: its ``images``, if it has one, or itself; for the path of a slide, that path.

    Raises:
        InputError: it holds slides beside its ``images``.
    """
    inner = path / IMAGES
    if not _is_plain_folder(path) or not inner.is_dir():
        return path
    if any(map(_is_visible_slide, path.iterdir())):
        raise InputError(
            path,
            expected=f"images in the folder itself, or in its folder {IMAGES!r}",
            got="both",
            hint=f"Name the images themselves, or {inner}.",
        )
    return inner


def _is_plain_folder(path: Path) -> bool:
    """Whether a path is a folder that is not itself a slide."""
    return path.is_dir() and not _is_slide(path)


def _is_visible_slide(path: Path) -> bool:
    return not path.name.startswith(".") and _is_slide(path)


def _is_slide(path: Path) -> bool:
    return path.name.lower().endswith(SLIDE_SUFFIXES) or (path.is_dir() and read_attributes(path) is not None)


def open_folder(folder: Path, levels: Sequence[Level] = (), kind: Kind = "image") -> dict[str, Slide]:
    """Open every slide of a folder (hidden files apart), by name in alphabetical order.

    Args:
        folder: where the slides lie.
        levels: levels that each of them gets, computed as they are read where they are not stored.
        kind: images, or labels.

    Raises:
        ReadError: the folder is missing or empty, or a file in it cannot be read.
        InputError: two files share one name, or a level cannot be computed.
    """
    files = sorted(f for f in Path(folder).iterdir() if not f.name.startswith(".")) if Path(folder).is_dir() else []
    if not files:
        raise ReadError(folder, expected="a folder of images", got="nothing there")
    slides: dict[str, Slide] = {}
    for file in files:
        slide = open_slide(file)
        if slide.name in slides:
            raise InputError(file, expected="one image of each name", got=f"also {slides[slide.name].path}")
        slides[slide.name] = slide
    return dict(zip(slides, complete_slides(list(slides.values()), levels, kind), strict=True))


def open_labelled_folder(
    folder: Path, levels: Sequence[Level] = (), label_levels: Sequence[Level] = ()
) -> list[tuple[Slide, Slide]]:
    """Open images and the label image of the same name of each.

    Args:
        folder: holds ``images`` and ``labels``.
        levels: as of `open_folder`, for the images.
        label_levels: likewise, for the labels.

    Raises:
        ReadError: a folder is missing or empty, or a file cannot be read.
        InputError: an image has no labels, or labels have no image.
    """
    images = open_folder(Path(folder) / IMAGES, levels)
    labels = open_folder(Path(folder) / LABELS, label_levels, "label")
    for one, other, kind in ((images, labels, "labels"), (labels, images, "image")):
        missing = sorted(set(one) - set(other))
        if missing:
            raise InputError(folder, expected="an image and labels of each name", got=f"no {kind} for {missing[0]!r}")
    return [(images[name], labels[name]) for name in images]


def class_legend(label: Slide, num_classes: int) -> tuple[dict[int, str], dict[int, tuple[int, int, int]]]:
    """Names and RGB colours of the classes, as far as a label image states them."""
    names = {value: name for value, name in label.label_names.items() if value < num_classes}
    colors = {value: (r, g, b) for value, (r, g, b, *_) in label.label_colors.items() if value < num_classes}
    return names, colors
