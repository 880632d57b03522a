"""Parts of pages: tables, curves and pictures inside the page, so that it needs no other file and no network."""

import base64
import io
import math
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muvit.evaluation.report.content import join_lines
from muvit.pictures import Color
from muvit.version import __version__

_STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
MARK = '<meta name="generator" content="muvit">'
"""Line by which a page of muvit is known."""

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""x and y of curves by name."""

MAX_ROWS = 500
"""Most rows of a table; the files beside the page hold all."""
_MAX_POINTS = 400
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 320, 58, 40, 12, 12
_TICKS = 5
_PACKAGES = ("torch", "lightning", "numpy")


REFRESH_S = 20
"""Seconds after which the page of a run that goes on is loaded again."""


def render_page(
    title: str, intro: str, findings: Sequence[str], sections: Sequence[str], *, is_live: bool = False
) -> str:
    """HTML of a page.

    Args:
        title: headline.
        intro: one paragraph.
        findings: sentences on what came out, the most important first; at least one.
        sections: HTML of the sections; empty ones are left out.
        is_live: whether browsers shall load the page again and again, since it will be written anew.
    """
    again = f'\n<meta http-equiv="refresh" content="{REFRESH_S}">' if is_live else ""
    lead, *rest = map(escape, findings)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{MARK}{again}
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="intro">{escape(intro)}</p>
<p class="finding"><strong>{lead}</strong> {" ".join(rest)}</p>
</header>
<main>
{join_lines(filter(None, sections))}
</main>
<footer><p>Written by muvit: every token knows where in the world it is.</p></footer>
</body>
</html>
"""


def section(key: str, title: str, body: str) -> str:
    """A section with a heading; empty without a body."""
    if not body:
        return ""
    return f'<section aria-labelledby="{key}">\n<h2 id="{key}">{escape(title)}</h2>\n{body}\n</section>'


def facts_list(facts: Mapping[str, object]) -> str:
    """Values by name."""
    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items())
    return f"<dl>\n{join_lines(items)}\n</dl>" if facts else ""


def rows_table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    """A table of rows with the columns of the first; numbers with four digits, those that do not exist empty."""
    if not rows:
        return ""
    shown = [_row(list(row.values())) for row in rows[:MAX_ROWS]]
    head = "".join(f'<th scope="col"{_numeric(rows[0][name])}>{escape(str(name))}</th>' for name in rows[0])
    left = len(rows) - len(shown)
    caption = f"{caption} {left} more rows are left out.".strip() if left else caption
    titled = f"<caption>{escape(caption)}</caption>\n" if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table>\n{titled}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{join_lines(shown)}\n</tbody>\n</table></div>"
    )


def _row(values: Sequence[Any]) -> str:
    cells = "".join(f"<td{_numeric(value)}>{escape(_text(value))}</td>" for value in values)
    return f"<tr>{cells}</tr>"


def _numeric(value: object) -> str:
    is_number = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return ' class="number"' if is_number else ""


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def confusion_table(confusion: NDArray[np.int64], names: Sequence[str]) -> str:
    """Shares of the pixels of each true class (row) by predicted class (column), darker for more."""
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
    head = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in names)
    rows = []
    for name, total, row in zip(names, totals[:, 0].tolist(), shares.tolist(), strict=True):
        cells = "".join(
            f'<td class="number" style="background:rgb(0 114 178 / {0.6 * share:.2f})">{share:.1%}</td>'
            for share in row
        )
        rows.append(f'<tr><th scope="row">{escape(name)}<span class="note">{total:,} pixels</span></th>{cells}</tr>')
    return (
        '<div class="scroll" tabindex="0"><table>\n<caption>Pixels of each true class (row) by predicted class '
        f'(column).</caption>\n<thead><tr><th scope="col">true</th>{head}</tr></thead>\n'
        f"<tbody>\n{join_lines(rows)}\n</tbody>\n</table></div>"
    )


def class_legend_list(names: Sequence[str], colors: Sequence[Color]) -> str:
    """Names of classes beside their colours."""
    items = (
        f'<li><span class="swatch" style="background:rgb{tuple(color)}"></span>{escape(name)}</li>'
        for name, color in zip(names, colors, strict=True)
    )
    return f'<ul class="legend">\n{join_lines(items)}\n</ul>'


