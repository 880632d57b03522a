"""Does a 3D model read from a coarse view what its fine view never reaches?

Models of the same recipe on volumes whose classes stand on their lowest slices (`muvit.data.synthetic.volumes`), with
the fine view alone and with the coarse one as well, and with either decoder. Whole test volumes are labelled by
`predict_slide`.

    python benchmarks/synthetic_volumes.py --output runs/synthetic_volumes

Writes the table to ``benchmarks/results/synthetic_volumes.md``. Models that are there are not trained again.
"""

import argparse
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from markdown_table import markdown_table

from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.folders import open_labelled_folder
from muvit.data.slides.open import open_slide
from muvit.data.synthetic.volumes import write_volumes
from muvit.evaluation.scores.segmentation import evaluate_slides
from muvit.inference.predict import predict_slide
from muvit.inference.run.plan import AS_PUBLISHED
from muvit.levels import level_name
from muvit.metrics import Scores
from muvit.models.trained import build_model, load_model
from muvit.settings import read_settings
from muvit.training.fit import train_segmenter
from muvit.training.recipes import Recipe
from muvit.training.slides import complete

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "synthetic_volumes.yaml"
RESULT = ROOT / "benchmarks" / "results" / "synthetic_volumes.md"
VOLUMES = (24, 4, 4)


def score(model_folder: Path, test: Path, output: Path) -> Scores:
    """Scores of a model on whole volumes."""
    model, preprocessing = load_model(model_folder), Preprocessing.load(model_folder)
    pairs = []
    for image, label in open_labelled_folder(test):
        path = output / f"{image.name}.ome.zarr"
        predict_slide(model, image, path, preprocessing, options=AS_PUBLISHED, overwrite=True)
        pairs.append((open_slide(path), label))
    return evaluate_slides(pairs, model.num_classes).pooled


def main() -> None:
    """Train what is missing, score all, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/synthetic_volumes"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = arguments.output / "data"
    if not data.exists():
        write_volumes(data, num_train=VOLUMES[0], num_val=VOLUMES[1], num_test=VOLUMES[2])
    base = read_settings(RECIPE, Recipe)
    levels, rows = base.model.encoder.levels, []
    for seen, decoder in product((levels, levels[:1]), ("unetr", "mask2former")):
        model = replace(base.model, encoder=replace(base.model.encoder, levels=seen), decoder=decoder)
        recipe = replace(
            base,
            data=replace(base.data, train=str(data / "train"), val=None),
            model=model,
            run=replace(base.run, seed=arguments.seed, progress=False),
        )
        run, begin = arguments.output / f"{decoder}_{len(seen)}", time.process_time()
        folder = run / "last" if (run / "last").exists() else train_segmenter(recipe, run)
        seconds = time.process_time() - begin
        result = score(folder, data / "test", run / "predictions")
        size = sum(p.numel() for p in build_model(complete(recipe).model).parameters()) / 1e6
        named = [", ".join(map(level_name, seen)), decoder, f"{size:.2f}"]
        rows.append([*named, *(f"{d:.3f}" for d in (*result.dice[1:], result.mean_dice)), f"{seconds:.0f}"])
    steps = base.run.epochs * base.data.samples_per_epoch // base.data.batch_size
    scores = ["Dice, cells over dark", "Dice, cells over bright", "mDSC"]
    head = ["levels (zyx)", "decoder", "M parameters", *scores, "CPU seconds of training"]
    text = f"""# Volumes

- command: `python benchmarks/synthetic_volumes.py`, torch {torch.__version__}, on a CPU; recipe `recipes/{RECIPE.name}`
- {VOLUMES[0]} volumes of 16 x 192 x 192 voxels to train on, {VOLUMES[2]} to test on, labelled whole; {steps} steps of
  {base.data.batch_size} crops of {" x ".join(map(str, base.data.crop_size))} voxels; seed {arguments.seed}

The class of every cell stands on the lowest slices, under the cell: out of reach of the fine view, in reach of the
coarse one, which is four times as wide and twice as high.

{markdown_table(head, rows)}
"""
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
