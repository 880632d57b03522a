"""Gleason 2019: prostate tissue cores, graded by up to six pathologists (Gleason challenge, MICCAI 2019).

As downloaded: ``Train Imgs/slide<n>_core<m>.jpg`` and ``Maps<annotator>_T/slide<n>_core<m>_classimg_nonconvex.png``.
The tests' labels were never published, so the training cores are split as Relay Tokens splits them.
"""

import re
from pathlib import Path

from muvit.data.sources.label_map import LabelMap
from muvit.data.sources.source import Item, Source, Split, mapped

GRADES = LabelMap({"benign": (0, 1, 2, 6), "grade 3": (3,), "grade 4": (4,), "grade 5": (5,)})
"""Codes of the label files; 0 are pixels that an annotator left blank. With a map that lists 0 under ``ignore``, blank
pixels are no vote, and pixels that all annotators left blank are ignored."""

TEST_SLIDE = 7
LAST_VAL_CORE = 15
"""Cores of other slides up to this number validate."""

_CORE = re.compile(r"slide(\d+)_core(\d+)")


def find_gleason(folder: Path, *, label_map: LabelMap = GRADES) -> Source:
    """The cores below a folder, each with the maps of all its annotators.

    Annotators vote on classes, not on codes, so the different codes for benign tissue count together; of equally
    frequent classes the lower one wins (the release votes on codes, with the fifth annotator twice and the sixth left
    out). Tissue slides are the groups.

    Args:
        folder: where the challenge's folders lie.
        label_map: classes of the codes.
    """
    items: list[Item] = []
    problems: list[str] = []
    images = _files(folder, r"train[ _]?imgs?", r"\.jpe?g")
    maps = _files(folder, r"maps[1-6]_t", r"_classimg_nonconvex\.png")
    problems += [] if images else ["no images Train Imgs/slide<n>_core<m>.jpg"]
    problems += [] if maps else ["no maps Maps<annotator>_T/slide<n>_core<m>_classimg_nonconvex.png"]
    for name, files in images.items():
        if len(files) > 1:
            problems.append(f"several images of one core: {', '.join(map(str, files))}")
        elif maps and name not in maps:
            problems.append(f"{files[0]}: no map of it by any annotator")
        elif maps:
            items.append(
                Item(
                    name=name,
                    split=split_of(name),
                    images=(files[0],),
                    labels=tuple(maps[name]),
                    group=name.split("_")[0],
                )
            )
    lonely = sorted(maps.keys() - images.keys()) if images else []
    return Source(
        dataset="gleason",
        folder=folder,
        items=tuple(items),
        options={"label_map": label_map.to_json()},
        problems=tuple(problems),
        warnings=tuple(f"{name}: maps without an image" for name in lonely),
        has_background=False,
        **mapped(label_map),
    )


def split_of(name: str) -> Split:
    """Split of the core called ``slide<n>_core<m>``."""
    match = _CORE.fullmatch(name)
    assert match, name
    slide, core = int(match[1]), int(match[2])
    return "test" if slide == TEST_SLIDE else "val" if core <= LAST_VAL_CORE else "train"


def _files(folder: Path, folders: str, suffix: str) -> dict[str, list[Path]]:
    """Files of each core in the folders of this name, upper or lower case."""
    found: dict[str, list[Path]] = {}
    places = sorted(folder.iterdir()) if folder.is_dir() else []
    for place in places:
        if place.is_dir() and re.fullmatch(folders, place.name, re.IGNORECASE):
            for file in sorted(place.iterdir()):
                if match := re.fullmatch(rf"({_CORE.pattern}){suffix}", file.name, re.IGNORECASE):
                    found.setdefault(match[1].lower(), []).append(file)
    return dict(sorted(found.items()))
