"""IDRiD: lesions of diabetic retinopathy beside the optic disc in photographs of the retina (Porwal et al., 2018).

As downloaded: ``1. Original Images/a. Training Set/IDRiD_<n>.jpg`` and, for each kind of lesion,
``2. All Segmentation Groundtruths/a. Training Set/3. Hard Exudates/IDRiD_<n>_EX.tif``, likewise ``b. Testing Set``.
Files are found by their names, whatever the folders.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from muvit.data.slides.formats import RASTER_SUFFIXES, TIFF_SUFFIXES
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.data.sources.derived import DerivedSlide, check_shapes, reduced
from muvit.data.sources.source import Item, Source, Split
from muvit.errors import InputError

OPTIC_DISC = "OD"

LESIONS = {"MA": "microaneurysm", "HE": "haemorrhage", "EX": "hard exudate", "SE": "soft exudate"}
"""Kinds of lesions by the codes in the files' names."""

LAST_TRAINING_IMAGE = 54
"""Photographs with higher numbers are those of the published test set."""

_MASKS = {OPTIC_DISC: 81, "MA": 81, "HE": 80, "EX": 81, "SE": 40}
"""Published numbers of masks; each photograph has one of its optic disc."""
# the other tasks of the data set number their photographs with three digits
_NAME = re.compile(r"(IDRiD_\d\d)(?:_([A-Z]{2}))?\.\w+")


def find_idrid(
    folder: Path,
    *,
    lesions: Sequence[str] = ("EX",),
    test_images: Sequence[str] = (),
    val_images: Sequence[str] = (),
    factor: int = 1,
) -> Source:
    """The photographs below a folder, each with its masks.

    Classes are background, the optic disc, and the kinds of lesions in the order given; where masks overlap, the later
    class counts. A photograph without a mask of a kind has no such lesion; the optic disc is in all. Photographs of the
    published test set test. Which photographs show the same patient is not published.

    Args:
        folder: where they lie.
        lesions: codes of the kinds of lesions, of `LESIONS`.
        test_images: names of further photographs to test on, such as ``IDRiD_03``.
        val_images: names of photographs to validate on.
        factor: downsampling of the stored photographs, whose files have 4288 x 2848 px.

    Raises:
        InputError: an unknown kind of lesion or one named twice, a photograph to be tested and validated on, or a
            factor below 1.
    """
    if not lesions or len(set(lesions)) != len(lesions) or not set(lesions) <= set(LESIONS):
        raise InputError("lesions", expected=f"some of {', '.join(LESIONS)}, each once", got=list(lesions))
    if both := sorted(set(test_images) & set(val_images)):
        raise InputError("val_images", expected="none of the test images", got=both[0])
    if factor < 1:
        raise InputError("factor", expected="a whole number from 1", got=factor)
    codes = (OPTIC_DISC, *lesions)
    problems: list[str] = []
    images, masks = _files(folder, problems)
    items: list[Item] = []
    for name, image in images.items():
        if (name, OPTIC_DISC) not in masks:
            problems.append(f"{image}: no mask {name}_{OPTIC_DISC}.tif of its optic disc")
            continue
        items.append(
            Item(
                name=name,
                split=_split_of(name, test_images, val_images),
                images=(image,),
                labels=tuple(masks[name, code] for code in codes if (name, code) in masks),
                factor=factor,
            )
        )
    problems += [] if images else ["no photographs IDRiD_<n>.jpg"]
    problems += [f"no image {name}" for name in (*test_images, *val_images) if images and name not in images]
    found = Counter(code for name, code in masks if name in images)
    problems += [f"no masks IDRiD_<n>_{code}.tif" for code in lesions if images and not found[code]]
    return Source(
        dataset="idrid",
        folder=folder,
        items=tuple(items),
        class_names=("background", "optic disc", *(LESIONS[code] for code in lesions)),
        open_labels=partial(_open_masks, codes),
        levels=(1, 2, 4, 8, 16, 32),
        options={
            "lesions": list(lesions),
            "test_images": sorted(test_images),
            "val_images": sorted(val_images),
            "factor": factor,
        },
        problems=tuple(problems),
        warnings=tuple(
            f"{code}: {found[code]} masks instead of the published {_MASKS[code]}"
            for code in codes
            if items and found[code] != _MASKS[code]
        ),
    )


def is_marked(pixels: np.ndarray[Any, Any], file: Path) -> np.ndarray[Any, Any]:
    """Whether a mask ``(C, *space)`` marks a pixel: a colour by its red, which JPEG blurs; a value by not being 0."""
    is_value = len(pixels) == 1 and file.suffix.lower() not in (".jpg", ".jpeg")
    return np.asarray(pixels[0] > (0 if is_value else 127))


def _split_of(name: str, test_images: Sequence[str], val_images: Sequence[str]) -> Split:
    if name in val_images:
        return "val"
    return "test" if name in test_images or int(name[-2:]) > LAST_TRAINING_IMAGE else "train"


def _files(folder: Path, problems: list[str]) -> tuple[dict[str, Path], dict[tuple[str, str], Path]]:
    """Photographs by name, and masks by name and code; two of one are reported as a problem."""
    images: dict[str, Path] = {}
    masks: dict[tuple[str, str], Path] = {}
    for file in sorted(folder.rglob("IDRiD_*")) if folder.is_dir() else ():
        match = _NAME.fullmatch(file.name)
        if match is None or file.suffix.lower() not in (*TIFF_SUFFIXES, *RASTER_SUFFIXES):
            continue
        name, code = match[1], match[2]
        earlier = images.setdefault(name, file) if code is None else masks.setdefault((name, code), file)
        if earlier != file:
            problems.append(f"two files of one name: {earlier} and {file}")
    return images, masks


def _open_masks(codes: tuple[str, ...], item: Item) -> Slide:
    masks = tuple(open_slide(file) for file in item.labels)
    check_shapes(masks)
    values = tuple(codes.index(file.stem.rpartition("_")[2]) + 1 for file in item.labels)
    painted = DerivedSlide(
        masks[0], partial(_painted, masks, values), num_channels=1, dtype=np.uint8, channel_names=("label",)
    )
    return reduced(painted, item.factor, kind="label")


def _painted(
    masks: tuple[Slide, ...], values: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """Classes ``(1, *size)`` of a window: each mask with its class, over those before."""
    classes = np.zeros((1, *size), np.uint8)
    for mask, value in zip(masks, values, strict=True):
        classes[0][is_marked(mask.read(1, start, size), mask.path)] = value
    return classes
