"""``muvit synthetic``."""

from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.progress import Progress
from muvit.data.synthetic import SyntheticConfig, write_synthetic


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--output", type=Path, required=True, help="folder to write train, val and test into")
    parser.add_argument("--train", type=int, default=1638, help="images to train on")
    parser.add_argument("--val", type=int, default=220, help="images to validate on")
    parser.add_argument("--test", type=int, default=190, help="images to test on")
    parser.add_argument("--small", action="store_true", help="all lengths divided by 4: images of 512 pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes another data set")
    parser.add_argument("--workers", type=int | None, default=None, help="processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is there already")


def run(arguments: Namespace) -> None:
    """Write the data set."""
    config = replace(SyntheticConfig.small() if arguments.small else SyntheticConfig(), seed=arguments.seed)
    with Progress("Synthetic images", "image") as progress:
        folder = write_synthetic(
            arguments.output,
            num_train=arguments.train,
            num_val=arguments.val,
            num_test=arguments.test,
            config=config,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(folder)
