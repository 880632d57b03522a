"""Volumes whose classes are encoded in another slice, which only a coarse view, taller than the fine one, shows.

The lowest slices of each volume, the floor, show territories, dark and bright. Some empty slices follow, and above them
cells that all look alike. A cell belongs to class 1 over a dark territory, and to class 2 over a bright one.

A fine crop of at most `VolumeConfig.hidden_px` slices never holds both a cell and the floor, so it predicts classes no
better than chance. A coarse view that spans the volume from floor to ceiling shows the class below the cell. The slices
are further apart than the pixels in them, as in most microscopy, hence levels with a factor for each axis.

All randomness of a volume comes from ``(config.seed, index)``.
"""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from muvit.data.synthetic.folders import Store, describe, split_indices, write_data_set
from muvit.data.synthetic.perlin import fractal_noise
from muvit.errors import InputError
from muvit.progress import Progress

STORE = Store(
    levels=(1, (1, 2, 2), (2, 4, 4)),
    label_names={0: "background", 1: "cell over dark", 2: "cell over bright"},
    label_colors={0: (0, 0, 0, 0), 1: (230, 159, 0, 255), 2: (86, 180, 233, 255)},
    pixel_size_um=(2.0, 0.5, 0.5),
)
"""Levels, class names, colours and voxel size of the stored volumes."""


@dataclass(frozen=True, kw_only=True)
class VolumeConfig:
    """Appearance of a volume; all lengths (``*_px``) in voxels of the finest level, zyx where there are three."""

    seed: int = 0
    """Seed of the whole data set, 0 or more."""
    size_px: tuple[int, int, int] = (16, 192, 192)
    """Slices, height and width of a volume."""
    floor_px: int = 2
    """Slices of the floor, from the first on."""
    empty_px: int = 7
    """Empty slices above the floor."""
    territory_lattices_px: tuple[float, ...] = (96.0, 48.0)
    """Lattice spacing of each octave of the noise whose upper half makes the bright territories."""
    dark: float = 0.3
    """Intensity of the dark territories."""
    bright: float = 0.9
    """Intensity of the bright territories."""
    pitch_px: tuple[float, float, float] = (3.5, 12.0, 12.0)
    """Spacing of the grid of cells along each axis."""
    jitter: float = 0.15
    """Largest shift of a cell from its grid point along each axis, as a fraction of the pitch."""
    radius_px: tuple[float, float] = (3.5, 5.0)
    """Range of the cells' radii in a slice."""
    flatness: float = 0.35
    """Radius of a cell across the slices, as a fraction of that in them."""
    peak: tuple[float, float] = (0.6, 1.0)
    """Range of the cells' intensities."""
    noise: float = 0.04
    """Standard deviation of the voxel noise."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if np.size(value) == 0 or not np.isfinite(value).all() or np.min(value) < 0:
                raise InputError(f"config.{field.name}", expected="numbers of at least 0", got=value)
        for name in ("size_px", "floor_px", "territory_lattices_px", "pitch_px", "flatness"):
            if np.min(getattr(self, name)) == 0:
                raise InputError(f"config.{name}", expected="a value above 0", got=getattr(self, name))
        for name in ("radius_px", "peak"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise InputError(f"config.{name}", expected="0 < lowest <= highest", got=(low, high))
        if self.floor_px + self.empty_px + self.pitch_px[0] > self.size_px[0]:
            raise InputError("config.size_px", expected="slices for cells above the empty ones", got=self.size_px)

    @property
    def hidden_px(self) -> int:
        """Slices of the tallest crop that cannot hold both a cell and a slice of the floor."""
        return self.empty_px + 1


def generate_volume(index: int, config: VolumeConfig) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Draw volume ``index`` of the data set.

    Returns:
        The volume, float32 (Z, Y, X), from 0 to about 1, and its label, uint8 (Z, Y, X): 0 background, 1 cell over
        dark, 2 cell over bright.

    Raises:
        InputError: ``index`` is negative.
    """
    if index < 0:
        raise InputError("index", expected="0 or more", got=index)
    rng = np.random.default_rng([config.seed, index])
    image, label = np.zeros(config.size_px, np.float32), np.zeros(config.size_px, np.uint8)
    _, height, width = config.size_px
    territories = fractal_noise(max(height, width), config.territory_lattices_px, rng)[:height, :width]
    is_bright = territories > np.median(territories)
    image[: config.floor_px] = np.where(is_bright, config.bright, config.dark)
    for cell in _place_cells(config, rng):
        value = 1 + is_bright[int(cell[1]), int(cell[2])]
        _stamp(image, label, cell, rng.uniform(*config.radius_px), rng.uniform(*config.peak), value, config)
    image = gaussian_filter(image, (0, 0.7, 0.7))
    image += config.noise * rng.standard_normal(image.shape, dtype=np.float32)
    return np.maximum(image, 0, out=image), label


def _place_cells(config: VolumeConfig, rng: np.random.Generator) -> NDArray[np.float64]:
    """Centres (N, 3) of the cells: a jittered grid above the empty slices."""
    first = (config.floor_px + config.empty_px, 0, 0)
    edges = zip(first, config.pitch_px, config.size_px, strict=True)
    axes = [np.arange(low + pitch / 2, n - pitch / 4, pitch) for low, pitch, n in edges]
    cells = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    return cells + rng.uniform(-config.jitter, config.jitter, cells.shape) * config.pitch_px


def _stamp(
    image: NDArray[np.float32],
    label: NDArray[np.uint8],
    cell: NDArray[np.float64],
    radius: float,
    peak: float,
    value: int,
    config: VolumeConfig,
) -> None:
    """Draw one flat ball, without touching the slices that stay empty."""
    radii = np.array([config.flatness * radius, radius, radius])
    lower = np.maximum((cell - radii).astype(int), (config.floor_px + config.empty_px, 0, 0))
    upper = np.minimum((cell + radii).astype(int) + 1, label.shape)
    grid = np.ogrid[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))]
    distance = sum(((axis + 0.5 - c) / r) ** 2 for axis, c, r in zip(grid, cell, radii, strict=True))
    window = tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))
    image[window][distance <= 1], label[window][distance <= 1] = peak, value


def write_volumes(
    folder: Path | str,
    *,
    num_train: int,
    num_val: int,
    num_test: int,
    config: VolumeConfig | None = None,
    workers: int | None = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Draw and store a data set, as `muvit.data.synthetic.folders.write_data_set` does; the folder is returned."""
    config, indices = config or VolumeConfig(), split_indices(num_train, num_val, num_test)
    draw, record = partial(generate_volume, config=config), describe(indices, config, kind="volumes")
    return write_data_set(folder, draw, STORE, indices, record, workers=workers, overwrite=overwrite, progress=progress)
