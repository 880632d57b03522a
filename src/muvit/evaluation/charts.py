"""Charts of scores, as Pillow images: bars with intervals, lines with bands, matrices."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from muvit.errors import ShapeError
from muvit.pictures import OKABE_ITO

if TYPE_CHECKING:  # takes its time to load
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, those with contrast to white first."""

MANY_POINTS = 100
"""Curves of more points than this are drawn with their running mean."""

_INK, _GRID = "#202124", "#dfe2e7"
_MOST_CELL_NUMBERS = 14  # larger matrices have no room for numbers


class Line(NamedTuple):
    """A curve with what surrounds it, for `draw_lines`."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """Lower edge of the band, one per point; None: no band."""
    high: Sequence[float] | None = None


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1, *, dpi: int = 150, color: str = "white"
) -> tuple["Figure", NDArray[np.object_]]:
    """An empty figure and its axes.

    Args:
        width: in inches.
        height: in inches.
        columns: number of axes side by side.
        rows: number of axes below each other.
        dpi: pixels per inch.
        color: of the ground.

    Returns:
        The figure, and its axes ``(rows, columns)``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor=color, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def to_image(figure: "Figure") -> Image.Image:
    """The figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def draw_bars(
    axes: "Axes",
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    label: str,
) -> None:
    """Horizontal bars from the top down, one for each name and series, with their intervals.

    Args:
        axes: where to draw.
        names: of the bars.
        series: values by name of the series; a value that is NaN leaves a gap.
        intervals: lower and upper bounds of each series.
        label: of the value axis.
    """
    thickness, places = 0.8 / len(series), np.arange(len(names))
    for i, (title, values) in enumerate(series.items()):
        at, lengths = places + (i - (len(series) - 1) / 2) * thickness, np.asarray(values, dtype=float)
        axes.barh(at, np.nan_to_num(lengths), thickness, color=COLORS[i % len(COLORS)], label=title)
        if intervals is not None:
            low, high = np.array(intervals[title], dtype=float).T
            spread = np.nan_to_num(np.maximum([lengths - low, high - lengths], 0))
            axes.errorbar(np.nan_to_num(lengths), at, xerr=spread, fmt="none", ecolor=_INK, elinewidth=1, capsize=2)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    _style(axes, label, "", grid="x")
    if len(series) > 1:
        axes.legend(
            frameon=False, labelcolor=_INK, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(2, len(series))
        )


def draw_matrix(
    axes: "Axes",
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """A matrix ``(rows, columns)`` of shares from 0 to 1 as a heat map, with its numbers if there is room for them."""
    shares = np.asarray(values, dtype=float)
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    _style(axes, xlabel, ylabel, grid=None)
    axes.set_title(title, color=_INK, fontsize="medium")
    if max(shares.shape) <= _MOST_CELL_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if not np.isnan(share):
                color = "white" if share > 0.55 else _INK
                axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=color, fontsize="small")


def draw_lines(
    axes: "Axes",
    lines: Mapping[str, Line],
    *,
    xlabel: str,
    ylabel: str,
    xscale: Literal["linear", "log2", "zero_log2"] = "linear",
) -> None:
    """Curves with markers and bands; ``zero_log2`` has a place for 0 before a logarithmic axis that begins at 1."""
    for i, (name, line) in enumerate(lines.items()):
        color, dash = COLORS[i % len(COLORS)], ("-", "--", "-.", ":")[i % 4]
        axes.plot(line.x, line.y, dash, color=color, marker="o", markersize=4, linewidth=1.8, label=name)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.15, linewidth=0)
    if xscale != "linear":
        options = {} if xscale == "log2" else {"linthresh": 1}
        axes.set_xscale("log" if xscale == "log2" else "symlog", base=2, **options)
        ticks = sorted({x for line in lines.values() for x in line.x})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    _style(axes, xlabel, ylabel, grid="both")
    axes.legend(frameon=False, labelcolor=_INK)


def plot_curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    size: tuple[int, int] = (1280, 720),
    is_dark: bool = False,
) -> Image.Image:
    """Plot curves with a legend; each has its own colour and dash. Values that are not finite leave gaps.

    A curve of more than `MANY_POINTS` is drawn faint, and its running mean over a fiftieth of the points on top.

    Args:
        series: x and y of each curve, by name.
        xlabel: title of the x axis, with its unit.
        ylabel: title of the y axis, with its unit.
        size: width and height of the picture in pixels; letters are made for showing it at half that size.
        is_dark: light lines on a dark ground, instead of the reverse.

    Raises:
        ShapeError: a curve has not as many y as x.
    """
    paper, ink, grid = ("#15181d", "#e7e9ee", "#333944") if is_dark else ("#ffffff", "#202124", "#dfe2e7")
    order = (1, 0, 2, 4, 3, 5, 6) if is_dark else (6, 5, 2, 4, 0, 1)  # those with contrast to the ground
    figure, ((axes,),) = new_figure(size[0] / 200, size[1] / 200, dpi=200, color=paper)
    axes.set_facecolor(paper)
    for index, (name, (x, y)) in enumerate(series.items()):
        if len(x) != len(y):
            raise ShapeError(f"curve {name!r}", expected=f"{len(x)} values of y, as of x", got=len(y))
        color = tuple(part / 255 for part in OKABE_ITO[order[index % len(order)]])
        style: dict[str, Any] = {"color": color, "linewidth": 1.8, "linestyle": ("-", "--", "-.", ":")[index % 4]}
        values = np.asarray(y, dtype=np.float64)
        if len(y) > MANY_POINTS:
            axes.plot(x, values, color=color, linewidth=0.7, alpha=0.22)
            values = _running_mean(values, len(y) // 50)
        axes.plot(x, values, label=name.lstrip("_"), marker="o" if len(y) <= 30 else "", markersize=3.5, **style)
    _style(axes, xlabel, ylabel, grid="both", ink=ink, grid_color=grid)
    if series:
        axes.legend(frameon=False, labelcolor=ink, handlelength=2.6)
    return to_image(figure)


def _style(
    axes: "Axes",
    xlabel: str,
    ylabel: str,
    grid: Literal["x", "y", "both"] | None,
    *,
    ink: str = _INK,
    grid_color: str = _GRID,
) -> None:
    axes.set_xlabel(xlabel, color=ink)
    axes.set_ylabel(ylabel, color=ink)
    if grid is not None:
        axes.grid(axis=grid, color=grid_color, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, length=0)
    axes.spines[:].set_visible(False)


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of the finite values among ``window`` neighbours of each, fewer at the ends."""
    finite = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(finite, values, 0), kernel, mode="same")
    count = np.convolve(finite, kernel, mode="same")
    return np.divide(total, count, out=np.full_like(values, np.nan), where=count > 0.5)
