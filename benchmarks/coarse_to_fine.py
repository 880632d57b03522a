"""Does a model whose coarse tokens never see finer ones score as well as one with full attention?

The pattern ``coarse_to_fine`` is what makes contexts cachable (`benchmarks/context_caching.py`). Here models with it
and with full attention are trained by ``recipes/synthetic_scattered.yaml``, and score the random crops of validation
after the last epoch, and whole test images. Remedies for a gap:

- ``copies``: coarse tokens under the finest view have copies that see it (``coarse_copies: under``), for a few percent
  more operations at prediction; ``ring``: so do those around.
- ``longer``: twice the epochs, for both.
- ``from_full``: the encoder starts from that of the model with full attention, of the first seed; the weights are the
  same ones.

    python benchmarks/coarse_to_fine.py --variants full coarse_to_fine coarse_to_fine_copies --seeds 0 1 2 --epochs 6
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from markdown_table import markdown_table

from muvit.cli.demo import config
from muvit.data.synthetic.images import write_synthetic
from muvit.evaluation.comparison import compare
from muvit.evaluation.variants import Variant
from muvit.settings import read_settings
from muvit.training.recipes import InitConfig, Recipe

INTRO = "Models whose coarse tokens see finer ones, do not, or have copies that do."
NAMES = (
    "full",
    "coarse_to_fine",
    "coarse_to_fine_copies",
    "coarse_to_fine_ring",
    "full_longer",
    "coarse_to_fine_longer",
    "coarse_to_fine_from_full",
)


def variant(name: str, recipe: Recipe, full: Path) -> Variant:
    """The model of this name; ``full`` is the run of the one with full attention."""
    model, run = recipe.model, recipe.run
    if name.startswith("coarse_to_fine"):
        copies = {"copies": "under", "ring": "ring"}.get(name.rpartition("_")[2], "none")
        encoder = replace(model.encoder, attention_mode="coarse_to_fine", coarse_copies=copies)
        model = replace(model, encoder=encoder)
    if name.endswith("longer"):
        run = replace(run, epochs=2 * run.epochs)
    init = InitConfig(encoder=str(full)) if name.endswith("from_full") else None
    changed = replace(recipe, model=model, run=run, init=init)
    return Variant(name=name, description=name.replace("_", " "), recipe=changed)


def run(variants: Sequence[Variant], seeds: Sequence[int], test: Path, output: Path) -> list[list[str]]:
    """Train and score what is not done yet; the rows of the table."""
    if not variants:
        return []
    results = compare(variants, test, output, title="Coarse to fine", intro=INTRO, seeds=seeds, resume=True)
    rows = []
    for one, result in zip(variants, results, strict=True):
        whole = result.by_seed or (result.mean_dice,)
        crops = [last_validation(output / "runs" / f"{one.slug}_seed_{seed}") for seed in seeds]
        rows.append([one.description, *map(cell, (crops, whole))])
    return rows


def last_validation(folder: Path) -> float:
    """The mDSC on the random crops of validation after the last epoch of a run."""
    with next(folder.glob("logs/*/metrics.csv")).open(newline="") as file:
        return [float(row["val_mdsc"]) for row in csv.DictReader(file) if row["val_mdsc"]][-1]


def cell(scores: Sequence[float]) -> str:
    """Mean and single scores."""
    return f"{mean(scores):.4f} ({', '.join(f'{score:.3f}' for score in scores)})"


def main() -> None:
    """Train, score, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--data", type=Path, default=Path("data/scattered"), help="made if it is not there")
    parser.add_argument("--output", type=Path, default=Path("runs/coarse_to_fine"))
    parser.add_argument(
        "--epochs", type=int, default=8, help="of 1600 crops; the variants that train longer take twice"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    if not arguments.data.exists():
        write_synthetic(arguments.data, num_train=240, num_val=12, num_test=16, config=config())
    recipe = read_settings(Path(__file__).parents[1] / "recipes" / "synthetic_scattered.yaml", Recipe)
    folders = {split: str(arguments.data / split) for split in ("train", "val")}
    recipe = replace(
        recipe,
        run=replace(recipe.run, epochs=arguments.epochs, progress=False),
        data=replace(recipe.data, **folders),
    )
    first, second = arguments.output / "first", arguments.output / "from_full"
    variants = [
        variant(name, recipe, first / "runs" / f"full_seed_{arguments.seeds[0]}") for name in arguments.variants
    ]
    test, seeds = arguments.data / "test", arguments.seeds
    rows = run([v for v in variants if v.recipe.init is None], seeds, test, first)
    rows += run([v for v in variants if v.recipe.init is not None], seeds, test, second)
    print(f"{arguments.epochs} epochs, seeds {', '.join(map(str, seeds))}; mean over the seeds, and each\n")
    print(markdown_table(["attention", "mDSC of random crops", "mDSC of whole images"], rows))


if __name__ == "__main__":
    main()
