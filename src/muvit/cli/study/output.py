"""Options that the studies share: the output, and names of models and runs."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from muvit.errors import InputError


def add_output(parser: ArgumentParser, name: str) -> None:
    """Add the options of the output."""
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help=f"folder for {name}.json, {name}.csv and {name}.png, or a file with one of these suffixes",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def named_paths(texts: Sequence[str], subject: str) -> dict[str, Path]:
    """Paths by name, from ``name=path`` or ``path``, whose last part is then the name.

    Raises:
        InputError: two have one name.
    """
    paths: dict[str, Path] = {}
    for text in texts:
        name, is_named, path = text.partition("=")
        path = path if is_named else text
        name = name if is_named else Path(path).resolve().name
        if name in paths:
            hint = f"Write {subject}s as name=path."
            raise InputError(subject, expected="different names", got=f"{name!r} twice", hint=hint)
        paths[name] = Path(path)
    return paths