def inline_picture(picture: Image.Image | bytes, alt: str) -> str:
    """An image of the page that holds its own PNG."""
    if isinstance(picture, bytes):
        content = picture
    else:
        stream = io.BytesIO()
        picture.save(stream, format="png", optimize=True)
        content = stream.getvalue()
    return f'<img src="data:image/png;base64,{base64.b64encode(content).decode()}" alt="{escape(alt, quote=True)}">'


def inline_files(page: str, pictures: Path) -> str:
    """A page with the files of a folder in place of links to ``pictures/<file>``, PNG all of them."""

    def content(link: re.Match[str]) -> str:
        encoded = base64.b64encode((pictures / link[2]).read_bytes()).decode()
        return f'{link[1]}="data:image/png;base64,{encoded}"'

    return re.sub(r'\b(src|srcset)="pictures/([\w.-]+)"', content, page)


def fold(title: str, body: str) -> str:
    """HTML that is shown on request."""
    return f"<details><summary>{escape(title)}</summary>\n{body}</details>"


def details(title: str, text: str) -> str:
    """Text that is shown on request."""
    return fold(title, f'<pre tabindex="0"><code>{escape(text)}</code></pre>')


def environment() -> dict[str, str]:
    """Versions of the software that this process runs on, the time, and the command if it is one of muvit."""
    found = {"written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")}
    if Path(sys.argv[0]).name in ("muvit", "__main__.py"):
        found["command"] = shlex.join(["muvit", *sys.argv[1:]])
    found |= {"muvit": __version__, "Python": platform.python_version(), "system": platform.system()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def line_chart(series: Series, *, xlabel: str, title: str) -> str:
    """Curves as SVG with a legend; values that are not finite leave gaps. Empty if there is no value.

    Of curves with more than 400 points, means of equally many neighbours are drawn.
    """
    drawn = {name: _thinned(np.asarray(x, float), np.asarray(y, float)) for name, (x, y) in series.items()}
    values = [y[np.isfinite(y)] for _, y in drawn.values()]
    if not any(len(y) for y in values):
        return ""
    everything, steps = np.concatenate(values), np.concatenate([x for x, _ in drawn.values()])
    x_ticks, y_ticks = _ticks(steps.min(), steps.max()), _ticks(everything.min(), everything.max())
    low, high = min(y_ticks[0], everything.min()), max(y_ticks[-1], everything.max())
    first, last = steps.min(), max(steps.max(), steps.min() + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - first) / (last - first), (y - low) / ((high - low) or 1)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    lines = []
    for tick in y_ticks:
        _, y = place(first, tick)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, low)
        lines.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{tick:g}</text>')
    lines.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(xlabel)}</text>')
    for number, curve in enumerate(drawn.values()):
        lines += [f'<path class="curve curve-{number % 6}" d="{path}"/>' for path in _paths(*curve, place)]
    legend = join_lines(
        f'<li><span class="swatch curve-{number % 6}"></span>{escape(name)}</li>' for number, name in enumerate(drawn)
    )
    listed = f'\n<ul class="legend">\n{legend}\n</ul>' if len(drawn) > 1 else ""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption>\n<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title, quote=True)}">\n{join_lines(lines)}\n</svg>{listed}</figure>'
    )


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of equally many neighbours, if there are too many points."""
    if len(x) <= _MAX_POINTS:
        return x, y
    starts = np.linspace(0, len(x), _MAX_POINTS, endpoint=False).astype(int)
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _paths(x: NDArray[np.float64], y: NDArray[np.float64], place: Any) -> list[str]:
    """Runs of finite values as paths; one that stands alone is a short dash."""
    known = np.isfinite(y)
    runs = np.split(np.arange(len(x)), np.flatnonzero(known[1:] != known[:-1]) + 1) if len(x) else []
    paths = []
    for run in (run for run in runs if len(run) and known[run[0]]):
        points = [place(x[i], y[i]) for i in run]
        points = points if len(points) > 1 else [points[0], (points[0][0] + 2, points[0][1])]
        paths.append("M" + " L".join(f"{a:.1f} {b:.1f}" for a, b in points))
    return paths


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from ``low`` to ``high``."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / _TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= _TICKS)
    return [round(n * step, 12) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)] or [
        low
    ]
