"""Cityscapes: street scenes of 2048 x 1024 px with 19 classes (Cordts et al., CVPR 2016).

As downloaded: ``leftImg8bit/<split>/<city>/<name>_leftImg8bit.png`` and
``gtFine/<split>/<city>/<name>_gtFine_labelIds.png``, or ``..._labelTrainIds.png`` as the authors' scripts make them.
"""

from collections.abc import Sequence
from pathlib import Path

from muvit.data.sources.label_map import IGNORE_NAME, LabelMap
from muvit.data.sources.source import Item, Source, Split, mapped

_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26,
    "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
_UNSCORED_IDS = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255)

LABEL_IDS = LabelMap({name: (value,) for name, value in _IDS.items()} | {IGNORE_NAME: _UNSCORED_IDS})
"""Values of ``_labelIds.png``; classes that the benchmark does not score are ignored in loss and metrics."""

TRAIN_IDS = LabelMap({name: (value,) for value, name in enumerate(_IDS)} | {IGNORE_NAME: (255,)})
"""Values of ``_labelTrainIds.png``."""

_IMAGE, _LABEL_IDS, _TRAIN_IDS = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"


def find_cityscapes(folder: Path, *, test_cities: Sequence[str] = ("frankfurt",)) -> Source:
    """The images below a folder, each city a group.

    The benchmark's own test labels are not public. The cities of the validation set that are named stand for it, by
    default the one that Relay Tokens tests on; the others validate (in its release all do, the tested ones included).

    Args:
        folder: where leftImg8bit and gtFine lie.
        test_cities: cities of the validation set to test on instead.
    """
    problems: list[str] = []
    items: list[Item] = []
    images: dict[str, list[Path]] = {
        split: sorted((folder / "leftImg8bit" / split).glob(f"*/*{_IMAGE}")) for split in ("train", "val")
    }
    problems += [f"no images leftImg8bit/{split}/<city>/<name>{_IMAGE}" for split, found in images.items() if not found]
    # one kind for all, so that one map holds: the published one if there is any
    published = any((folder / "gtFine").glob(f"*/*/*{_LABEL_IDS}"))
    suffix, label_map = (_LABEL_IDS, LABEL_IDS) if published else (_TRAIN_IDS, TRAIN_IDS)
    for published_split, files in images.items():
        for image in files:
            city, name = image.parent.name, image.name.removesuffix(_IMAGE)
            labels = folder / "gtFine" / published_split / city / f"{name}{suffix}"
            if not labels.is_file():
                problems.append(f"{image}: no {labels.relative_to(folder)}")
                continue
            split: Split = "train" if published_split == "train" else "test" if city in test_cities else "val"
            items.append(Item(name=name, split=split, images=(image,), labels=(labels,), group=city))
    cities = {image.parent.name for image in images["val"]}
    problems += [f"no images leftImg8bit/val/{city}" for city in test_cities if images["val"] and city not in cities]
    published_counts = {"train": len(images["train"]), "val": len(images["val"])}
    return Source(
        dataset="cityscapes",
        folder=folder,
        items=tuple(items),
        options={"labels": suffix, "test_cities": list(test_cities)},
        problems=tuple(problems),
        warnings=tuple(
            f"{split}: {published_counts[split]} images instead of the published {count}"
            for split, count in (("train", 2975), ("val", 500))
            if items and published_counts[split] != count
        ),
        has_background=False,
        **mapped(label_map),
    )
