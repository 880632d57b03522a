"""The recipe that `muvit init` writes against one made by hand, on Synthetic images.

Both are trained on the same images, on as many crops, by one process each, and label the same test images. The target:
the proposed recipe reaches at least 95 % of the mDSC of the other.

    python benchmarks/init.py --output /tmp/init --table benchmarks/results/init.md

takes about half an hour on two CPU cores. `--crops 256 --train 8 --test 2` tries it out.
"""

import argparse
import os
import platform
from dataclasses import replace
from pathlib import Path

import torch
from markdown_table import markdown_table

from muvit.cli import main
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for images, runs and report")
    parser.add_argument("--train", type=int, default=240, help="training images")
    parser.add_argument("--test", type=int, default=16, help="test images")
    parser.add_argument("--crops", type=int, default=11200, help="crops to train on: those of the demo")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="seeds of the training")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    output, data = arguments.output, arguments.output / "data"
    if not (data / RECORD_NAME).exists():
        counts = {"num_train": arguments.train, "num_val": max(2, arguments.train // 20), "num_test": arguments.test}
        write_synthetic(data, **counts, config=config())
    proposed = output / "proposed.yaml"
    assert main(["init", str(data), "--output", str(proposed), "--overwrite"]) == 0
    recipes = {"by hand": recipe(data), "init": read_settings(proposed, Recipe)}
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
    hand, init = (result.mean_dice for result in results)
    rows = []
    for result in results:
        scores = [f"{score:.3f}" for score in (result.mean_dice, *result.dice.values())]
        rows.append([result.name, *scores, f"{result.parameters:,}", f"{result.seconds / 60:.1f}"])
    text = f"""# The recipe of init

`python benchmarks/init.py --train {arguments.train} --test {arguments.test} --crops {arguments.crops}`, seeds \
{arguments.seeds or [0]}, torch {torch.__version__.split("+")[0]}, {os.cpu_count()} cores ({platform.machine()}).

{markdown_table(["recipe", "mDSC", *results[0].dice, "parameters", "training, minutes"], rows)}

init reaches {init / hand:.1%} of the other recipe's mDSC; the target is {TARGET:.0%}.
"""
    print(text)
    if arguments.table is not None:
        arguments.table.write_text(text)
