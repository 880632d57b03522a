"""Tables of slides in CSV: properties of slides beside their pixels, such as group or class."""

import csv
from collections.abc import Iterable
from pathlib import Path

from muvit.errors import InputError, ReadError


def read_column(file: Path | str, column: str) -> dict[str, str]:
    """One column of a CSV file by the names in its column ``name``, such as ``group`` of the ``slides.csv`` that
    `muvit prepare` writes. Rows without a value are skipped.

    Raises:
        ReadError: the file is missing or no text.
        InputError: a column is missing, a value is there without a name, or a name has two values.
    """
    file = Path(file)
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            table = csv.DictReader(lines)
            found, rows = list(table.fieldnames or ()), list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReadError(file, expected="a CSV file", got=str(error).splitlines()[0]) from error
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
