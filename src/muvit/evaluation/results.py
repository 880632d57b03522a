"""Results of an evaluation as files: JSON for programs, CSV for tables, a picture and a page for people."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import isnan
from pathlib import Path
from typing import Any

from PIL import Image

from muvit.durable import write_whole
from muvit.errors import ExistsError, InputError
from muvit.evaluation.report.scores import results_page

SUFFIXES = (".json", ".csv", ".png", ".html")

_FORMAT = re.compile(r"\.[A-Za-z]{3,4}")
"""Suffixes of files; the name of a folder may end in .v2 or so."""

Row = Mapping[str, str | float | int | None]
"""A line of a CSV file by the names of its columns."""


def result_files(output: Path, name: str, *, overwrite: bool) -> list[Path]:
    """The files that results are written to, checked before the work starts.

    Args:
        output: a file ending in .json, .csv, .png or .html, or a folder that receives ``<name>`` with each of them.
        name: of the files in a folder.
        overwrite: replace them.

    Raises:
        ExistsError: one of them exists and ``overwrite`` is false.
        InputError: ``output`` is, or is named like, a file of another format.
    """
    output = Path(output)
    expected = f"a folder, or a file ending in {', '.join(SUFFIXES)}"
    if output.suffix.lower() in SUFFIXES and not output.is_dir():
        files = [output]
    else:
        if output.exists() and not output.is_dir():
            raise InputError(output, expected=expected, got="another file")
        if not output.exists() and _FORMAT.fullmatch(output.suffix):
            raise InputError(output, expected=expected, got=f"a name that ends in {output.suffix}")
        files = [output / f"{name}{suffix}" for suffix in SUFFIXES]
    for file in files:
        if file.exists() and not overwrite:
            raise ExistsError(file)
    return files


def write_results(
    files: Sequence[Path],
    data: Callable[[], Mapping[str, Any]],
    rows: Callable[[], Sequence[Row]],
    picture: Callable[[], Image.Image],
    page: Callable[[], str] | None = None,
) -> None:
    """Write results in the formats that the suffixes of ``files`` say; no other format is computed.

    All are made before the first is written: where one fails, or a person stops it, the command can be repeated.

    Args:
        files: from `result_files`.
        data: gives plain data.
        rows: gives the lines of the table, all with the columns of the first.
        picture: draws.
        page: gives the HTML of a page; unset, one of the rows and the picture.
    """
    picture, rows = cache(picture), cache(rows)

    def content(file: Path) -> bytes:
        match file.suffix.lower():
            case ".json":
                return (json.dumps(plain_numbers(data()), indent=2) + "\n").encode()
            case ".csv":
                return _to_csv(rows())
            case ".html":
                return (results_page(file.stem.capitalize(), rows(), picture()) if page is None else page()).encode()
            case _:
                png = io.BytesIO()
                picture().save(png, format="png")
                return png.getvalue()

    for file, made in [(file, content(file)) for file in files]:
        write_whole(file, made)


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write a CSV file; numbers that do not exist (NaN, None) are empty."""
    write_whole(file, _to_csv(rows))


def _to_csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows([{k: "" if _is_missing(v) else v for k, v in row.items()} for row in rows])
    return text.getvalue().encode()


def plain_numbers(value: Any) -> Any:
    """Nested data with None for NaN, which JSON cannot tell."""
    if isinstance(value, Mapping):
        return {k: plain_numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_numbers(v) for v in value]
    return None if _is_missing(value) else value


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and isnan(value))
