"""Draw the figures of the pages on concepts, with the functions that they explain.

python docs/figures.py docs/images
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from muvit.data.crops.placement import FreeViews, Placement, place_views
from muvit.geometry import patch_centers, window_to_box
from muvit.models.layers.attention import AttentionMode, level_spans
from muvit.models.masking import draw_mask

COLORS = ("#e69f00", "#56b4e9", "#009e73")
"""Of the levels, finest first."""
INK, PALE, HIDDEN = "#333333", "#f4f4f4", "#bbbbbb"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "svg.hashsalt": "muvit",  # the same names inside the file in every run
    "svg.fonttype": "path",
}


def world_coordinates() -> Figure:
    """One axis of two views: pixels of the finest level, and the patch centres of levels 1 and 4."""
    figure, ax = _figure(9, 2.9)
    size, patch = 8, 4
    for row, (level, start) in enumerate(((1, 12), (4, 0))):
        color, y = COLORS[row], 1.6 - 1.1 * row
        box = window_to_box((start,), (size,), level)
        low, high = box[:, 0].tolist()
        for pixel in range(size):
            edge = low + pixel * level
            ax.add_patch(Rectangle((edge, y), level, 0.45, facecolor=color, alpha=0.3, edgecolor="white"))
        for center in patch_centers(box, (size // patch,))[:, 0].tolist():
            ax.plot(center, y + 0.22, "o", color=color, markeredgecolor=INK)
            ax.plot([center] * 2, [y, 0.2], ":", color=INK, linewidth=1)
            ax.text(center, y + 0.52, f"{center:g}", ha="center", color=INK)
        ax.text(-0.8, y + 0.22, f"level {level}: [{low:g}, {high:g})", ha="right", va="center", color=INK)
    for pixel in range(33):
        ax.plot([pixel] * 2, [0.2, 0.1 if pixel % 4 else 0.02], color=INK, linewidth=0.8)
        if pixel % 4 == 0:
            ax.text(pixel, -0.2, str(pixel), ha="center", va="center", color=INK)
    ax.plot([0, 32], [0.2, 0.2], color=INK, linewidth=1)
    ax.text(-0.8, 0.1, "world coordinate", ha="right", va="center", color=INK)
    ax.set(xlim=(-9, 33), ylim=(-0.4, 2.6))
    return figure


def nested_views() -> Figure:
    """The views that `place_views` puts around the same finest view, three draws where it draws."""
    figure = Figure(figsize=(11, 3.2))
    levels, size, side = (1, 2, 4), (64, 64), 512
    shapes = [(side // level,) * 2 for level in levels]
    placements: tuple[Placement, ...] = ("nested", "concentric", "grid", "free")
    for ax, placement in zip(figure.subplots(1, 4), placements, strict=True):
        _blank(ax)
        ax.add_patch(Rectangle((0, 0), side, side, facecolor=PALE, edgecolor=INK))
        for seed in range(3 if placement in ("nested", "free") else 1):
            views = place_views(
                placement,
                shapes,
                levels,
                size,
                start=(20, 40),
                rng=np.random.default_rng(seed),
                free_views=FreeViews() if placement == "free" else None,
            )
            for box, color in reversed(list(zip(views.boxes.tolist(), COLORS, strict=True))):
                (top, left), (bottom, right) = box
                line = 2.5 if seed == 0 else 1
                ax.add_patch(
                    Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=line)
                )
        ax.set(xlim=(-80, side + 10), ylim=(side + 10, -80), aspect="equal", title=placement)
    _legend(figure, [f"level {level}" for level in levels])
    return figure


def masking() -> Figure:
    """Masks of four samples: visible patches of three levels, which share a quarter of all tokens."""
    figure = Figure(figsize=(8, 6.2))
    grid, num_levels, batch = 16, 3, 4
    mask = draw_mask(batch, num_levels, grid * grid, generator=torch.Generator().manual_seed(5))
    hidden = mask.is_masked.view(batch, num_levels, grid, grid).numpy()
    axes = figure.subplots(num_levels, batch)
    for sample in range(batch):
        for level in range(num_levels):
            ax, own = axes[level, sample], hidden[sample, level]
            _blank(ax)
            pixels = np.where(own[..., None], matplotlib.colors.to_rgb(HIDDEN), matplotlib.colors.to_rgb(COLORS[level]))
            ax.imshow(pixels, interpolation="nearest", aspect="equal")
            for line in np.arange(0.5, grid - 1):
                ax.axhline(line, color="white", linewidth=0.4)
                ax.axvline(line, color="white", linewidth=0.4)
            heading = f"sample {sample + 1}\n" if level == 0 else ""
            ax.set_title(f"{heading}{int((~own).sum())} visible")
            if sample == 0:
                ax.text(-2, grid / 2, f"level {(1, 8, 32)[level]}", ha="right", va="center", color=INK)
    figure.subplots_adjust(hspace=0.25, wspace=0.05, top=0.9, bottom=0.02, left=0.1, right=0.99)
    return figure


def context_caching() -> Figure:
    """Attention patterns, and the tiles that share the keys and values of one coarse crop."""
    figure = Figure(figsize=(11, 3.8))
    left, middle, right = figure.subplots(1, 3)
    patterns: tuple[tuple[Axes, AttentionMode], ...] = ((left, "all"), (middle, "coarse_to_fine"))
    for ax, mode in patterns:
        _blank(ax)
        _draw_pattern(ax, mode)
        ax.set_title(f"attention_mode: {mode}")
    _blank(right)
    right.add_patch(Rectangle((0, 0), 8, 8, facecolor=COLORS[2], alpha=0.25, edgecolor=COLORS[2], linewidth=3))
    for y in range(2, 6):
        for x in range(2, 6):
            right.add_patch(Rectangle((x, y), 1, 1, facecolor="white", edgecolor=COLORS[0], linewidth=1.5))
    right.text(4, 1, "a coarse crop, encoded once:\nkeys and values of every layer", ha="center", va="center")
    right.text(4, 7, "the tiles inside reuse them", ha="center", va="center")
    right.set(xlim=(-0.2, 8.2), ylim=(8.2, -0.2), aspect="equal", title="in prediction")
    return figure


def _draw_pattern(ax: Axes, mode: AttentionMode) -> None:
    """Which keys (columns) the tokens of each level (rows) attend to, as the model works it out."""
    num_levels = 3
    spans = level_spans(mode, num_levels, 1) or [(slice(0, num_levels), slice(0, num_levels))]
    attended = np.zeros((num_levels, num_levels), bool)
    for rows, keys in spans:
        attended[rows, keys] = True
    for row in range(num_levels):
        for key in range(num_levels):
            color = COLORS[key] if attended[row, key] else PALE
            ax.add_patch(Rectangle((key, row), 1, 1, facecolor=color, edgecolor="white", linewidth=2))
        ax.text(-0.1, row + 0.5, str((1, 8, 32)[row]), ha="right", va="center", color=INK)
        ax.text(row + 0.5, 3.1, str((1, 8, 32)[row]), ha="center", va="top", color=INK)
    ax.text(1.5, 3.5, "keys and values of level", ha="center", va="top", color=INK)
    ax.text(-0.9, 1.5, "queries of level", ha="center", va="center", rotation=90, color=INK)
    ax.set(xlim=(-1.2, 3.1), ylim=(3.9, -0.1), aspect="equal")


def relay_tokens() -> Figure:
    """Two branches of one backbone; relay tokens pass through the context branch, then through the local one."""
    figure, ax = _figure(11, 3.6)
    rows = {"context view\nlevel 4": (2.4, COLORS[2]), "local view\nlevel 1": (0.4, COLORS[0])}
    for name, (y, color) in rows.items():
        ax.text(0.45, y + 0.5, name, ha="right", va="center", color=INK)
        for step, label in enumerate(("patch\nembedding", "block 1", "block 2", "...", "head")):
            x = 1.3 + 2 * step
            shape = FancyBboxPatch(
                (x, y), 1.2, 1, boxstyle="round,pad=0.05", facecolor=color, alpha=0.3, edgecolor=color
            )
            ax.add_patch(shape)
            ax.text(x + 0.6, y + 0.5, label, ha="center", va="center", color=INK)
            _arrow(ax, (x - 0.75, y + 0.5), (x - 0.07, y + 0.5), INK)
    for step in (1, 2):
        x = 1.9 + 2 * step
        _arrow(ax, (x, 2.33), (x, 1.47), COLORS[1])
        ax.text(x + 0.12, 1.9, "r'", va="center", color=INK)
        _arrow(ax, (x + 0.45, 1.47), (x + 1.55, 2.33), COLORS[1])
        ax.text(x + 1.15, 1.8, "r''", va="center", color=INK)
    ax.text(2.9, 3.9, "relay tokens r", ha="center", va="center", color=INK)
    _arrow(ax, (3.1, 3.75), (3.6, 3.47), COLORS[1])
    _arrow(ax, (10.57, 0.9), (11.2, 0.9), INK)
    ax.text(11.3, 0.9, "logits", ha="left", va="center", color=INK)
    ax.text(6.0, -0.1, "the blocks and the head of both rows are the same ones", ha="center", va="center", color=INK)
    ax.set(xlim=(-0.7, 12.0), ylim=(-0.3, 4.1))
    return figure


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=color, linewidth=1.8))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    ax = figure.subplots()
    _blank(ax)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.98, bottom=0.02)
    return figure, ax


def _blank(ax: Axes) -> None:
    ax.set_axis_off()


def _legend(figure: Figure, labels: list[str]) -> None:
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in COLORS[: len(labels)]]
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.12, wspace=0.05)


FIGURES: dict[str, Callable[[], Figure]] = {
    "world_coordinates": world_coordinates,
    "nested_views": nested_views,
    "masking": masking,
    "context_caching": context_caching,
    "relay_tokens": relay_tokens,
}


def draw(folder: Path) -> None:
    """Write all figures as SVG into a folder; the same bytes whenever matplotlib is the same."""
    with matplotlib.rc_context(STYLE):
        for name, make in FIGURES.items():
            make().savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the figures")
    draw(parser.parse_args().folder)
