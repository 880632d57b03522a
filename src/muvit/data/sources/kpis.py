"""KPIS: glomeruli in whole-slide images of mouse and rat kidneys (KPIs challenge, MICCAI 2024; MuViT section 4.3).

As downloaded: ``<split>/Task2_WSI_level/<group>/<case>_wsi.tiff`` with ``<case>_mask.tiff`` beside it; the organisers'
container has ``<split>/<group>/{img,mask}/`` instead. A split's folder may be called ``KPIs24 Training Data``,
``KPIs24_Validation_Data``, ``test``, ...; groups are spelt in any case.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from muvit.data.sources.source import Item, Source, Split, compare_counts, labels_by

GROUPS = ("56Nx", "DN", "NEP25", "normal")
"""Disease models: 5/6 nephrectomy, diabetic nephropathy, NEP25, and healthy animals."""

CLASSES = ("background", "glomerulus")

_SPLITS: dict[Split, str] = {"train": r"train", "val": r"valid|\bval\b", "test": r"test"}
_COUNTS: dict[Split, tuple[int, ...]] = {"train": (5, 5, 15, 5), "val": (2,) * 4, "test": (3,) * 4}
_KINDS = {"wsi": "img", "mask": "mask"}


def find_kpis(folder: Path) -> Source:
    """The slides below a folder that holds the splits' folders.

    NEP25 was scanned at 20x, the other groups at 40x: those are halved. A case is named by a number of the laboratory
    with, for some animals, the number of a section after it (``08_368_02``), or by the sex and number of a healthy
    animal (``normal_M1574``): the rest without the section is the animal.
    """
    items: list[Item] = []
    problems: list[str] = []
    for split, pattern in _SPLITS.items():
        roots = [path for name, path in _inside(folder).items() if re.search(pattern, name.replace("_", " "))]
        found = {root: groups for root in roots if (groups := _groups(root))}
        if len(found) > 1:
            problems.append(f"several folders for {split}: {', '.join(sorted(root.name for root in found))}")
        for groups in found.values():
            for group, place in groups.items():
                items += _cases(place, group, split, problems)
    if not items and not problems:
        problems.append("no <split>/Task2_WSI_level/<group>/<case>_wsi.tiff and no <split>/<group>/img/<case>_wsi.tiff")
    expected = {
        (str(split), group): count
        for split, counts in _COUNTS.items()
        for group, count in zip(GROUPS, counts, strict=True)
    }
    return Source(
        dataset="kpis",
        folder=folder,
        items=tuple(items),
        class_names=CLASSES,
        open_labels=labels_by(is_glomerulus, len(CLASSES)),
        levels=(1, 2, 4, 8, 16, 32, 64),
        problems=tuple(problems),
        warnings=tuple(compare_counts(items, expected, what="slides")),
    )


def animal_of(case: str) -> str:
    """The animal of a case: ``08-368`` of ``08-368-02``, ``12-116`` and ``M1574`` of themselves."""
    numbered = re.fullmatch(r"(\d+-\d+)-\d+", case)
    return numbered[1] if numbered else case


def is_glomerulus(pixels: np.ndarray[Any, Any], file: Path) -> np.ndarray[Any, Any]:
    """Class 1 at all pixels of a mask ``(C, *space)`` above 0."""
    return np.asarray((pixels > 0).any(0), np.uint8)


def _groups(root: Path) -> dict[str, Path]:
    """Folder of each group that a split's folder has."""
    inside = _inside(root)
    inside = _inside(inside["task2_wsi_level"]) if "task2_wsi_level" in inside else inside
    return {group: inside[group.lower()] for group in GROUPS if group.lower() in inside}


def _cases(place: Path, group: str, split: Split, problems: list[str]) -> list[Item]:
    """Slides of a group, each with its mask; one without a partner is reported as a problem."""
    files: dict[str, dict[str, Path]] = {"wsi": {}, "mask": {}}
    for kind, folder in _KINDS.items():
        for file in (*_inside(place).values(), *_inside(place / folder).values()):
            if match := re.fullmatch(rf"(.+)_{kind}\.tiff?", file.name, re.IGNORECASE):
                case = re.sub(rf"^{group}-", "", re.sub(r"[_\s]+", "-", match[1]), flags=re.IGNORECASE)
                if case in files[kind]:
                    problems.append(f"two files of one case: {files[kind][case]} and {file}")
                files[kind][case] = file
    for kind, other in (("wsi", "mask"), ("mask", "wsi")):
        lonely = sorted(files[kind].keys() - files[other].keys())
        problems += [f"{files[kind][case]}: no {case}_{other}.tiff" for case in lonely]
    return [
        Item(
            name=f"{group}_{case}",
            split=split,
            images=(files["wsi"][case],),
            labels=(files["mask"][case],),
            factor=1 if group == "NEP25" else 2,
            group=group,
            animal=animal_of(case),
        )
        for case in sorted(files["wsi"].keys() & files["mask"].keys())
    ]


def _inside(folder: Path) -> dict[str, Path]:
    """Entries of a folder by their names in lower case; none if there is no such folder."""
    if not folder.is_dir():
        return {}
    return {path.name.lower(): path for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
