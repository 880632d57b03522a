"""Tables of settings in the documentation, from the fields and docstrings of the dataclasses in the code.

A line ``<!-- fields: muvit.training.recipes.RunConfig -->`` of a page becomes the table of that class.
"""

import html
import re
from functools import cache
from typing import Any

import griffe
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

_PLACE = re.compile(r"^<!-- fields: ([\w.]+) -->$", re.M)


@cache
def _package() -> griffe.Module:
    loaded = griffe.load("muvit", search_paths=["src"])
    assert isinstance(loaded, griffe.Module)
    return loaded


class FieldTables(Preprocessor):
    """Replaces the marked lines by tables."""

    def run(self, lines: list[str]) -> list[str]:
        """Put the tables into the Markdown of a page."""
        return _PLACE.sub(lambda match: table(match[1]), "\n".join(lines)).split("\n")


class _FieldTables(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(FieldTables(md), "fields", 100)


def makeExtension(**settings: Any) -> Extension:
    """Make the extension ``docs.fields`` of Python-Markdown, by this name of its protocol."""
    return _FieldTables(**settings)


def table(path: str) -> str:
    """Markdown table of the fields of a dataclass, inherited ones first: name, type with default, meaning."""
    rows = ["| field | type and default | meaning |", "|---|---|---|"]
    for name, member in _fields(path).items():
        rows.append(f"| {_code(name)} | {_code(str(member.annotation) + _default(member))} | {_meaning(member)} |")
    return "\n".join(rows)


def _fields(path: str) -> dict[str, griffe.Attribute]:
    config = _package()[path.removeprefix("muvit.")]
    lineage = [*reversed(config.mro()), config]
    return {
        name: member
        for owner in lineage
        for name, member in owner.members.items()
        if isinstance(member, griffe.Attribute) and _is_field(member)
    }


def _is_field(member: griffe.Attribute) -> bool:
    annotation = str(member.annotation or "ClassVar")
    return "property" not in member.labels and not annotation.startswith("ClassVar")


def _default(member: griffe.Attribute) -> str:
    if member.value is None:
        return ""
    made = re.fullmatch(r"field\(default(?:_factory)?=(?:lambda: )?(.+)\)", str(member.value))
    value = made[1] if made else str(member.value)
    return "" if value == str(member.annotation) else f" = {value}"


def _meaning(member: griffe.Attribute) -> str:
    text = " ".join(member.docstring.value.split()) if member.docstring else ""
    required = "" if member.value is not None else " *Required.*"
    return html.escape(text, quote=False).replace("*", r"\*").replace("``", "`") + required


def _code(text: str) -> str:
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"
