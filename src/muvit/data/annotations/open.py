"""Opening annotations of any supported format as the label image of their image."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from muvit.data.annotations.formats import (
    coco_images,
    coco_objects,
    geojson_objects,
    imagej_objects,
    is_coco,
    read_json,
    xml_objects,
)
from muvit.data.annotations.objects import (
    CONFIG_NAMES,
    AnnotationConfig,
    Annotations,
    config_of_names,
    describe_classes,
    read_config,
    without_garbage_collection,
)
from muvit.data.annotations.parquet import PARQUET_SUFFIXES, geoparquet_objects, is_spatialdata, spatialdata_objects
from muvit.data.annotations.slide import AnnotationSlide, LabelPolygons
from muvit.data.slides.derived import as_stored
from muvit.data.slides.formats import slide_name
from muvit.data.slides.slide import Slide
from muvit.errors import InputError, ReadError
from muvit.labels import IGNORED, WIDE_IGNORED
from muvit.levels import Level

_LOG = logging.getLogger(__name__)

_JSON = (".geojson", ".json")
_IMAGEJ = (".roi", ".zip")
ANNOTATION_SUFFIXES = (*_JSON, ".xml", *_IMAGEJ, *PARQUET_SUFFIXES)


def is_annotation(path: Path) -> bool:
    """Whether a file holds annotations, by its name, or a folder those of SpatialData."""
    if path.is_dir():
        return is_spatialdata(path)
    return path.suffix.lower() in ANNOTATION_SUFFIXES and path.name not in CONFIG_NAMES


def annotated_images(file: Path) -> list[str]:
    """Names of the images that a file is about: its own (``a.geojson``, also ``a.svs.geojson``), or those in COCO."""
    if file.suffix.lower() == ".json":
        content = read_json(file)
        if is_coco(content) and len(content["images"]) > 1:
            return coco_images(content)
    return [slide_name(Path(file.stem))]


def config_of(label: Slide) -> AnnotationConfig | None:
    """Settings under which annotations get the label values of these labels; None where they name no classes."""
    stored = as_stored(label)
    if isinstance(stored, AnnotationSlide):
        return stored.config
    return config_of_names(label.label_names) if label.label_names else None


def open_annotations(
    path: str | Path, image: Slide, config: AnnotationConfig | None = None, *, levels: Sequence[Level] = ()
) -> AnnotationSlide:
    """Open annotations as the label image of their image.

    Formats: GeoJSON of QuPath, XML of ASAP and of ImageScope, COCO, with the extra ``muvit[annotations]`` the regions
    of ImageJ, and with ``muvit[parquet]`` GeoParquet and the shapes of SpatialData.

    Args:
        path: the file; of SpatialData, the store or one of its elements of shapes.
        image: the image that was annotated.
        config: classes and the meaning of what is not annotated; unset, a file ``classes.json`` or ``classes.yaml``
            beside the annotations, or the classes that are found in them.
        levels: further levels, beside those of the image.

    Raises:
        ReadError: the file cannot be read, or holds no polygon.
        InputError: a class has no value, the image is no 2D image, or no polygon lies in it.
    """
    return open_all_annotations({Path(path): [image]}, config, levels=levels)[0]


def open_all_annotations(
    images: Mapping[Path, Sequence[Slide]], config: AnnotationConfig | None = None, *, levels: Sequence[Level] = ()
) -> list[AnnotationSlide]:
    """Open the annotations of several images, which share their classes.

    Args:
        images: the images that each file is about.
        config: as of `open_annotations`; a file with settings lies beside the first.
        levels: as of `open_annotations`.

    Raises:
        ReadError, InputError: as `open_annotations`.
    """
    folder = next(iter(images)).parent
    stated = config or read_config(folder) or AnnotationConfig()
    column = stated.class_column
    found = [(read_annotations(file, image, column), image) for file, several in images.items() for image in several]
    resolved = stated.with_classes(name for annotations, _ in found for name in annotations.class_names)
    if stated.classes is None:
        _LOG.warning(
            "%s: classes as found in the annotations: %s; not annotated: %s", folder, describe_classes(resolved),
            resolved.unannotated,
        )  # fmt: skip
    return [_as_labels(annotations, image, resolved, levels) for annotations, image in found]


def read_annotations(file: Path, image: Slide, class_column: str | None = None) -> Annotations:
    """The objects of a file, in pixels of its image as stored.

    Args:
        file: the file.
        image: the image that was annotated.
        class_column: column with the classes, of a table that has several.

    Raises:
        ReadError: the file cannot be read, or holds no polygon.
        InputError: the image is no 2D image, or no polygon lies in it.
    """
    if image.axes != "yx":
        raise InputError(file, expected="the annotations of a 2D image", got=f"{image.path} with axes {image.axes}")
    image = as_stored(image)
    with without_garbage_collection():
        annotations = _read(file, image, class_column)
    height, width = image.shape
    left, top, right, bottom = shapely.bounds(annotations.polygons).T
    is_inside = (left < width) & (top < height) & (right > 0) & (bottom > 0)
    outside = int((~is_inside).sum())
    if not is_inside.any():
        raise InputError(
            file,
            expected=f"polygons in the {height} x {width} pixels of {image.path}",
            got=f"none there; the first begins at row {top[0]:g}, column {left[0]:g}",
            hint="Name the image that was annotated; coordinates count its finest pixels.",
        )
    if outside:
        _LOG.warning("%s: %d of %d objects lie outside of the image", file, outside, len(is_inside))
    return annotations


def _read(file: Path, image: Slide, class_column: str | None) -> Annotations:
    suffix = file.suffix.lower()
    if file.is_dir():
        return spatialdata_objects(file, image, class_column)
    if suffix in PARQUET_SUFFIXES:
        return geoparquet_objects(file, class_column)
    if suffix == ".xml":
        return xml_objects(file)
    if suffix in _IMAGEJ:
        return imagej_objects(file)
    if suffix not in _JSON:
        expected = f"a file ending in {', '.join(ANNOTATION_SUFFIXES)}"
        raise ReadError(file, expected=expected, got=f"one ending in {suffix or 'nothing'}")
    content = read_json(file)
    if is_coco(content):
        return coco_objects(file, content, image.name, image.shape)
    return _on_slide(geojson_objects(file, content), image)


def _on_slide(annotations: Annotations, image: Slide) -> Annotations:
    """QuPath counts from the corner of what was scanned, OpenSlide from that of the whole area."""
    bounds = getattr(image, "bounds", None)
    if bounds is not None and any(bounds[0]):
        moved = shapely.transform(annotations.polygons, lambda points: points + bounds[0][::-1])
        annotations.polygons[:] = moved
    return annotations


def _as_labels(
    annotations: Annotations, image: Slide, config: AnnotationConfig, levels: Sequence[Level]
) -> AnnotationSlide:
    classes = config.classes or {}
    names = np.array(annotations.class_names, object)
    is_region = names == config.region_class
    unknown = sorted(set(annotations.class_names) - {config.region_class, *classes})
    if unknown:
        raise InputError(
            annotations.file,
            expected=f"classes with a value ({', '.join(classes) or 'none'})",
            got=", ".join(map(repr, unknown)),
            hint="Give each a value, or ignore, under classes (data.annotations of the recipe, or classes.yaml beside "
            "the annotations).",
        )
    values = [value for value in classes.values() if value != "ignore"]
    dtype, ignored = (np.uint8, IGNORED) if max(values, default=0) < IGNORED else (np.uint16, WIDE_IGNORED)
    order = np.flatnonzero(~is_region)
    order = order[np.argsort(_priority(annotations, config)[order], kind="stable")]
    stored: dict[str, Any] = {name: ignored if value == "ignore" else value for name, value in classes.items()}
    polygons = _on_grid(annotations.polygons, image)
    return AnnotationSlide(
        annotations.file,
        image,
        LabelPolygons(
            polygons=polygons[order],
            values=np.array([stored[name] for name in names[order]], dtype),
            regions=polygons[is_region] if is_region.any() else None,
            unannotated=0 if config.unannotated == "background" else ignored,
        ),
        config=config,
        levels=levels,
        colors=_colors(annotations, config),
    )


def _on_grid(polygons: np.ndarray[Any, Any], image: Slide) -> np.ndarray[Any, Any]:
    """Polygons in world pixels of an image, which may be resampled, from those in its pixels as stored."""
    scale = np.array(image.pixel_scale[::-1])
    if (scale == 1).all():
        return polygons
    scaled: np.ndarray[Any, Any] = shapely.transform(polygons, lambda points: points / scale)
    return scaled


def _priority(annotations: Annotations, config: AnnotationConfig) -> np.ndarray[Any, Any]:
    """Number of each object by which they are painted, the lowest first."""
    if config.overlap == "area":
        return -np.asarray(shapely.area(annotations.polygons))
    if config.overlap == "classes":
        place = {name: i for i, name in enumerate(config.classes or ())}
        return np.array([place.get(name, -1) for name in annotations.class_names])
    return np.zeros(len(annotations.class_names))


def _colors(annotations: Annotations, config: AnnotationConfig) -> dict[int, tuple[int, ...]]:
    """Colour of each label value: that of the first of its classes that has one."""
    colors: dict[int, tuple[int, ...]] = {}
    for name, value in (config.classes or {}).items():
        color = (config.colors or {}).get(name) or annotations.colors.get(name)
        if value != "ignore" and color is not None:
            colors.setdefault(value, color)
    return colors
