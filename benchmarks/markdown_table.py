"""Tables and generated parts of the results, in Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path

HEAD = "run"
"""Name of the part that says how a file was made; it stands below the title."""


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def replace_parts(file: Path, parts: Mapping[str, str]) -> None:
    """Write the generated parts of a Markdown file, each between two comments with its name; all else stays.

    A part that the file does not have yet comes last, `HEAD` below the title.

    Raises:
        ValueError: a part begins and does not end.
    """
    text = file.read_text() if file.exists() else f"# {file.stem.replace('_', ' ').capitalize()}\n"
    for name, part in parts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        # blank lines, without which a parser takes what follows a comment for a part of it
        marked = f"{begin}\n\n{part.strip()}\n\n{end}"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if found and not closed:
            raise ValueError(f"{file}: {begin} without {end}")
        if found:
            text = f"{before}{marked}{after}"
        elif name == HEAD:
            title, _, below = text.partition("\n")
            text = f"{title}\n\n{marked}\n{below}"
        else:
            text = f"{text.rstrip()}\n\n{marked}\n"
    file.write_text(text)
