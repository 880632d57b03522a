"""Tables in CSV or Parquet: files of slides, and properties of slides beside their pixels, such as group or class."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

from muvit.data.slides.formats import slide_name
from muvit.durable import write_whole
from muvit.errors import InputError, ReadError, first_line, require_package

PARQUET = ".parquet"
TABLE_SUFFIXES = (".csv", PARQUET)
_MAX_BYTES = 1 << 31
_PANDAS_INDEX = "__index_level_"

Row = dict[str, str | None]
"""Value of each column; under None, values of a line of CSV that has more than there are columns."""

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
    return Path(path).suffix.lower() in TABLE_SUFFIXES


def read_slides(file: Path) -> list[SlideFiles]:
    """The slides of a table with a column ``image``, and any of ``labels``, ``split``, ``group``, ``weight``, ``fold``.

    Paths are relative to the folder of the table, which is CSV, or Parquet (needs ``muvit[parquet]``).

    Raises:
        ReadError: the file is missing or no table, or a file that it names is missing.
        InputError: a column is unknown, or a value is not allowed; or the table is Parquet and pyarrow is missing.
    """
    found, rows = _read_rows(file)
    unknown = [name for name in found if name not in COLUMNS]
    if "image" not in found or unknown:
        expected = f"a column image, and any of {', '.join(COLUMNS[1:])}"
        raise InputError(file, expected=expected, got=f"columns {', '.join(found) or 'none'}")
    if not rows:
        raise InputError(file, expected="at least one slide", got="no line")
    return [_read_line(place, file.parent, row) for place, row in rows.items()]


def _read_line(line: str, folder: Path, row: Row) -> SlideFiles:
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
    """One column of a table by the names in its column ``name``, such as ``group`` of the ``slides.csv`` that
    `muvit prepare` writes. Rows without a value are skipped.

    Raises:
        ReadError: the file is missing or no table.
        InputError: a column is missing, a value is there without a name, or a name has two values.
    """
    file = Path(file)
    found, rows = _read_rows(file)
    for wanted in ("name", column):
        if wanted not in found:
            raise InputError(file, expected=f"a column {wanted!r}", got=f"columns {', '.join(found) or 'none'}")
    values: dict[str, str] = {}
    for place, row in rows.items():
        name, value = ((row[key] or "").strip() for key in ("name", column))
        if not value:
            continue
        if not name:
            raise InputError(place, expected="a name", got="none")
        if values.setdefault(name, value) != value:
            raise InputError(place, expected=f"{values[name]!r} for {name!r} again", got=repr(value))
    return values


def _read_rows(file: Path) -> tuple[list[str], dict[str, Row]]:
    """Names of the columns, and the rows by their place in the file, as errors name it."""
    if file.suffix.lower() == PARQUET:
        table = read_parquet(file)
        found = [{name: _text(value) for name, value in row.items()} for row in table.to_pylist()]
        return list(table.column_names), {f"{file}, row {number}": row for number, row in enumerate(found, start=1)}
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            names: list[str] = list(reader.fieldnames or ())
            return names, {f"{file}, line {number}": row for number, row in enumerate(reader, start=2)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReadError(file, expected="a CSV file", got=str(error).splitlines()[0]) from error


def _text(value: Any) -> str | None:
    """A value as CSV would state it; whole numbers in a column of fractions, as one with gaps is, without a point."""
    if value is None or value != value:
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def read_parquet(file: Path, columns: Sequence[str] | None = None) -> Any:
    """A Parquet file as a table of pyarrow.

    Args:
        file: the file.
        columns: the columns that are read, as far as they are there; unset, all.

    Raises:
        ReadError: the file is missing or no Parquet, or holds more than 2 GiB.
        InputError: the package pyarrow is missing.
    """
    require_package("pyarrow", str(file), package="pyarrow", install="'muvit[parquet]'")
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as stream:
            size = sum(stream.metadata.row_group(i).total_byte_size for i in range(stream.num_row_groups))
            if size > _MAX_BYTES:
                got = f"{size / 2**30:.1f} GiB"
                raise ReadError(file, expected=f"a table of at most {_MAX_BYTES >> 30} GiB", got=got)
            names = [name for name in stream.schema_arrow.names if not name.startswith(_PANDAS_INDEX)]
            wanted = [name for name in names if columns is None or name in columns]
            return stream.read(wanted)
    except InputError:
        raise
    except (OSError, pyarrow.ArrowException) as error:
        raise ReadError(file, expected="a Parquet file", got=first_line(error)) from error


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
