"""Images with their labels: folders, ``<folder>/images/<name>.*`` and ``<folder>/labels/<name>.*``, and tables."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from muvit.data.annotations.objects import CONFIG_NAMES, AnnotationConfig
from muvit.data.annotations.open import annotated_images, is_annotation, open_all_annotations
from muvit.data.pyramids.ngff import read_attributes
from muvit.data.slides.derived import as_stored, complete_slides, on_grid
from muvit.data.slides.formats import DICOM_SUFFIX, SLIDE_SUFFIXES, is_dicom_folder, slide_name
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.data.slides.open import open_slide
from muvit.data.slides.pixel_size import OWN_PIXELS, PixelChoice
from muvit.data.slides.selection import select
from muvit.data.slides.slide import Slide
from muvit.data.tables import SlideFiles, Split, is_table, read_slides
from muvit.errors import InputError, ReadError
from muvit.levels import Level

IMAGES = "images"
LABELS = "labels"


def slide_files(path: Path) -> list[Path]:
    """The slides of a folder in alphabetical order, hidden files and other formats left out; a slide itself as it is.

    Raises:
        ReadError: the folder holds no slide.
    """
    if not is_slide_folder(path):
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
    if not is_slide_folder(path) or not inner.is_dir():
        return path
    if any(map(_is_visible_slide, path.iterdir())):
        raise InputError(
            path,
            expected=f"images in the folder itself, or in its folder {IMAGES!r}",
            got="both",
            hint=f"Name the images themselves, or {inner}.",
        )
    return inner


def is_slide_folder(path: Path) -> bool:
    """Whether a path is a folder that is not itself a slide."""
    return path.is_dir() and not _is_slide(path)


def _is_visible_slide(path: Path) -> bool:
    return not path.name.startswith(".") and _is_slide(path)


def _is_slide(path: Path) -> bool:
    return path.name.lower().endswith(SLIDE_SUFFIXES) or (
        path.is_dir() and (read_attributes(path) is not None or _is_dicom_slide(path))
    )


def _is_dicom_slide(path: Path) -> bool:
    """Whether a folder holds DICOM files and nothing else that is an image: those of one slide."""
    return is_dicom_folder(path) and not any(map(_is_image_beside_dicom, path.iterdir()))


def _is_image_beside_dicom(path: Path) -> bool:
    return path.suffix.lower() != DICOM_SUFFIX and path.name.lower().endswith(SLIDE_SUFFIXES)


def open_folder(folder: Path, levels: Sequence[Level] = (), pixels: PixelChoice = OWN_PIXELS) -> dict[str, Slide]:
    """Open every image of a folder (hidden files apart), by name in alphabetical order.

    Args:
        folder: where the images lie.
        levels: levels that each of them gets, computed as they are read where they are not stored.
        pixels: the pixels that are read of each.

    Raises:
        ReadError: the folder is missing or empty, or a file in it cannot be read.
        InputError: two files share one name, a level cannot be computed, or a pixel size is wanted and not known.
    """
    slides = [SlideFiles(image=file) for file in _visible_files(Path(folder), "images")]
    check_names(slides)
    return {slide.name: image for slide, image in zip(slides, open_images(slides, levels, pixels), strict=True)}


def open_label_images(paths: Iterable[Path]) -> dict[str, Slide]:
    """Open label images, and all those of folders, by name in the order given.

    What lies beside them in a folder is left out: files of other formats, and OME-Zarr stores of several channels or of
    fractions, such as the probabilities and the entropy of a prediction.

    Args:
        paths: label images, or folders of them.

    Raises:
        ReadError: a folder holds no label image, or a file cannot be read.
        InputError: two label images share one name.
    """
    labels: dict[str, Slide] = {}
    for path in paths:
        found = [open_slide(file, palette="index") for file in slide_files(path)]
        if is_slide_folder(path):
            found = [slide for slide in found if not isinstance(slide, OmeZarrSlide) or _is_label_like(slide)]
            if not found:
                raise ReadError(path, expected="a folder of label images", got="stores of other kinds")
        for slide in found:
            if slide.name in labels:
                got = f"{labels[slide.name].path} and {slide.path}"
                raise InputError("labels", expected="label images of different names", got=got)
            labels[slide.name] = slide
    return labels


def _is_label_like(slide: Slide) -> bool:
    return slide.num_channels == 1 and slide.dtype.kind in "iu"


def open_labelled_folder(
    folder: Path,
    levels: Sequence[Level] = (),
    label_levels: Sequence[Level] = (),
    annotations: AnnotationConfig | None = None,
    pixels: PixelChoice = OWN_PIXELS,
) -> list[tuple[Slide, Slide]]:
    """Open images and the label image, or the annotations, of the same name of each.

    Args:
        folder: holds ``images`` and ``labels``; or a table, see `list_slides`.
        levels: as of `open_folder`, for the images.
        label_levels: likewise, for the labels.
        annotations: as of `open_labels`.
        pixels: as of `open_folder`.

    Raises:
        ReadError: a folder is missing or empty, or a file cannot be read.
        InputError: an image has no labels, or labels have no image, or what `open_labels` refuses.
    """
    return open_pairs(list_slides(Path(folder)), levels, label_levels, annotations, pixels)


def list_slides(source: Path, split: Split | None = None, *, labelled: bool = True) -> list[SlideFiles]:
    """The files of slides in alphabetical order of their names, or of the table.

    Args:
        source: a folder with ``images`` and ``labels``, or a table, see `muvit.data.tables.read_slides`.
        split: of a table that states splits, only the slides of this one.
        labelled: whether the labels of a folder are wanted.

    Raises:
        ReadError: the folder, its contents, or a file of the table is missing.
        InputError: an image has no labels, or labels have no image, or two slides of one split have one name.
    """
    if is_table(source):
        slides = read_slides(source)
        if split is not None and any(slide.split for slide in slides):
            slides = [slide for slide in slides if slide.split == split]
            if not slides:
                raise InputError(source, expected=f"slides of split {split}", got="none")
        for part in {slide.split for slide in slides}:
            check_names(slide for slide in slides if slide.split == part)
        return slides
    slides = [SlideFiles(image=file) for file in _visible_files(source / IMAGES, "images")]
    check_names(slides)
    if not labelled:
        return slides
    labels, names = _files_by_image(label_files(source / LABELS)), {slide.name for slide in slides}
    unknown, missing = sorted(set(labels) - names), sorted(names - set(labels))
    if unknown or missing:
        got = f"no image for {unknown[0]!r}" if unknown else f"no labels for {missing[0]!r}"
        raise InputError(source, expected="an image and labels of each name", got=got)
    return [SlideFiles(image=slide.image, labels=labels[slide.name]) for slide in slides]


def check_names(slides: Iterable[SlideFiles]) -> None:
    """Refuse slides of the same name: results are filed by names.

    Raises:
        InputError: two have one name.
    """
    seen: dict[str, Path] = {}
    for slide in slides:
        if slide.name in seen:
            raise InputError(slide.image, expected="one image of each name", got=f"also {seen[slide.name]}")
        seen[slide.name] = slide.image


def open_images(
    slides: Sequence[SlideFiles], levels: Sequence[Level] = (), pixels: PixelChoice = OWN_PIXELS
) -> list[Slide]:
    """Open the images of slides; ``levels`` and ``pixels`` as of `open_folder`.

    Raises:
        ReadError: a file cannot be read.
        InputError: a level cannot be computed, or a pixel size is wanted and not known.
    """
    part: dict[str, Any] = {"series": pixels.series, "z": pixels.z, "t": pixels.t, "channels": pixels.channels}
    images = [open_slide(slide.image, **part) for slide in slides]
    for image in images:
        if image.pixel_size_um is None and pixels.slide_pixel_size_um is not None:
            image.state_pixel_size(pixels.slide_pixel_size_um)
    return complete_slides(images, levels, pixel_size_um=pixels.pixel_size_um)


def open_pairs(
    slides: Sequence[SlideFiles],
    levels: Sequence[Level] = (),
    label_levels: Sequence[Level] = (),
    annotations: AnnotationConfig | None = None,
    pixels: PixelChoice = OWN_PIXELS,
) -> list[tuple[Slide, Slide]]:
    """Open the images and labels of slides; labels have the names of their images.

    Args:
        slides: the files.
        levels: as of `open_folder`, for the images.
        label_levels: likewise, for the labels.
        annotations: as of `open_labels`.
        pixels: as of `open_folder`.

    Raises:
        ReadError: a file cannot be read.
        InputError: a slide has no labels, or what `open_labels` refuses.
    """
    images = open_images(slides, levels, pixels)
    files: dict[Path, list[Slide]] = {}
    for slide, image in zip(slides, images, strict=True):
        if slide.labels is None:
            raise InputError(slide.image, expected="labels of every image", got="none")
        files.setdefault(slide.labels, []).append(image)
    labels = _open_label_files(files, label_levels, annotations, pixels)
    return [(image, labels[image.name]) for image in images]


def label_files(path: Path) -> list[Path]:
    """The label images and annotations of a folder, without the settings of these; a file itself as it is.

    Raises:
        ReadError: the folder is missing or empty.
    """
    return [path] if _is_slide(path) or is_annotation(path) else _visible_files(path, "labels")


def open_labels(
    files: Sequence[Path],
    images: Mapping[str, Slide],
    levels: Sequence[Level] = (),
    annotations: AnnotationConfig | None = None,
) -> dict[str, Slide]:
    """Open the label images and the annotations of images, by name in alphabetical order.

    Labels of an image that is resampled are resampled alike; they have the pixels of the image as stored.

    Args:
        files: label images and annotations; all annotations share their classes.
        images: the images by name.
        levels: as of `open_folder`.
        annotations: what annotations stand for, see `muvit.data.annotations.open.open_annotations`.

    Raises:
        ReadError: a file cannot be read.
        InputError: two files share one name, labels have no image, or what `open_annotations` refuses.
    """
    found = _files_by_image(files)
    missing = sorted(set(found) - set(images))
    if missing:
        folder = files[0].parent.parent
        raise InputError(folder, expected="an image and labels of each name", got=f"no image for {missing[0]!r}")
    paired: dict[Path, list[Slide]] = {}
    for name, file in found.items():
        paired.setdefault(file, []).append(images[name])
    return dict(sorted(_open_label_files(paired, levels, annotations).items()))


def _files_by_image(files: Sequence[Path]) -> dict[str, Path]:
    """File of the labels of each image, by the image's name."""
    found: dict[str, Path] = {}
    for file in files:
        for name in annotated_images(file) if is_annotation(file) else [slide_name(file)]:
            if name in found:
                raise InputError(file, expected="one image of each name", got=f"also {found[name]}")
            found[name] = file
    return found


