"""Division of slides into those to train, validate and test on, and into the folds of a cross-validation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from muvit.checks import Bounds, Share, check_fields
from muvit.data.annotations.objects import AnnotationConfig
from muvit.data.crops.balance import locate_classes
from muvit.data.folders import check_names, list_slides, open_pairs
from muvit.data.slides.pixel_size import OWN_PIXELS, PixelChoice
from muvit.data.tables import SPLITS, SlideFiles, Split, read_slides
from muvit.errors import InputError
from muvit.levels import Level

SlideSets = Mapping[Split, Sequence[SlideFiles]]
"""The slides to train, validate and test on."""

Amounts = Callable[[Sequence[SlideFiles]], NDArray[np.float64]]
"""Amount of each class on each slide, ``(slides, classes)``."""


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Automatic division of the training slides, in which every part has about its share of each class."""

    val: Share = 0.2
    """Share of the slides to validate on; a cross-validation (run.folds) validates on its folds instead."""
    test: Share = 0.0
    """Share of the slides to leave out, for a test."""
    by: Literal["group", "slide"] = "group"
    """Unit that is not divided: the slides of one group in the table, such as a patient, or single slides."""
    seed: Annotated[int, Bounds(min=0)] = 0
    """Seed of the division."""

    def __post_init__(self) -> None:
        check_fields(self, "data.split.")
        if self.val + self.test >= 1:
            raise InputError("data.split", expected="val and test of less than 1 in all", got=self.val + self.test)


def choose_slides(
    train: Path,
    val: Path | None = None,
    split: SplitConfig | None = None,
    *,
    labelled: bool = True,
    amounts: Amounts | None = None,
) -> SlideSets:
    """The slides of a run.

    Args:
        train: folder, or table, of the slides to train on; of a table also those to validate and to test on, as far as
            it states splits.
        val: folder or table of the slides to validate on instead.
        split: divide the slides of ``train``.
        labelled: whether labels are wanted.
        amounts: classes by which slides are divided; by default only their number counts.

    Raises:
        ReadError, InputError: as `muvit.data.folders.list_slides`; or a group is in two splits, or an image without
            ``val``, some slides have a split and others have none, ``split`` divides slides that are divided already,
            or there are fewer groups than parts.
    """
    listed = list_slides(train, labelled=labelled)
    if split is not None:
        if val is not None or any(slide.split for slide in listed):
            got = f"data.val {val}" if val is not None else f"splits in {train}"
            raise InputError("data.split", expected="slides that are not divided yet", got=got)
        shares = (1 - split.val - split.test, split.val, split.test)
        parts = _divide(listed, shares, split.by, split.seed, amounts)
        sets = {name: [s for s, part in zip(listed, parts, strict=True) if part == i] for i, name in enumerate(SPLITS)}
    else:
        sets = _stated(train, listed)
        if val is not None:
            sets["val"] = list_slides(val, "val", labelled=labelled)
    # a folder to validate on may be that of the training on purpose
    _check_sets(sets, images=val is None, groups=split is None or split.by == "group")
    return sets


def read_sets(table: Path) -> SlideSets:
    """The slides of a table that states the split of each, without further checks.

    Raises:
        ReadError, InputError: as `muvit.data.tables.read_slides`.
    """
    return _stated(table, read_slides(table))


def choose_folds(
    train: Path, num_folds: int, split: SplitConfig | None = None, *, amounts: Amounts | None = None
) -> list[SlideSets]:
    """The slides of each run of a cross-validation: each slide validates once, and trains in the other runs.

    The column ``fold`` of a table is followed; without it the slides are divided, all but those to test on.

    Args:
        train: folder or table of the slides.
        num_folds: number of runs.
        split: slides to test on, and what is not divided.
        amounts: as of `choose_slides`.

    Raises:
        ReadError, InputError: as `choose_slides`, or the table states other folds.
    """
    config = SplitConfig() if split is None else split
    sets = choose_slides(train, split=None if split is None else replace(split, val=0.0), amounts=amounts)
    slides, test = [*sets["train"], *sets["val"]], sets["test"]
    check_names(slides)
    if any(slide.fold is not None for slide in slides):
        folds = [slide.fold for slide in slides]
        if set(folds) != set(range(num_folds)):
            got = ", ".join(sorted({"none" if fold is None else str(fold) for fold in folds}))
            raise InputError(train, expected=f"folds 0 to {num_folds - 1} as run.folds says", got=got)
    else:
        folds = list(_divide(slides, (1 / num_folds,) * num_folds, config.by, config.seed, amounts))
    numbered = [replace(slide, fold=fold) for slide, fold in zip(slides, folds, strict=True)]
    runs: list[SlideSets] = []
    for fold in range(num_folds):
        train_slides = [replace(slide, split="train") for slide in numbered if slide.fold != fold]
        val_slides = [replace(slide, split="val") for slide in numbered if slide.fold == fold]
        runs.append({"train": train_slides, "val": val_slides, "test": test})
        _check_sets(runs[-1], images=True, groups=config.by == "group")
    return runs


