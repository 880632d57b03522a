"""Mouse brain sections of any layout, whole specimens held out (MuViT section 4.2: specimen BM15 of 12 tests).

The paper's sections come from Staeger et al., "Three-dimensional imaging of murine brains", Scientific Data 7:235
(2020); how its authors stored sections and region labels is not published, so everything can be said.
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from muvit.data.slides.formats import slide_name
from muvit.data.sources.label_map import LabelMap
from muvit.data.sources.source import Item, Source, mapped
from muvit.errors import InputError

CLASSES = (
    "background",
    "hippocampus",
    "thalamus",
    "hypothalamus",
    "septal complex",
    "caudoputamen",
    "dorsal cortex",
    "ventral cortex",
    "lateral cortex",
    "corpus callosum",
    "ventricular system",
    "midbrain",
)
"""In the order of the paper's tables."""

REGIONS = LabelMap({name: (value,) for value, name in enumerate(CLASSES)})
"""Labels that are stored as the number of their class."""


def find_mouse(
    folder: Path,
    *,
    images: str = "images/*",
    labels: str = "labels/{name}.*",
    label_map: LabelMap = REGIONS,
    specimen: str = r"BM\d+",
    test_specimens: Sequence[str] = ("BM15",),
    val_specimens: Sequence[str] = (),
) -> Source:
    """The sections below a folder.

    Args:
        folder: where they lie.
        images: pattern of the images' paths inside the folder, ``**`` for any folders.
        labels: pattern of the one label file of an image; ``{name}`` is the image's file name without its suffix,
            ``{specimen}`` its specimen.
        label_map: classes of the stored label values.
        specimen: regular expression that finds the specimen in an image's path: its first group, or all of it.
        test_specimens: specimens to test on.
        val_specimens: specimens to validate on.

    Raises:
        InputError: ``images`` or ``labels`` is no pattern of paths inside the folder, ``specimen`` is no regular
            expression, or a specimen is to be tested and validated on.
    """
    try:
        expression = re.compile(specimen)
    except re.error as error:
        raise InputError("specimen", expected="a regular expression", got=f"{specimen!r}: {error}") from error
    if both := sorted(set(test_specimens) & set(val_specimens)):
        raise InputError("val_specimens", expected="none of the test specimens", got=both[0])
    items: list[Item] = []
    problems: list[str] = []
    for file in _matches(folder, images, "images"):
        path = file.relative_to(folder).as_posix()
        match = expression.search(path)
        if file.name.startswith(".") or match is None:
            problems += [] if match else [f"{path}: no specimen ({specimen!r}) in its path"]
            continue
        animal, name = match[1] if expression.groups else match[0], slide_name(file)
        pattern = labels.replace("{name}", glob.escape(name)).replace("{specimen}", glob.escape(animal))
        found = _matches(folder, pattern, "labels")
        if len(found) != 1:
            problems.append(f"{path}: {len(found) or 'no'} label files {pattern}")
            continue
        items.append(
            Item(
                name=name if animal in name else f"{animal}_{name}",
                split="test" if animal in test_specimens else "val" if animal in val_specimens else "train",
                images=(file,),
                labels=(found[0],),
                group=animal,
                animal=animal,
            )
        )
    known = {item.animal for item in items}
    if known:
        problems += [f"no image of specimen {name}" for name in (*test_specimens, *val_specimens) if name not in known]
    elif not problems:
        problems.append(f"no images {images}")
    return Source(
        dataset="mouse",
        folder=folder,
        items=tuple(items),
        levels=(1, 2, 4, 8, 16, 32),
        options={
            "label_map": label_map.to_json(),
            "test_specimens": sorted(test_specimens),
            "val_specimens": sorted(val_specimens),
        },
        problems=tuple(problems),
        **mapped(label_map),
    )


def _matches(folder: Path, pattern: str, subject: str) -> list[Path]:
    """Sorted paths below a folder that match a pattern."""
    try:
        return sorted(folder.glob(pattern))
    except (NotImplementedError, ValueError) as error:
        raise InputError(subject, expected="a pattern of paths inside the folder", got=repr(pattern)) from error
