"""URUR: aerial images of 5120 x 5120 px with eight kinds of land (Ji et al., CVPR 2023), in the published split.

As downloaded: ``{train,val,test}/image/<name>.tif`` (or ``.png``) and ``{train,val,test}/label/<name>.png``, whose
colours are the classes.
"""

from pathlib import Path

from muvit.data.slides.formats import RASTER_SUFFIXES, TIFF_SUFFIXES, slide_name
from muvit.data.sources.label_map import LabelMap
from muvit.data.sources.source import SPLITS, Item, Source, compare_counts, mapped

LAND = LabelMap(
    {
        "others": ((0, 0, 0),),
        "building": ((230, 230, 230),),
        "greenhouse": ((100, 100, 100),),
        "woodland": ((200, 230, 160),),
        "farmland": ((95, 163, 7),),
        "bareland": ((255, 255, 100),),
        "water": ((150, 200, 250),),
        "road": ((240, 100, 80),),
        "ignore": ((255, 255, 255),),
    }
)
"""Colours of the published labels, in the order of Relay Tokens."""

_COUNTS = {("train", ""): 2157, ("val", ""): 280, ("test", ""): 571}


def find_urur(folder: Path, *, label_map: LabelMap = LAND) -> Source:
    """The images below a folder.

    Args:
        folder: where train, val and test lie.
        label_map: classes of the labels' colours; for labels that are stored as numbers, classes of these.
    """
    items: list[Item] = []
    problems: list[str] = []
    for split in SPLITS:
        images, labels = _named(folder / split / "image"), _named(folder / split / "label")
        problems += [] if images else [f"no images {split}/image/<name>.tif"]
        problems += [f"{images[name]}: no {split}/label/{name}.png" for name in images.keys() - labels.keys()]
        problems += [f"{labels[name]}: no {split}/image/{name}.tif" for name in labels.keys() - images.keys()]
        items += [
            # names start anew in each split
            Item(name=f"{split}_{name}", split=split, images=(images[name],), labels=(labels[name],))
            for name in images
            if name in labels
        ]
    return Source(
        dataset="urur",
        folder=folder,
        items=tuple(items),
        options={"label_map": label_map.to_json()},
        problems=tuple(sorted(problems)),
        warnings=tuple(compare_counts(items, _COUNTS, what="images")),
        has_background=False,
        **mapped(label_map),
    )


def _named(folder: Path) -> dict[str, Path]:
    """Image files of a folder by name."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    known = (*TIFF_SUFFIXES, *RASTER_SUFFIXES)
    return {slide_name(f): f for f in files if f.suffix.lower() in known and not f.name.startswith(".")}
