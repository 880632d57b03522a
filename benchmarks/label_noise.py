"""The score that labels of an atlas allow, if the atlas lies a little off the tissue.

The labels of the mouse-brain sections are an atlas that was registered to them. Here they are displaced once more, by
smooth random fields of the size of registration errors, and play the truth; the labels as they are play a model that is
never wrong. Its mDSC, by the rule of `benchmarks/results/mouse_sections.md`, is what no model can be expected to exceed
on labels with such errors, unless it learns the errors.

    muvit prepare mouse SOURCE data/mouse_sections ...   (as recipes/mouse_sections.yaml says)
    python benchmarks/label_noise.py --data data/mouse_sections

The size of the errors is measured where it shows: from the outline of the atlas to that of the tissue, on all sections.
Medians are taken, since torn and missing tissue makes large distances that are no errors of the registration.

Writes the tables to ``benchmarks/results/label_noise.md``, below what its head says of the run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markdown_table import markdown_table, replace_parts
from numpy.typing import NDArray
from scipy import ndimage

from muvit.data.folders import open_labelled_folder
from muvit.data.slides.slide import Slide
from muvit.inference.tiling.tissue import find_tissue
from muvit.metrics import confusion_matrix, scores

SIZES_UM = (25, 50, 100, 150, 200, 300, 400, 600)
"""Root mean square of the displacements' lengths."""
RANGES_UM = (1000, 4000)
"""Standard deviations of the Gaussian that makes the fields smooth: bends of one part, and shifts of nearly all."""
NUM_DRAWS = 5
SMALLEST_PART = 0.05
"""Area of a piece of tissue relative to the largest one, below which it counts as dirt."""
MEDIAN_NORMAL = 0.6745
"""Median of the absolute value of a standard normal number."""
UNASSIGNED = 14
NUM_CLASSES = 15


def displacement(
    shape: tuple[int, int], size_px: float, range_px: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Smooth random displacements ``(2, y, x)`` in pixels, whose lengths have the root mean square ``size_px``.

    White noise, smoothed by a Gaussian of ``range_px`` on a coarse grid that reaches four ranges beyond the image.
    """
    step = max(range_px / 8, 1.0)
    margin = int(np.ceil(4 * range_px / step))
    grid = tuple(int(np.ceil(n / step)) + 2 * margin + 2 for n in shape)
    noise = ndimage.gaussian_filter(rng.standard_normal((2, *grid)), (0, range_px / step, range_px / step))
    places = np.meshgrid(*(np.arange(n) / step + margin for n in shape), indexing="ij")
    field = np.stack([ndimage.map_coordinates(one, places, order=1) for one in noise])
    # of all fields, not of this one: a draw may be larger or smaller than the mean
    scale = size_px / np.sqrt(2) * (2 * np.sqrt(np.pi) * range_px / step)
    return field * scale


def displaced(labels: NDArray[np.integer], field: NDArray[np.float64]) -> NDArray[np.integer]:
    """Labels ``(y, x)`` read at displaced places; the border continues outside."""
    places = np.indices(labels.shape) + field
    return ndimage.map_coordinates(labels, places, order=0, mode="nearest")


def assigned(labels: NDArray[np.integer]) -> NDArray[np.integer]:
    """Labels with the nearest region in place of what no region holds, as no model predicts that."""
    nearest = ndimage.distance_transform_edt(labels == UNASSIGNED, return_distances=False, return_indices=True)
    return labels[tuple(nearest)]


def highest_score(
    labels: Sequence[NDArray[np.integer]],
    predictions: Sequence[NDArray[np.integer]],
    size_px: float,
    range_px: float,
    seed: int,
) -> float:
    """mDSC of predictions that are never wrong against displaced labels, pixels of all sections pooled."""
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    for number, (one, prediction) in enumerate(zip(labels, predictions, strict=True)):
        field = displacement(one.shape, size_px, range_px, np.random.default_rng((seed, number)))
        confusion += confusion_matrix(displaced(one, field), prediction, NUM_CLASSES, ignore=(UNASSIGNED,))
    return scores(confusion, ignore=(UNASSIGNED,)).mean_dice


def outline_distances(image: Slide, labels: NDArray[np.integer]) -> tuple[float, float]:
    """Median distance in pixels from the outline of the atlas to that of the tissue, and the Dice of their areas."""
    closed = ndimage.binary_closing(find_tissue(image, "dark").mask, iterations=3)
    parts, _ = ndimage.label(ndimage.binary_fill_holes(closed))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    tissue = np.asarray((sizes >= SMALLEST_PART * sizes.max())[parts])
    atlas = ndimage.binary_fill_holes(labels > 0)
    tissue_edge, atlas_edge = (mask & ~ndimage.binary_erosion(mask) for mask in (tissue, atlas))
    distances = ndimage.distance_transform_edt(~tissue_edge)[atlas_edge]
    return float(np.median(distances)), float(2 * (tissue & atlas).sum() / (tissue.sum() + atlas.sum()))


def whole(slide: Slide) -> NDArray[np.integer]:
    """Pixels of the finest level of a label image."""
    pixels: NDArray[np.integer] = slide.read(1, (0, 0), slide.shape)[0]
    return pixels


def main() -> None:
    """Measure, displace, score, and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/mouse_sections"), help="prepared sections")
    parser.add_argument("--draws", type=int, default=NUM_DRAWS, help="random fields of each size")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "label_noise.md")
    arguments = parser.parse_args()

    pairs = {split: open_labelled_folder(arguments.data / split) for split in ("train", "test")}
    [pixel_um] = {size for _, labels in pairs["test"] for size in labels.pixel_size_um or ()}
    found = [outline_distances(image, whole(labels)) for split in pairs.values() for image, labels in split]
    medians, areas = (np.array(values) for values in zip(*found, strict=True))
    # an outline shows the part of a displacement that is across it: one of two components
    measured = np.quantile(medians, (0.25, 0.5, 0.75)) * pixel_um * np.sqrt(2) / MEDIAN_NORMAL
    rows = [
        [name, f"{median * pixel_um:.0f}", f"{size:.0f}", f"{area:.3f}"]
        for name, median, size, area in zip(
            ("quarter with the best fit, up to", "half, up to", "three quarters, up to"),
            np.quantile(medians, (0.25, 0.5, 0.75)),
            measured,
            np.quantile(areas, (0.75, 0.5, 0.25)),
            strict=True,
        )
    ]
    head = ["sections", "distance of the outlines [um]", "displacement that gives it [um]", "Dice of the areas, from"]
    outline = markdown_table(head, rows)
    labels = [whole(one) for _, one in pairs["test"]]
    right = [assigned(one) for one in labels]
    rows = []
    for size in sorted({*SIZES_UM, *np.round(measured).astype(int).tolist()}):
        cells = []
        for reach in RANGES_UM:
            draws = [
                highest_score(labels, right, size / pixel_um, reach / pixel_um, seed) for seed in range(arguments.draws)
            ]
            cells.append(f"{np.mean(draws):.3f} ({min(draws):.3f} to {max(draws):.3f})")
        rows.append([str(size), f"{size / pixel_um:.1f}", *cells])
        print(*rows[-1], flush=True)
    head = ["displacement [um]", "[px]", *(f"smooth over {reach / 1000:g} mm" for reach in RANGES_UM)]
    replace_parts(arguments.output, {"outline": outline, "displaced": markdown_table(head, rows)})
    print(outline)


if __name__ == "__main__":
    main()
