"""A task that only a free view solves: the classes of all cells are encoded elsewhere in the image.

A strip along the upper edge of each image, the legend, consists of alternately dark and bright stripes of random
widths. A wide empty band follows, and below it cells that all look alike. A cell belongs to class 1 where the legend
above it is dark, and to class 2 where it is bright.

So neither a crop among the cells nor any nested view around it (up to twice as high as the empty band) tells a class:
it takes a free view of the legend, and since that is placed at random along the strip, it takes its true box to read
the right stripe. Half of every stretch of the legend is dark, so a view without its place is no better than chance.

All randomness of an image comes from ``(config.seed, index)``.
"""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from muvit.data.synthetic.folders import Store, describe, split_indices, write_data_set
from muvit.errors import InputError
from muvit.progress import Progress

STORE = Store(
    levels=(1, 4),
    label_names={0: "background", 1: "cell under dark", 2: "cell under bright"},
    label_colors={0: (0, 0, 0, 0), 1: (230, 159, 0, 255), 2: (86, 180, 233, 255)},
)
"""Levels, class names and colours of the stored images."""


@dataclass(frozen=True, kw_only=True)
class LegendConfig:
    """Appearance of an image with a legend; all lengths (``*_px``) in pixels of the finest level."""

    seed: int = 0
    """Seed of the whole data set, 0 or more."""
    size_px: tuple[int, int] = (384, 640)
    """Height and width of an image."""
    legend_px: int = 64
    """Height of the legend at the upper edge."""
    empty_px: int = 128
    """Height of the empty band below the legend."""
    margin_px: int = 112
    """Width of the empty margins left and right of the cells, so that no view of the legend above them reaches the
    image's border, which would tell its place."""
    stripe_px: tuple[float, float] = (20.0, 28.0)
    """Range of the widths of the legend's stripes."""
    dark: float = 0.3
    """Intensity of the dark stripes."""
    bright: float = 0.9
    """Intensity of the bright stripes."""
    pitch_px: float = 12.0
    """Spacing of the square grid of cells."""
    jitter: float = 0.15
    """Largest shift of a cell from its grid point along each axis, as a fraction of the pitch."""
    radius_px: tuple[float, float] = (3.5, 5.0)
    """Range of the cells' radii."""
    peak: tuple[float, float] = (0.6, 1.0)
    """Range of the cells' intensities."""
    noise: float = 0.04
    """Standard deviation of the pixel noise."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not np.isfinite(value).all() or np.min(value) < 0:
                raise InputError(f"config.{field.name}", expected="numbers of at least 0", got=value)
        for name in ("stripe_px", "radius_px", "peak"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise InputError(f"config.{name}", expected="0 < lowest <= highest", got=(low, high))
        taken = (self.legend_px + self.empty_px, 2 * self.margin_px)
        if self.pitch_px <= 0 or any(a + self.pitch_px > n for a, n in zip(taken, self.size_px, strict=True)):
            raise InputError("config.size_px", expected=f"more than {taken}, room for cells", got=self.size_px)


def generate_legend(index: int, config: LegendConfig) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Draw image ``index`` of the data set.

    Returns:
        The image, float32 (H, W), from 0 to about 1, and its label, uint8 (H, W): 0 background, 1 cell under dark, 2
        cell under bright.

    Raises:
        InputError: ``index`` is negative.
    """
    if index < 0:
        raise InputError("index", expected="0 or more", got=index)
    rng = np.random.default_rng([config.seed, index])
    edges = _stripe_edges(config, rng)
    image, label = np.zeros(config.size_px, np.float32), np.zeros(config.size_px, np.uint8)
    parity = np.searchsorted(edges, np.arange(config.size_px[1]) + 0.5) % 2
    image[: config.legend_px] = np.where(parity, config.bright, config.dark)
    cells = _place_cells(config, rng)
    classes = 1 + np.searchsorted(edges, cells[:, 1]) % 2
    for (y, x), value in zip(cells, classes, strict=True):
        radius, peak = rng.uniform(*config.radius_px), rng.uniform(*config.peak)
        top, left = int(max(y - radius, 0)), int(max(x - radius, 0))
        window = np.s_[top : int(y + radius) + 1, left : int(x + radius) + 1]
        rows, columns = np.ogrid[window]
        is_cell = (rows[: label[window].shape[0]] + 0.5 - y) ** 2 + (
            columns[:, : label[window].shape[1]] + 0.5 - x
        ) ** 2
        is_cell = is_cell <= radius**2
        image[window][is_cell], label[window][is_cell] = peak, value
    image = gaussian_filter(image, 0.7)
    image += config.noise * rng.standard_normal(image.shape, dtype=np.float32)
    return np.maximum(image, 0, out=image), label


def _stripe_edges(config: LegendConfig, rng: np.random.Generator) -> NDArray[np.float64]:
    """Edges of the stripes, x ascending; an odd number of edges lies left of a bright stripe."""
    low, high = config.stripe_px
    widths = rng.uniform(low, high, 2 * int(config.size_px[1] / (low + high)) + 8)
    return np.cumsum(widths) - rng.uniform(0, 2 * high)  # equally likely to begin with a dark or a bright stripe


def _place_cells(config: LegendConfig, rng: np.random.Generator) -> NDArray[np.float64]:
    """Centres (N, 2) of the cells: a jittered grid below the empty band."""
    first = config.legend_px + config.empty_px
    rows = np.arange(first + config.pitch_px / 2, config.size_px[0] - config.pitch_px / 4, config.pitch_px)
    left, right = config.margin_px + config.pitch_px / 2, config.size_px[1] - config.margin_px - config.pitch_px / 4
    columns = np.arange(left, right, config.pitch_px)
    cells = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    return cells + config.pitch_px * rng.uniform(-config.jitter, config.jitter, cells.shape)


def write_legend(
    folder: Path | str,
    *,
    num_train: int,
    num_val: int,
    num_test: int,
    config: LegendConfig | None = None,
    workers: int | None = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Draw and store a data set, as `muvit.data.synthetic.folders.write_data_set` does; the folder is returned."""
    config, indices = config or LegendConfig(), split_indices(num_train, num_val, num_test)
    draw, record = partial(generate_legend, config=config), describe(indices, config, kind="free")
    return write_data_set(folder, draw, STORE, indices, record, workers=workers, overwrite=overwrite, progress=progress)
