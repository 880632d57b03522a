"""The Synthetic task: rings of cells whose class, outer or inner, shows in no small crop.

Two layouts. *Concentric* rings are the paper's task: coarse levels are area means, so that cells show in them, too, and
a model without positions can learn to find a fine view in a coarse one by its content. *Scattered* rings rule that out:
their coarse levels are drawn apart, as an overview that shows what rings enclose as a shade, but no cells. Nothing in
it, wiggles of the rings and noise included, is that of the finest level. And disjoint rings lie all over an image that
continues at its opposite edges, so that it shows each of them from all sides, and neither the direction of a band nor
its place in the image tells which side is inside. What is left are the true boxes.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from muvit.checks import check_fields
from muvit.data.synthetic.folders import Store, describe, split_indices, write_data_set
from muvit.data.synthetic.perlin import FloatArray, fractal_noise
from muvit.errors import InputError
from muvit.progress import Progress

Span = tuple[float, float]

_LEVELS = (1, 2, 4, 8)
STORE = Store(
    levels=_LEVELS,
    label_names={0: "background", 1: "outer cell", 2: "inner cell"},
    # orange and sky blue: distinguishable under every common colour blindness
    label_colors={0: (0, 0, 0, 0), 1: (230, 159, 0, 255), 2: (86, 180, 233, 255)},
)
"""Levels, class names and colours of the stored images."""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Appearance of a Synthetic image; all lengths (``*_px``) in pixels of the finest level."""

    seed: int = 0
    """Seed of the whole data set, 0 or more."""
    size_px: int = 2048
    """Height and width of an image."""
    layout: Literal["concentric", "scattered"] = "concentric"
    """Rings around one centre, or disjoint rings all over the image with coarse levels that are drawn apart."""
    center_range: Span = (0.30, 0.70)
    """Range of the common centre of concentric rings on each axis, as fractions of the image's size."""
    max_rings: int = 2
    """An image has 1 to this many concentric rings, with equal odds."""
    radius_px: Span = (430.0, 900.0)
    """Range of the rings' mid radii."""
    half_width_px: float = 88.0
    """Half the width of a ring's band: the width of its outer and of its inner half."""
    clearance_px: float = 170.0
    """Least distance between the bands of two rings."""
    warp_amplitude_px: float = 140.0
    """Amplitude of the warp that hides the curvature. At 70, a well trained probe classifies at
    256 px (accuracy 0.70, and 0.60 at 105): see ``benchmarks/synthetic_leak_probe.py``."""
    warp_lattices_px: tuple[float, ...] = (256.0, 128.0)
    """Lattice spacing of each octave of the warp."""
    pitch_px: float = 17.0
    """Spacing of the square grid of cells."""
    jitter: float = 0.28
    """Largest shift of a cell from its grid point along each axis, as a fraction of the pitch."""
    drop_rate: float = 0.10
    """Fraction of cells left out."""
    gap_px: float = 8.0
    """Half width of the line along the middle of a band that holds no cell centre."""
    semi_axis_px: Span = (6.0, 9.0)
    """Range of a cell's longer semi-axis."""
    axis_ratio: Span = (0.75, 1.0)
    """Range of a cell's shorter semi-axis, as a fraction of its longer one."""
    peak: Span = (0.55, 1.0)
    """Range of a cell's intensity at its centre."""
    falloff: float = 0.35
    """Loss of intensity from a cell's centre to its rim, as a fraction."""
    blur_px: float = 1.0
    """Standard deviation of the Gaussian blur of the cells."""
    background: float = 0.12
    """Mean intensity of the background, which varies between 0 and twice that."""
    background_lattices_px: tuple[float, ...] = (512.0, 256.0, 128.0, 64.0)
    """Lattice spacing of each octave of the background."""
    noise: float = 0.04
    """Standard deviation of the pixel noise."""
    shade: float = 0.35
    """Intensity of what rings enclose in the coarse levels of scattered rings."""

    def __post_init__(self) -> None:
        check_fields(self)
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "layout"}
        for name, value in values.items():
            least = 1 if name in ("size_px", "max_rings") else 0
            if np.size(value) == 0 or not np.isfinite(value).all() or np.min(value) < least:
                raise InputError(f"config.{name}", expected=f"numbers of at least {least}", got=value)
            if name in _POSITIVE and np.min(value) == 0:
                raise InputError(f"config.{name}", expected="a value above 0", got=value)
            if name in _SPANS and not (len(value) == 2 and value[0] <= value[1]):
                raise InputError(f"config.{name}", expected="(lowest, highest)", got=value)
            if name in _FRACTIONS and np.max(value) > 1:
                raise InputError(f"config.{name}", expected="fractions up to 1", got=value)
        needed = (self.max_rings - 1) * self.ring_distance_px
        if self.layout == "concentric" and self.max_rings > 1 and np.ptp(self.radius_px) <= needed:
            raise InputError("config.radius_px", expected=f"a range wider than {needed:g} px", got=self.radius_px)

    @property
    def kind(self) -> str:
        """The task's name on the command line."""
        return "rings" if self.layout == "concentric" else "scattered"

    @property
    def ring_distance_px(self) -> float:
        """Least distance between the mid radii of two rings."""
        return 2 * self.half_width_px + self.clearance_px

    @classmethod
    def scattered(cls) -> "SyntheticConfig":
        """The variant that no model solves without true boxes, for views of levels 1 and 8 (256 px of 2048 px)."""
        return cls(layout="scattered", radius_px=(430.0, 560.0), warp_amplitude_px=150.0)

    def at_size(self, size_px: int) -> "SyntheticConfig":
        """The same at another size of the image, all lengths in proportion: at 512 px a quarter, for crops of 64 px."""
        scale = size_px / self.size_px
        lengths: dict[str, Any] = {
            f.name: tuple(scale * n for n in value) if isinstance(value, tuple) else scale * value
            for f in fields(self)
            if f.name.endswith("_px") and (value := getattr(self, f.name)) is not None
        }
        return replace(self, **lengths | {"size_px": size_px})

    @classmethod
    def small(cls) -> "SyntheticConfig":
        """The paper's task at a quarter of its size."""
        return cls().at_size(512)


