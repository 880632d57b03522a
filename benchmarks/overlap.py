"""How far should tiles overlap, how are they joined, which are worth computing? Dice, seams and time of one model.

    muvit train --config recipes/mouse_sections.yaml --output runs/mouse
    python benchmarks/overlap.py runs/mouse --test data/mouse_sections/test --ignore_labels 14 --output runs/overlap

Writes the table to the given file, or to ``benchmarks/results/overlap.md``, below what its head says of the run.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from markdown_table import markdown_table
from numpy.typing import NDArray

from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.folders import open_labelled_folder
from muvit.data.slides.formats import store_path
from muvit.data.slides.open import open_slide
from muvit.evaluation.scores.segmentation import evaluate_slides
from muvit.inference.predict import predict_slide
from muvit.inference.run.label_blocks import prediction_status
from muvit.inference.run.plan import LabelPlan, PredictOptions
from muvit.inference.run.resume import read_summary
from muvit.inference.tiling.seams import Seams
from muvit.inference.tiling.tiles import TilePlan
from muvit.models.folder import model_folder
from muvit.models.trained import load_model

RUNS: dict[str, dict[str, Any]] = {
    "0": {"overlap": 0.0},
    "0.25, linear": {"overlap": 0.25, "blend": "linear"},
    "0.25, cosine": {"overlap": 0.25},
    "0.5, linear": {"blend": "linear"},
    "0.5, cosine": {},
    "0.5, coarse crops on a grid": {"placement": "grid"},
    "0, flips": {"overlap": 0.0, "flips": (-2, -1)},
    "0.5, flips": {"flips": (-2, -1)},
    **{f"0.5, refine {threshold}": {"refine": threshold} for threshold in (0.02, 0.05, 0.1, 0.2, 0.4)},
    "0.5, flips, refine 0.05": {"flips": (-2, -1), "refine": 0.05},
}


def bends(tiling: TilePlan, probabilities: NDArray[np.float32]) -> Iterator[tuple[float, float]]:
    """Mean absolute second difference of the probabilities at the edges of tiles, and its median, along each axis.

    Args:
        tiling: where the tiles lie.
        probabilities: ``(K, *space)``.
    """
    for axis, extent in enumerate(probabilities.shape[1:]):
        others = tuple(i for i in range(probabilities.ndim) if i != axis + 1)
        bend = np.abs(np.diff(probabilities, n=2, axis=axis + 1)).mean(others)  # entry i: about pixel i + 1
        corners = [tiling.corner(axis, i) for i in range(tiling.grid[axis])]
        edges = {edge for corner in corners for edge in (corner, corner + tiling.crop_size[axis]) if 0 < edge < extent}
        at_edges = [bend[pixel - 1] for edge in edges for pixel in (edge - 1, edge) if 0 < pixel < extent - 1]
        yield float(np.mean(at_edges)), float(np.median(bend))


def measure(folder: Path, test: Path, output: Path, options: PredictOptions, ignore: list[int]) -> list[str]:
    """Scores, seams and processor time of a model on the slides of a folder."""
    model, preprocessing = load_model(folder), Preprocessing.load(folder)
    pairs, seconds, seams, bent, tiles = [], 0.0, np.zeros(4, int), [], 0
    for image, truth in open_labelled_folder(test):
        target, began = output / f"{image.name}.ome.zarr", time.process_time()
        predict_slide(model, image, target, preprocessing, options=options, batch_size=16, overwrite=True)
        seconds += time.process_time() - began
        status = prediction_status(target)
        counts = status.seams
        assert counts is not None
        seams += (counts.across, counts.across_pairs, counts.inside, counts.inside_pairs)
        tiling = LabelPlan.from_json(read_summary(target)["plan"]).tiling
        tiles += status.tiles.computed if status.tiles else sum(map(tiling.num_computed, range(tiling.num_blocks)))
        stored = open_slide(store_path(target, "probabilities"))
        bent += bends(tiling, stored.read(1, (0,) * stored.ndim, stored.shape).astype(np.float32))
        pairs.append((open_slide(target), truth))
    scores = evaluate_slides(pairs, len(preprocessing.class_names), ignore=ignore).pooled
    total = Seams(**dict(zip(("across", "across_pairs", "inside", "inside_pairs"), seams.tolist(), strict=True)))
    edge, elsewhere = np.mean(bent, axis=0)
    return [
        f"{tiles / len(pairs):.0f}",
        f"{scores.mean_dice:.4f}",
        f"{scores.accuracy:.4f}",
        "" if total.ratio is None else f"{total.ratio:.2f}",
        f"{edge / elsewhere:.2f}",
        f"{seconds / len(pairs):.1f}",
    ]


def main() -> None:
    """Measure all runs and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ignore_labels", type=int, nargs="*", default=[])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--table", type=Path, default=Path(__file__).parent / "results" / "overlap.md")
    arguments = parser.parse_args()
    folder, rows = model_folder(arguments.model), []
    for name in arguments.runs:
        output = arguments.output / name.replace(", ", "-")
        options = PredictOptions(probabilities="float16", **RUNS[name])
        rows.append([name, *measure(folder, arguments.test, output, options, arguments.ignore_labels)])
        print(rows[-1], flush=True)
    header = ["overlap", "tiles", "mDSC", "accuracy", "seams", "bend at tile edges", "processor seconds"]
    before = arguments.table.read_text().split("| overlap |")[0] if arguments.table.exists() else ""
    arguments.table.write_text(f"{before}{markdown_table(header, rows)}\n")


if __name__ == "__main__":
    main()
