"""Tables of slides in CSV: their files, and properties of slides beside their pixels, such as group or class."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Literal, get_args

from muvit.data.slides.formats import slide_name
from muvit.durable import write_whole
from muvit.errors import InputError, ReadError

Split = Literal["train", "val", "test"]
"""Purpose of a slide."""
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, kw_only=True)
class SlideFiles:
    """The files of one slide, and what a table states of it: one line of the table, a field for each column."""

    image: Path
    """The image."""
    labels: Path | None = None
    """Its label image, or annotations."""
    split: Split | None = None
    """Its purpose."""
    group: str | None = None
    """Slides of one group, such as those of a patient, must not be divided."""
    weight: float = 1.0
    """Factor of the probability of drawing a training crop from this slide."""
    fold: int | None = None
    """Number of the part of a cross-validation, from 0."""

    @property
    def name(self) -> str:
        """Name of the image without its suffixes."""
        return slide_name(self.image)


COLUMNS = tuple(field.name for field in fields(SlideFiles))


def is_table(path: Path | str) -> bool:
    """Whether a path names a table of slides, by its suffix."""
    return Path(path).suffix.lower() == ".csv"


def read_slides(file: Path) -> list[SlideFiles]:
    """The slides of a table with a column ``image``, and any of ``labels``, ``split``, ``group``, ``weight``, ``fold``.

    Paths are relative to the folder of the table.

    Raises:
        ReadError: the file is missing or no text, or a file that it names is missing.
        InputError: a column is unknown, or a value is not allowed.
    """
    found, rows = _read_csv(file)
    unknown = [name for name in found if name not in COLUMNS]
    if "image" not in found or unknown:
        expected = f"a column image, and any of {', '.join(COLUMNS[1:])}"
        raise InputError(file, expected=expected, got=f"columns {', '.join(found) or 'none'}")
    if not rows:
        raise InputError(file, expected="at least one slide", got="no line")
    return [_read_line(f"{file}, line {number}", file.parent, row) for number, row in enumerate(rows, start=2)]


def _read_line(line: str, folder: Path, row: dict[str, str | None]) -> SlideFiles:
    if None in row:
        raise InputError(line, expected="as many values as there are columns", got="more")
    values = {name: (value or "").strip() for name, value in row.items()}
    image, labels, split = (values.get(name, "") for name in ("image", "labels", "split"))
    if not image:
        raise InputError(line, expected="an image", got=f"none for the labels {labels}" if labels else "none")
    paths = [_place(folder, path) if path else None for path in (image, labels)]
    for path in filter(None, paths):
        if not path.exists():
            raise ReadError(line, expected=f"a file {path}", got="nothing there")
    if split and split not in SPLITS:
        raise InputError(line, expected=f"a split out of {', '.join(SPLITS)}", got=repr(split))
    weight, fold = values.get("weight") or "1", values.get("fold")
    try:
        factor = float(weight)
    except ValueError:
        factor = 0.0
    if not (isfinite(factor) and factor > 0):
        raise InputError(line, expected="a weight above 0", got=repr(weight), hint="Leave out unwanted slides.")
    if fold and not fold.isdecimal():
        raise InputError(line, expected="a fold, 0, 1 and so on", got=repr(fold))
    image_file, label_file = paths
    assert image_file is not None
    return SlideFiles(
        image=image_file,
        labels=label_file,
        split=next((known for known in SPLITS if known == split), None),
        group=values.get("group") or None,
        weight=factor,
        fold=int(fold) if fold else None,
    )


def _place(folder: Path, path: str) -> Path:
    """A path relative to a folder, without the folders that ``..`` leaves."""
    return Path(os.path.normpath(folder.resolve() / path)) if ".." in Path(path).parts else folder / path


def write_slides(file: Path, slides: Sequence[SlideFiles]) -> None:
    """Write a table that `read_slides` reads, with paths relative to its folder."""
    folder, text = file.parent.resolve(), io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    for slide in slides:
        row = {name: getattr(slide, name) for name in COLUMNS}
        # names of links stay, since slides are named by them
        paths = {k: os.path.relpath(v.parent.resolve() / v.name, folder) for k, v in row.items() if isinstance(v, Path)}
        writer.writerow(row | paths | {"weight": f"{slide.weight:g}"})
    write_whole(file, text.getvalue().encode())


def read_column(file: Path | str, column: str) -> dict[str, str]:
    """One column of a CSV file by the names in its column ``name``, such as ``group`` of the ``slides.csv`` that
    `muvit prepare` writes. Rows without a value are skipped.

    Raises:
        ReadError: the file is missing or no text.
        InputError: a column is missing, a value is there without a name, or a name has two values.
    """
    file = Path(file)
    found, rows = _read_csv(file)
    for wanted in ("name", column):
        if wanted not in found:
            raise InputError(file, expected=f"a column {wanted!r}", got=f"columns {', '.join(found) or 'none'}")
    values: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        name, value = ((row[key] or "").strip() for key in ("name", column))
        if not value:
            continue
        if not name:
            raise InputError(f"{file}, line {number}", expected="a name", got="none")
        if values.setdefault(name, value) != value:
            raise InputError(f"{file}, line {number}", expected=f"{values[name]!r} for {name!r} again", got=repr(value))
    return values


def _read_csv(file: Path) -> tuple[list[str], list[dict[str, str | None]]]:
    """Names of the columns, and the lines."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            table = csv.DictReader(lines)
            return list(table.fieldnames or ()), list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReadError(file, expected="a CSV file", got=str(error).splitlines()[0]) from error


def values_of(names: Iterable[str], values: dict[str, str], source: object) -> dict[str, str]:
    """The values of some slides.

    Raises:
        InputError: a slide has none; names it and ``source``, the table.
    """
    names = list(names)
    missing = [name for name in names if name not in values]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(source, expected="a value for every slide", got=f"none for {missing[0]!r}{more}")
    return {name: values[name] for name in names}
