"""Does a model read what stands elsewhere in an image, and does it take the true place of that view?

Models of the same recipe on images whose classes stand in a legend (`muvit.data.synthetic.free`):

- ``true boxes``: the free view shows the legend, and its box says where;
- ``shuffled boxes``: the same views, in training and test, with the box of another draw;
- ``nested view``: the coarse view holds the fine one, as anywhere else, and so never the legend.

    python benchmarks/free_views.py --output runs/free_views

Writes the table to ``benchmarks/results/free_views.md``. Models that are there are not trained again.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from markdown_table import markdown_table
from torch.utils.data import DataLoader

from muvit.data.crops.crops import GridCrops
from muvit.data.folders import open_labelled_folder
from muvit.data.synthetic.free import write_legend
from muvit.evaluation.scores.bootstrap import seed_interval
from muvit.labels import IGNORE
from muvit.metrics import Scores, confusion_matrix, scores
from muvit.models.trained import build_model, load_model
from muvit.settings import read_settings
from muvit.training.datamodules import SegmentationData
from muvit.training.fit import train_segmenter
from muvit.training.recipes import DataConfig, Recipe
from muvit.training.slides import complete

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "synthetic_free.yaml"
RESULT = ROOT / "benchmarks" / "results" / "free_views.md"
IMAGES = (40, 4, 8)


def score(recipe: Recipe, model_folder: Path, test: Path) -> Scores:
    """Scores of a model on all tiles of the test images, cut as its recipe says."""
    model = load_model(model_folder).eval()
    config = SegmentationData(recipe, model.views).crops
    confusion = np.zeros((model.num_classes,) * 2, np.int64)
    crops = GridCrops([*open_labelled_folder(test)], config)
    for batch in DataLoader(crops, batch_size=recipe.data.batch_size):
        with torch.inference_mode():
            guess = model.label_logits(batch["img"], batch["bbox"]).argmax(1)
        confusion += confusion_matrix(batch["label"].numpy(), guess.numpy(), model.num_classes, (IGNORE,))
    return scores(confusion)


def variants(recipe: Recipe) -> dict[str, DataConfig]:
    """Placements of the coarse view, and what its box says."""
    free = recipe.data.free_views
    assert free is not None
    return {
        "true boxes": recipe.data,
        "shuffled boxes": replace(recipe.data, free_views=replace(free, boxes="shuffled")),
        "nested view": replace(recipe.data, placement="nested", free_views=None),
    }


def main() -> None:
    """Train what is missing, score all, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/free_views"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    data = arguments.output / "data"
    if not data.exists():
        write_legend(data, num_train=IMAGES[0], num_val=IMAGES[1], num_test=IMAGES[2])
    base = read_settings(RECIPE, Recipe)
    rows, means = [], []
    for name, views in variants(base).items():
        found = []
        for seed in arguments.seeds:
            recipe = replace(
                base,
                data=replace(views, train=str(data / "train"), val=None),
                run=replace(base.run, seed=seed, progress=False),
            )
            run, begin = arguments.output / f"{name.replace(' ', '_')}_{seed}", time.process_time()
            folder = run / "last" if (run / "last").exists() else train_segmenter(recipe, run)
            seconds = time.process_time() - begin
            result = score(recipe, folder, data / "test")
            found.append(result.mean_dice)
            rows.append(
                [name, str(seed), *(f"{d:.3f}" for d in (*result.dice[1:], result.mean_dice)), f"{seconds:.0f}"]
            )
        interval = seed_interval(found)
        bounds = "one seed" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        means.append([name, f"{np.mean(found):.3f}", bounds])
    steps = base.run.epochs * base.data.samples_per_epoch // base.data.batch_size
    size = sum(p.numel() for p in build_model(complete(base).model).parameters()) / 1e6
    head = ["coarse view", "seed", "Dice, cells under dark", "Dice, cells under bright", "mDSC", "CPU seconds"]
    text = f"""# Free views

- command: `python benchmarks/free_views.py`, torch {torch.__version__}, on a CPU; recipe `recipes/{RECIPE.name}`
- {IMAGES[0]} images to train on, {IMAGES[2]} to test on, all tiles; {steps} steps of {base.data.batch_size} crops; a
  model of {size:.1f} M parameters

The class of every cell stands in a legend at the upper edge of the image, which only a free view shows, at a random
place along the edge. Without its true place the view says little: half of any stretch of the legend is dark.

{markdown_table(head, rows)}

Means over the seeds, with 95 % intervals by Student's t:

{markdown_table(["coarse view", "mDSC", "95 % interval"], means)}
"""
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
