"""``muvit synthetic``."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.terminal import Progress
from muvit.data.synthetic.free import LegendConfig, write_legend
from muvit.data.synthetic.images import SyntheticConfig, write_synthetic
from muvit.data.synthetic.volumes import VolumeConfig, write_volumes
from muvit.errors import InputError

_COUNTS = {"rings": (1638, 220, 190), "scattered": (1638, 220, 190), "volumes": (24, 4, 4), "free": (40, 4, 4)}


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--output", type=Path, required=True, help="folder to write train, val and test into")
    parser.add_argument(
        "--kind",
        type=Literal["rings", "scattered", "volumes", "free"],
        default="rings",
        help="rings: cells whose class differs only at a coarse scale; scattered: the same with coarse levels that "
        "show no cells, so that views cannot be matched by content; volumes: the class shows in another slice; free: "
        "images with a legend elsewhere, for free views",
    )
    for number, (split, purpose) in enumerate((("train", "train on"), ("val", "validate on"), ("test", "test on"))):
        defaults = ", ".join(f"{counts[number]} {kind}" for kind, counts in _COUNTS.items())
        parser.add_argument(
            f"--{split}", type=int | None, default=None, help=f"images to {purpose} (default: {defaults})"
        )
    parser.add_argument(
        "--size_px",
        type=int | None,
        default=None,
        help="rings, scattered: height and width of an image, with all lengths in proportion (default: 2048, for crops "
        "of 256 px)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated data set")
    parser.add_argument(
        "--workers", type=int | None, default=None, help="rings, scattered: processes (default: one per core)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set")


def run(arguments: Namespace) -> None:
    """Write the data set."""
    given = (arguments.train, arguments.val, arguments.test)
    pairs = zip(given, _COUNTS[arguments.kind], strict=True)
    train, val, test = (default if count is None else count for count, default in pairs)
    options: dict[str, Any] = {"num_train": train, "num_val": val, "num_test": test, "overwrite": arguments.overwrite}
    has_rings = arguments.kind in ("rings", "scattered")
    if not has_rings and (arguments.size_px is not None or arguments.workers is not None):
        raise InputError(
            "--size_px and --workers", expected="--kind rings or scattered", got=f"--kind {arguments.kind}"
        )
    with Progress("Synthetic images", "image") as progress:
        options["progress"] = progress
        if has_rings:
            config = SyntheticConfig() if arguments.kind == "rings" else SyntheticConfig.scattered()
            config = replace(config, seed=arguments.seed).at_size(arguments.size_px or config.size_px)
            folder = write_synthetic(arguments.output, config=config, workers=arguments.workers, **options)
        elif arguments.kind == "volumes":
            folder = write_volumes(arguments.output, config=VolumeConfig(seed=arguments.seed), **options)
        else:
            folder = write_legend(arguments.output, config=LegendConfig(seed=arguments.seed), **options)
    print(folder)