_POSITIVE = ("half_width_px", "pitch_px", "semi_axis_px", "axis_ratio", "warp_lattices_px", "background_lattices_px")
_SPANS = ("center_range", "radius_px", "semi_axis_px", "axis_ratio", "peak")
_TRIALS = 400
"""Tries to put one more scattered ring into an image; more would add hardly any."""
_FRACTIONS = ("center_range", "drop_rate", "axis_ratio", "falloff")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Geometry of one image, which `generate` draws. Points are world coordinates (y, x)."""

    centers: NDArray[np.float64]
    """Centre of each ring, (K, 2)."""
    radii: NDArray[np.float64]
    """Mid radius of each ring, (K,)."""
    offset: FloatArray
    """(H, W), px: warped distance from the centre of the nearest ring less its mid radius; positive is outside."""
    cells: NDArray[np.float64]
    """Centre of each cell, (N, 2)."""
    classes: NDArray[np.uint8]
    """Class of each cell, (N,): 1 outer, 2 inner."""


def build_scene(index: int, config: SyntheticConfig) -> Scene:
    """Geometry of image ``index``: rings, warp and cell centres."""
    return _build_scene(config, *_streams(index, config)[:2])


def generate(index: int, config: SyntheticConfig) -> tuple[FloatArray, NDArray[np.uint8]]:
    """Draw image ``index`` of the data set.

    Returns:
        The image, float32 (H, W), from 0 to a little above 1, and its label, uint8 (H, W): 0 background, 1 outer cell,
        2 inner cell.

    Raises:
        InputError: ``index`` is negative.
    """
    geometry, placing, drawing = _streams(index, config)
    scene = _build_scene(config, geometry, placing)
    cells, label = _stamp_cells(scene, config, drawing)
    image = gaussian_filter(cells, config.blur_px)
    image += config.background * (1 + fractal_noise(config.size_px, config.background_lattices_px, drawing))
    image += config.noise * drawing.standard_normal(image.shape, dtype=np.float32)
    return np.maximum(image, 0, out=image), label


def draw(index: int, config: SyntheticConfig) -> tuple[FloatArray | list[FloatArray], NDArray[np.uint8]]:
    """Image and label ``index`` as `generate` draws them; for scattered rings, a list of all levels of the image."""
    image, label = generate(index, config)
    if config.layout == "concentric":
        return image, label
    return [image, *(draw_overview(index, config, level) for level in _LEVELS[1:])], label


def draw_overview(index: int, config: SyntheticConfig, level: int) -> FloatArray:
    """A coarse level of image ``index`` with scattered rings: what unwarped rings enclose, in a background of its own.

    Returns:
        float32 (H / level, W / level), from 0 to a little above 1.
    """
    geometry, *_, drawing = _streams(index, config, 3 + level)
    size = config.size_px // level
    offset = _ring_offset(*_draw_rings(config, geometry), level * (np.arange(size) + 0.5), config)
    # edges one pixel wide, so that they lie at the mid radius whatever the level
    image = config.shade * np.clip(0.5 - offset / level, 0, 1)
    lattices = tuple(px / level for px in config.background_lattices_px if px >= 2 * level)
    image += config.background * (1 + fractal_noise(size, lattices, drawing))
    image += config.noise * drawing.standard_normal(image.shape, dtype=np.float32)
    return np.maximum(image, 0).astype(np.float32)


def _streams(index: int, config: SyntheticConfig, count: int = 3) -> list[np.random.Generator]:
    """Independent random streams of one image: rings and warp, the cells' places, the pixels, and others."""
    if index < 0:
        raise InputError("index", expected="0 or more", got=index)
    children = np.random.SeedSequence([config.seed, index]).spawn(count)
    return [np.random.Generator(np.random.PCG64(child)) for child in children]


