"""The recipe that `muvit init` writes against one made by hand, on Synthetic images or on prepared ones.

Both are trained on the same images, on as many crops, by one process each, and label the same test images. The target:
the proposed recipe reaches at least 95 % of the mDSC of the other.

    python benchmarks/init.py --output runs/init
    python benchmarks/init.py --output runs/init_mouse --data data/mouse_sections --recipe recipes/mouse_sections.yaml \
        --crops 10240

take about a quarter of an hour each on two CPU cores. `--crops 256 --train 8 --test 2` tries it out.
"""

import argparse
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path

import torch
from markdown_table import markdown_table

import muvit.cli
from muvit.cli.demo import config, recipe
from muvit.data.synthetic.folders import RECORD_NAME
from muvit.data.synthetic.images import write_synthetic
from muvit.evaluation.comparison import compare
from muvit.evaluation.variants import Variant
from muvit.settings import read_settings
from muvit.training.recipes import Recipe

TARGET = 0.95


def with_crops(one: Recipe, crops: int) -> Recipe:
    """A recipe that trains on so many crops, to a whole step of an epoch."""
    epochs = max(1, round(crops / one.data.samples_per_epoch))
    samples = max(1, round(crops / epochs / one.data.batch_size)) * one.data.batch_size
    run = replace(one.run, epochs=epochs, progress=False)
    return replace(one, data=replace(one.data, samples_per_epoch=samples), run=run)


def main() -> None:
    """Train both, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for images, runs and report")
    parser.add_argument("--train", type=int, default=240, help="training images")
    parser.add_argument("--test", type=int, default=16, help="test images")
    parser.add_argument("--crops", type=int, default=12800, help="crops to train on")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="seeds of the training")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument("--data", type=Path, help="prepared images, instead of Synthetic ones; needs --recipe")
    parser.add_argument("--recipe", type=Path, help="recipe made by hand (default: that of muvit demo)")
    arguments = parser.parse_args()
    output, data = arguments.output, arguments.data or arguments.output / "data"
    if arguments.data is None and not (data / RECORD_NAME).exists():
        counts = {"num_train": arguments.train, "num_val": max(2, arguments.train // 20), "num_test": arguments.test}
        write_synthetic(data, **counts, config=config())
    proposed = output / "proposed.yaml"
    output.mkdir(parents=True, exist_ok=True)
    assert muvit.cli.main(["init", str(data), "--output", str(proposed), "--overwrite"]) == 0
    hand, init = recipe(data), read_settings(proposed, Recipe)
    if arguments.recipe is not None:
        hand = read_settings(arguments.recipe, Recipe)
        hand = replace(hand, data=replace(hand.data, train=str(data / "train")))
        # what no label image tells
        init = replace(init, data=replace(init.data, val=None, ignore_labels=hand.data.ignore_labels))
    recipes = {"by hand": hand, "init": init}
    variants = [
        Variant(name=name, description="", recipe=with_crops(one, arguments.crops)) for name, one in recipes.items()
    ]
    results = compare(
        variants,
        data / "test",
        output / "comparison",
        title="A recipe by hand and one by init",
        intro="The same images, and as many crops.",
        seeds=arguments.seeds,
        overwrite=(output / "comparison").exists(),
    )
    by_hand, proposed_score = (result.mean_dice for result in results)
    rows = []
    for result in results:
        scores = [f"{score:.3f}" for score in (result.mean_dice, *result.dice.values())]
        rows.append([result.name, *scores, f"{result.parameters:,}", f"{result.seconds / 60:.1f}"])
    text = f"""# The recipe of init

`{" ".join(sys.argv)}`, seeds \
{arguments.seeds or [0]}, torch {torch.__version__.split("+")[0]}, {os.cpu_count()} cores ({platform.machine()}).

{markdown_table(["recipe", "mDSC", *results[0].dice, "parameters", "training, minutes"], rows)}

init reaches {proposed_score / by_hand:.1%} of the other recipe's mDSC; the target is {TARGET:.0%}.
"""
    print(text)
    if arguments.table is not None:
        arguments.table.write_text(text)


if __name__ == "__main__":
    main()