def _open_label_files(
    files: Mapping[Path, Sequence[Slide]],
    levels: Sequence[Level],
    annotations: AnnotationConfig | None,
    pixels: PixelChoice = OWN_PIXELS,
) -> dict[str, Slide]:
    """Labels by the name of their image, from the images that each file is about; of stacks the planes of these."""
    drawn = {file: images for file, images in files.items() if is_annotation(file)}
    stored = {file: images for file, images in files.items() if file not in drawn}
    for file, images in files.items():
        if len(images) > 1 and not (file in drawn and len(annotated_images(file)) > 1):
            raise InputError(file, expected="labels of one image", got=" and ".join(str(i.path) for i in images[:2]))
    planes = {"z": pixels.z, "t": pixels.t}
    on_grids = []
    for file, images in stored.items():
        label = open_slide(file)
        own: dict[str, Any] = {axis: number for axis, number in planes.items() if axis in label.axes}
        on_grids.append(_on_grid_of(images[0], select(label, **own)))
    found = dict(zip(stored, complete_slides(on_grids, levels, "label"), strict=True))
    for file, label in found.items():
        label.name = stored[file][0].name
    opened = [*found.values(), *(open_all_annotations(drawn, annotations, levels=levels) if drawn else ())]
    return {label.name: label for label in opened}