def class_areas(
    slides: Sequence[SlideFiles],
    level: Level,
    annotations: AnnotationConfig | None,
    ignore: Sequence[int],
    pixels: PixelChoice = OWN_PIXELS,
) -> NDArray[np.float64]:
    """Area of each class on each slide ``(slides, classes)``, from a coarse scan of the labels.

    Args:
        slides: the files.
        level: level at which labels are used.
        annotations: as of `muvit.data.folders.open_labels`.
        ignore: label values that are no classes.
        pixels: as of `muvit.data.folders.open_folder`.
    """
    pairs = open_pairs(slides, (), (level,), annotations, pixels)
    found = [locate_classes(i, label, level) for i, (_, label) in enumerate(pairs)]
    left_out = {*ignore, *(value for _, label in pairs for value in label.ignored_labels)}
    values = sorted({entry.value for entries in found for entry in entries} - left_out)
    areas = [{entry.value: entry.area for entry in entries} for entries in found]
    return np.array([[own.get(value, 0.0) for value in values] for own in areas])


def divide(
    amounts: NDArray[Any], groups: Sequence[str], shares: Sequence[float], seed: int = 0
) -> tuple[NDArray[np.int64], int]:
    """Number of the part of each slide, ``(slides)``, and the number of groups.

    Groups are handed out one after another, those with the largest share of any class first. Each goes to the part that
    lacks most of what it holds: that of the largest sum over classes of the group's share of the class, times the
    fraction of the part's due that is still open with this group in it. Slides themselves count as one more class.
    Every part gets a group.

    Args:
        amounts: of each class on each slide, ``(slides, classes)``.
        groups: group of each slide; the slides of one group stay together.
        shares: of each part, above 0, summing to 1.
        seed: of the order among equal groups.
    """
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    counted = np.column_stack([np.ones(len(groups)), np.asarray(amounts, np.float64)])
    content = np.zeros((len(names), counted.shape[1]))
    np.add.at(content, group, counted / np.maximum(counted.sum(0), np.finfo(float).tiny))
    due, filled = np.asarray(shares, np.float64)[:, None], np.zeros((len(shares), content.shape[1]))
    mixed = np.random.default_rng(seed).permutation(len(names))
    order = mixed[np.argsort(-content[mixed].max(1).round(9), kind="stable")]
    part_of = np.zeros(len(names), np.int64)
    for one in order:
        open_fraction = 1 - (filled + content[one]) / due
        part_of[one] = int((open_fraction @ content[one]).round(9).argmax())
        filled[part_of[one]] += content[one]
    for part in range(len(shares)):
        counts = np.bincount(part_of, minlength=len(shares))
        if counts[part] == 0 and counts.max() > 1:
            candidates = np.flatnonzero(part_of == counts.argmax())
            part_of[candidates[content[candidates].sum(1).argmin()]] = part
    return part_of[group], len(names)


def _divide(
    slides: Sequence[SlideFiles], shares: Sequence[float], by: str, seed: int, amounts: Amounts | None
) -> NDArray[np.int64]:
    """Number of the part of each slide; parts of no share stay empty."""
    groups = [(by == "group" and slide.group) or f"slide {slide.name}" for slide in slides]
    counted = np.zeros((len(slides), 0)) if amounts is None else amounts(slides)
    wanted = [i for i, share in enumerate(shares) if share > 0]
    parts, num_groups = divide(counted, groups, [shares[i] for i in wanted], seed)
    if num_groups < len(wanted):
        raise InputError("slides", expected=f"at least {len(wanted)} groups, one for each part", got=num_groups)
    return np.asarray(wanted)[parts]


def _stated(train: Path, listed: Sequence[SlideFiles]) -> dict[Split, list[SlideFiles]]:
    missing = [slide for slide in listed if slide.split is None]
    if missing and len(missing) < len(listed):
        raise InputError(train, expected="a split of every slide, or of none", got=f"none for {missing[0].name!r}")
    return {name: [slide for slide in listed if (slide.split or "train") == name] for name in SPLITS}


def _check_sets(sets: SlideSets, *, images: bool, groups: bool) -> None:
    """Refuse images, and groups, that are in two sets, and sets in which two slides have one name."""
    place: dict[Path | str, Split] = {}
    for split, slides in sets.items():
        check_names(slides)
        for slide in slides:
            keys: dict[Path | str, str] = {slide.image.resolve(): f"the image {slide.image}"} if images else {}
            if groups and slide.group:
                keys[slide.group] = f"the slides of {slide.group!r}"
            for key, subject in keys.items():
                if place.setdefault(key, split) != split:
                    raise InputError(subject, expected="one split", got=f"{place[key]} and {split}")
    if not sets["train"]:
        raise InputError("data.train", expected="slides to train on", got="none")
