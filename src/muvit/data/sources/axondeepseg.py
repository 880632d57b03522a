"""Axons and their myelin in electron micrographs of nerves and spinal cords (AxonDeepSeg; Zaimi et al., 2018).

As downloaded, in the order of BIDS: ``sub-<animal>/micr/<name>_SEM.png`` (or ``_TEM``, ``_BF``) with its pixel size in
``<name>_SEM.json``, and ``derivatives/labels/sub-<animal>/micr/<name>_SEM_seg-axonmyelin-manual.png``. The older order
is found as well: ``<name>/image.png``, ``<name>/mask.png`` and ``<name>/pixel_size_in_micrometer.txt``.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from muvit.data.slides.formats import RASTER_SUFFIXES, TIFF_SUFFIXES
from muvit.data.slides.open import open_slide
from muvit.data.sources.label_map import LabelMap
from muvit.data.sources.source import Item, Source, Split, labels_by
from muvit.errors import InputError

TISSUE = LabelMap({"background": (0,), "myelin": (127, 128), "axon": (255,)})
"""Grey values of the masks."""

GAP = 0.05
"""Share of an image's width that is left out between the part to train on and the part to test on."""

_BIDS = re.compile(r"(sub-[^_]+)_.*_(SEM|TEM|BF)")
_SUFFIXES = (*RASTER_SUFFIXES, *TIFF_SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """An image with its mask."""

    name: str
    image: Path
    mask: Path
    animal: str = ""
    modality: str = ""
    pixel_size_um: float | None = None


def find_axondeepseg(
    folder: Path,
    *,
    label_map: LabelMap = TISSUE,
    test_subjects: Sequence[str] = (),
    val_subjects: Sequence[str] = (),
    test_part: float = 0.0,
) -> Source:
    """The images below a folder with their reference masks, those of an animal in one split.

    A mask that a model made (``image_seg-axonmyelin.png``) is no reference, and its image is left out.

    Args:
        folder: where they lie.
        label_map: classes of the masks' grey values.
        test_subjects: animals to test on, such as ``sub-rat6``; in the older order, names of images.
        val_subjects: animals to validate on.
        test_part: share of the width of every image left to train on, at its right end, to test on instead, for where
            there is but one image: this tests on the animal of the training. `GAP` of the width between is in no split.

    Raises:
        InputError: a subject is to be tested and validated on, or ``test_part`` is not below 0.9.
    """
    if both := sorted(set(test_subjects) & set(val_subjects)):
        raise InputError("val_subjects", expected="none of the test subjects", got=both[0])
    if not 0 <= test_part < 0.9:
        raise InputError("test_part", expected="a share from 0 to below 0.9", got=test_part)
    problems: list[str] = []
    warnings: list[str] = []
    found = [*_bids(folder, problems), *_folders(folder, problems, warnings)]
    subjects = {one.animal or one.name for one in found}
    problems += [f"no image of {name}" for name in (*test_subjects, *val_subjects) if found and name not in subjects]
    if not found and not problems:
        problems.append("no images sub-<animal>/micr/<name>_SEM.png with masks, and no <name>/image.png with mask.png")
    items: list[Item] = []
    for one in found:
        subject = one.animal or one.name
        split: Split = "test" if subject in test_subjects else "val" if subject in val_subjects else "train"
        items += [_item(one, split)] if split != "train" or not test_part else _parts(one, test_part, problems)
    return Source(
        dataset="axondeepseg",
        folder=folder,
        items=tuple(items),
        class_names=label_map.names,
        open_labels=labels_by(partial(_decode_grey, label_map), len(label_map.names)),
        options={
            "label_map": label_map.to_json(),
            "test_subjects": sorted(test_subjects),
            "val_subjects": sorted(val_subjects),
            "test_part": test_part,
        },
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


def _decode_grey(label_map: LabelMap, pixels: np.ndarray[Any, Any], file: Path) -> np.ndarray[Any, Any]:
    """Classes of a mask that is grey, in one channel or as colours of three equal ones."""
    is_grey = len(pixels) == 3 and bool((pixels == pixels[:1]).all())
    return label_map.decode(pixels[:1] if is_grey else pixels, file)


def _item(one: _Found, split: Split, part: str = "", columns: tuple[int, int] | None = None) -> Item:
    return Item(
        name=f"{one.name}{part}",
        split=split,
        images=(one.image,),
        labels=(one.mask,),
        columns=columns,
        pixel_size_um=one.pixel_size_um,
        group=one.modality,
        # parts of one image are of one animal, in two splits on purpose
        animal="" if columns else one.animal,
    )


def _parts(one: _Found, test_part: float, problems: list[str]) -> list[Item]:
    """The left part of an image to train on, and its right part to test on."""
    try:
        width = open_slide(one.image).shape[-1]
    except InputError as error:
        problems.append(str(error).rstrip("."))
        return []
    last, first = round(width * (1 - test_part - GAP)), round(width * (1 - test_part))
    return [_item(one, "train", "_left", (0, last)), _item(one, "test", "_right", (first, width))]


def _bids(folder: Path, problems: list[str]) -> list[_Found]:
    found = []
    for file in sorted(folder.glob("sub-*/*/sub-*")) if folder.is_dir() else ():
        match = _BIDS.fullmatch(file.stem)
        if match is None or file.suffix.lower() not in _SUFFIXES:
            continue
        place = folder / "derivatives" / "labels" / file.parent.relative_to(folder)
        masks = sorted(m for m in place.glob(f"{file.stem}_seg-axonmyelin-manual.*") if m.suffix.lower() in _SUFFIXES)
        if len(masks) != 1:
            problems.append(f"{file}: {len(masks) or 'no'} masks {place}/{file.stem}_seg-axonmyelin-manual.png")
            continue
        size = _pixel_size(file.with_suffix(".json"), problems)
        found.append(
            _Found(name=file.stem, image=file, mask=masks[0], animal=match[1], modality=match[2], pixel_size_um=size)
        )
    return found


def _folders(folder: Path, problems: list[str], warnings: list[str]) -> list[_Found]:
    found = []
    for file in sorted(folder.glob("*/image.*")) if folder.is_dir() else ():
        masks = [m for m in sorted(file.parent.glob("mask.*")) if m.suffix.lower() in _SUFFIXES]
        if file.suffix.lower() not in _SUFFIXES:
            continue
        if not masks:
            warnings.append(f"{file}: left out, no mask.png beside it")
            continue
        modality = re.search(r"SEM|TEM|BF", file.parent.name.upper())
        found.append(
            _Found(
                name=file.parent.name,
                image=file,
                mask=masks[0],
                modality=modality[0] if modality else "",
                pixel_size_um=_pixel_size(file.parent / "pixel_size_in_micrometer.txt", problems),
            )
        )
    return found


def _pixel_size(file: Path, problems: list[str]) -> float | None:
    """Micrometers per pixel that a file beside an image states: ``PixelSize`` of JSON, or the number in a text."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        size = content.get("PixelSize") if isinstance(content, dict) else content
        unit = content.get("PixelSizeUnits", "um") if isinstance(content, dict) else "um"
        sizes: list[Any] = size if isinstance(size, list) else [size]
        values = {float(one) * {"um": 1.0, "nm": 1e-3, "mm": 1e3}[unit] for one in sizes}
        [value] = values
        if not (isfinite(value) and value > 0):
            raise ValueError(value)
    except (ValueError, LookupError, TypeError, RecursionError):
        problems.append(f"{file}: no pixel size in it, one number for both axes")
        return None
    return value