def _on_grid_of(image: Slide, label: Slide) -> Slide:
    """Labels of an image as stored, on its grid.

    Raises:
        InputError: the image is resampled, and the labels have another shape than what is stored of it.
    """
    if set(image.pixel_scale) == {1}:
        return label
    stored = as_stored(image)
    if label.shape != stored.shape:
        expected = f"shape {stored.shape}, as its image {image.path} has"
        raise InputError(label.path, expected=expected, got=f"shape {label.shape}")
    return on_grid(label, image.pixel_scale, "label")


def labels_beside(image: Path) -> Path | None:
    """The labels of an image in a folder ``images``, from the folder ``labels`` beside it; None if there are none.

    Raises:
        InputError: two files are labels of one image.
    """
    folder = image.resolve().parent
    beside = folder.parent / LABELS
    if folder.name != IMAGES or not beside.is_dir():
        return None
    return _files_by_image(label_files(beside)).get(slide_name(image))


def has_annotations(path: Path) -> bool:
    """Whether a file, or one in a folder, holds annotations, which need their image to be read."""
    return is_annotation(path) or (is_slide_folder(path) and any(map(is_annotation, path.iterdir())))


def images_of_labels(files: Sequence[Path], image: Path | None = None) -> dict[str, Slide]:
    """The images of label images or annotations, by name.

    Args:
        files: the labels.
        image: an image, or a folder of images; unset, the folder ``images`` beside the folder of the labels. A single
            image belongs to a single file, whatever their names.

    Raises:
        ReadError: there is no such folder, or an image cannot be read.
    """
    places = [image] if image is not None else sorted({file.resolve().parents[1] / IMAGES for file in files})
    for place in places:
        if not place.exists():
            expected = f"its image, in {place}"
            raise ReadError(files[0], expected=expected, got="nothing there", hint="Name the image (--image).")
    slides = [open_slide(file) for file in image_files(places)]
    if len(slides) == len(files) == 1 and is_annotation(files[0]):
        return dict.fromkeys(annotated_images(files[0]), slides[0])
    return {slide.name: slide for slide in slides}


def _visible_files(folder: Path, kind: str) -> list[Path]:
    files = [f for f in folder.iterdir() if not f.name.startswith(".")] if folder.is_dir() else []
    files = sorted(f for f in files if f.name not in CONFIG_NAMES)
    if not files:
        raise ReadError(folder, expected=f"a folder of {kind}", got="nothing there")
    return files


def class_legend(label: Slide, num_classes: int) -> tuple[dict[int, str], dict[int, tuple[int, int, int]]]:
    """Names and RGB colours of the classes, as far as a label image states them."""
    names = {value: name for value, name in label.label_names.items() if value < num_classes}
    colors = {value: (r, g, b) for value, (r, g, b, *_) in label.label_colors.items() if value < num_classes}
    return names, colors