def _build_scene(config: SyntheticConfig, geometry: np.random.Generator, placing: np.random.Generator) -> Scene:
    centers, radii = _draw_rings(config, geometry)
    offset = _ring_offset(centers, radii, np.arange(config.size_px) + 0.5, config)
    offset += np.float32(config.warp_amplitude_px) * fractal_noise(config.size_px, config.warp_lattices_px, geometry)
    cells, classes = _place_cells(offset, config, placing)
    return Scene(centers=centers, radii=radii, offset=offset, cells=cells, classes=classes)


def _draw_rings(config: SyntheticConfig, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centres (K, 2) and mid radii (K,) of the rings of an image."""
    if config.layout == "concentric":
        center = config.size_px * rng.uniform(*config.center_range, 2)
        radii = _draw_concentric_radii(config, rng)
        return np.broadcast_to(center, (len(radii), 2)), radii
    rings: list[tuple[NDArray[np.float64], float]] = []
    for _ in range(_TRIALS):
        radius, center = rng.uniform(*config.radius_px), rng.uniform(0, config.size_px, 2)
        distance = radius + config.ring_distance_px
        if all(np.linalg.norm(_around(center - other, config)) > distance + r for other, r in rings):
            rings.append((center, radius))
    return np.array([center for center, _ in rings]), np.array([radius for _, radius in rings])


def _draw_concentric_radii(config: SyntheticConfig, rng: np.random.Generator) -> NDArray[np.float64]:
    """Ascending mid radii of 1 to ``max_rings`` rings, uniform among those that keep their distance."""
    count = rng.integers(1, config.max_rings, endpoint=True)
    distances = config.ring_distance_px * np.arange(count)
    low, high = config.radius_px
    # sorted draws from the range less all distances, which are then put in between: no draw has to be rejected
    return np.sort(rng.uniform(low, high - distances[-1], count)) + distances


def _ring_offset(
    centers: NDArray[np.float64], radii: NDArray[np.float64], points: NDArray[np.floating], config: SyntheticConfig
) -> FloatArray:
    """Distance of the points (y, x) of a square grid from the nearest ring, (N, N); positive outside of it."""
    nearest: FloatArray | None = None
    for center, radius in zip(centers, radii, strict=True):
        square_y, square_x = ((_around(points - c, config) ** 2).astype(np.float32) for c in center)
        offset = np.sqrt(square_y[:, None] + square_x[None, :]) - np.float32(radius)
        nearest = offset if nearest is None else np.where(np.abs(offset) < np.abs(nearest), offset, nearest)
    assert nearest is not None
    return nearest


def _around(distance: NDArray[np.floating], config: SyntheticConfig) -> NDArray[np.floating]:
    """Distances along an axis; with scattered rings, the shorter ones through the opposite edge."""
    if config.layout == "concentric":
        return distance
    half = config.size_px / 2
    return (distance + half) % config.size_px - half


def _place_cells(
    offset: FloatArray, config: SyntheticConfig, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Centres (N, 2) and classes (N,) of the cells: a jittered grid with losses, cut to the two halves of the bands."""
    count = int(np.ceil(config.size_px / config.pitch_px))
    grid = (np.stack(np.meshgrid(np.arange(count), np.arange(count), indexing="ij"), -1) + 0.5).reshape(-1, 2)
    cells = config.pitch_px * (grid + rng.uniform(-config.jitter, config.jitter, grid.shape))
    is_kept = rng.random(len(cells)) >= config.drop_rate
    cells = cells[is_kept & (cells < config.size_px).all(-1) & (cells >= 0).all(-1)]
    at_cell = offset[tuple(cells.astype(np.int64).T)]
    in_band = (np.abs(at_cell) > config.gap_px) & (np.abs(at_cell) < config.half_width_px)
    return cells[in_band], np.where(at_cell[in_band] > 0, 1, 2).astype(np.uint8)


def _stamp_cells(
    scene: Scene, config: SyntheticConfig, rng: np.random.Generator
) -> tuple[FloatArray, NDArray[np.uint8]]:
    """Draw all cells into an empty image at once; where cells overlap the brighter one wins pixel and label.

    Returns:
        Intensity float32 (H, W) and label uint8 (H, W).
    """
    count = len(scene.cells)
    long_axis = rng.uniform(*config.semi_axis_px, count)
    short_axis = long_axis * rng.uniform(*config.axis_ratio, count)
    angle = rng.uniform(0, np.pi, count)
    peak = rng.uniform(*config.peak, count)

    reach = int(np.ceil(config.semi_axis_px[1]))
    # (N, 1, 1) against a window (window, 1) x (1, window) of pixels around each cell's pixel
    window = np.arange(-reach, reach + 1)
    row = scene.cells[:, 0].astype(np.int64)[:, None, None] + window[:, None]
    column = scene.cells[:, 1].astype(np.int64)[:, None, None] + window[None, :]
    dy = row + 0.5 - scene.cells[:, 0, None, None]
    dx = column + 0.5 - scene.cells[:, 1, None, None]
    sine, cosine = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    along = (cosine * dx + sine * dy) / long_axis[:, None, None]
    across = (cosine * dy - sine * dx) / short_axis[:, None, None]
    square = along**2 + across**2  # 0 at the centre, 1 on the rim

    is_drawn = (square <= 1) & (row >= 0) & (row < config.size_px) & (column >= 0) & (column < config.size_px)
    value = (peak[:, None, None] * (1 - config.falloff * square))[is_drawn].astype(np.float32)
    pixel = (row * config.size_px + column)[is_drawn]
    owner = np.broadcast_to(scene.classes[:, None, None], is_drawn.shape)[is_drawn]

    intensity = np.zeros(config.size_px**2, dtype=np.float32)
    label = np.zeros(config.size_px**2, dtype=np.uint8)
    np.maximum.at(intensity, pixel, value)
    wins = intensity[pixel] == value
    label[pixel[wins]] = owner[wins]
    return intensity.reshape(config.size_px, -1), label.reshape(config.size_px, -1)


def write_synthetic(
    folder: Path | str,
    *,
    num_train: int,
    num_val: int,
    num_test: int,
    config: SyntheticConfig,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Generate and store a data set, as `muvit.data.synthetic.folders.write_data_set` does; the folder is returned.

    Args:
        folder: where to write.
        num_train: number of images for training (1638 in the paper).
        num_val: number of images for validation (220).
        num_test: number of images for testing (190).
        config: appearance of the images.
        workers: number of processes, by default one per CPU core; spawned.
        overwrite: replace a data set that is in ``folder``; other files in it stay.
        progress: called with the number of images done and of all after each image.

    Raises:
        InputError: a count is negative, all are 0, or ``workers`` is not positive.
        ExistsError: ``folder`` exists and is not empty, and ``overwrite`` is false.
    """
    indices = split_indices(num_train, num_val, num_test)
    drawn, record = partial(draw, config=config), describe(indices, config, kind=config.kind)
    return write_data_set(
        folder, drawn, STORE, indices, record, workers=workers, overwrite=overwrite, progress=progress
    )
