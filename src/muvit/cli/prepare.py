"""``muvit prepare``."""

import sys
from collections import Counter
from dataclasses import replace
from importlib import import_module
from inspect import signature
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.parser import Parser
from muvit.cli.terminal import Progress
from muvit.data.sources.label_map import LabelMap
from muvit.data.sources.prepare import prepare
from muvit.data.sources.source import SPLITS, Source, check_source

DATASETS = {
    "synthetic": "cells in warped rings, generated",
    "kpis": "glomeruli in whole-slide images of kidneys (KPIs challenge 2024)",
    "mouse": "regions in sections of mouse brains, whole specimens held out",
    "gleason": "Gleason grades in prostate tissue cores (Gleason challenge 2019)",
    "urur": "land use in aerial images (URUR)",
    "cityscapes": "street scenes (Cityscapes)",
    "archaeoscape": "traces of old settlements in laser scans (Archaeoscape)",
    "idrid": "lesions beside the optic disc in photographs of the retina (IDRiD)",
    "axondeepseg": "axons and myelin in electron micrographs (AxonDeepSeg)",
}
"""Data sets and their content."""

_MAPPED = ("mouse", "gleason", "urur", "axondeepseg")


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    chosen = parser.add_subcommands(
        required=True, dest="dataset", metavar="dataset", help="the data set, with its own options"
    )
    for name, summary in DATASETS.items():
        one = Parser(description=f"{summary[0].upper()}{summary[1:]}.")
        if name == "synthetic":
            _add_synthetic(one)
        else:
            _add_common(one, name)
        one.add_argument(
            "--overwrite", action="store_true", help="start again if the output was prepared with other options"
        )
        chosen.add_subcommand(name, one, help=summary)
        one.prog = f"muvit prepare {name}"


def _add_synthetic(parser: ArgumentParser) -> None:
    parser.add_argument("output", type=Path, help="folder to write train, val and test into")
    parser.add_argument("--train", type=int, default=1638, help="images to train on")
    parser.add_argument("--val", type=int, default=220, help="images to validate on")
    parser.add_argument("--test", type=int, default=190, help="images to test on")
    parser.add_argument(
        "--size_px", type=int, default=2048, help="height and width of an image, with all lengths in proportion"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated data set")
    parser.add_argument("--workers", type=int | None, default=None, help="processes (default: one per core)")


def _add_common(parser: ArgumentParser, name: str) -> None:
    parser.add_argument("source", type=Path, help="folder of the downloaded and unpacked data set")
    parser.add_argument("output", type=Path, help="folder to write train, val and test into")
    parser.add_argument("--check", action="store_true", help="list the files found and missing, and stop")
    parser.add_argument(
        "--levels", type=list[int] | None, default=None, help="downsampling factors to store, such as [1,8,32]"
    )
    parser.add_argument(
        "--pixel_size_um",
        type=float | None,
        default=None,
        help="micrometers per stored pixel (default: as stored in the files)",
    )
    if name in _MAPPED:
        parser.add_argument(
            "--label_map",
            type=Path | None,
            default=None,
            help="YAML file that lists the label values of each class, in order; those under ignore are of no class",
        )
    if name == "mouse":
        parser.add_argument("--images", type=str, default="images/*", help="pattern of the images' paths")
        parser.add_argument(
            "--labels",
            type=str,
            default="labels/{name}.*",
            help="pattern of the label file of an image, with its {name} and {specimen}",
        )
        parser.add_argument(
            "--specimen", type=str, default=r"BM\d+", help="regular expression for the specimen in an image's path"
        )
        parser.add_argument("--test_specimens", type=list[str], default=["BM15"], help="specimens to test on")
        parser.add_argument("--val_specimens", type=list[str], default=[], help="specimens to validate on")
    if name == "cityscapes":
        parser.add_argument(
            "--test_cities",
            type=list[str],
            default=["frankfurt"],
            help="cities of the validation set to test on instead, as the benchmark's own test labels are not public",
        )
    if name == "idrid":
        parser.add_argument(
            "--lesions", type=list[str], default=["EX"], help="kinds of lesions to tell apart: some of MA, HE, EX, SE"
        )
        parser.add_argument(
            "--test_images", type=list[str], default=[], help="photographs to test on, beside the published test set"
        )
        parser.add_argument("--val_images", type=list[str], default=[], help="photographs to validate on")
        parser.add_argument("--factor", type=int, default=1, help="downsampling of the stored photographs")
    if name == "axondeepseg":
        parser.add_argument("--test_subjects", type=list[str], default=[], help="animals to test on")
        parser.add_argument("--val_subjects", type=list[str], default=[], help="animals to validate on")
        parser.add_argument(
            "--test_part",
            type=float,
            default=0.0,
            help="share of the width of each image left to train on, to test on instead (for a single image)",
        )


def run(arguments: Namespace) -> None:
    """Check and convert the data set."""
    chosen: Namespace = arguments[arguments.dataset]
    if arguments.dataset == "synthetic":
        _generate(chosen)
        return
    source = _find(arguments.dataset, chosen)
    for warning in source.warnings:
        print(f"muvit: warning: {warning}", file=sys.stderr)
    counts = Counter(item.split for item in source.items)
    if chosen.check:
        check_source(source)
        print(f"{source.folder}: {', '.join(f'{counts[split]} {split}' for split in SPLITS)}")
        return
    with Progress(source.dataset, "Mpx") as progress:
        folder = prepare(
            source,
            chosen.output,
            levels=None if chosen.levels is None else tuple(chosen.levels),
            pixel_size_um=chosen.pixel_size_um,
            overwrite=chosen.overwrite,
            progress=progress,
        )
    print(f"{folder}: {', '.join(f'{counts[split]} {split}' for split in SPLITS)}")


def _find(dataset: str, chosen: Namespace) -> Source:
    """The files of a data set, by ``find_<dataset>`` of its module, whose arguments have the names of the options."""
    find = getattr(import_module(f"muvit.data.sources.{dataset}"), f"find_{dataset}")
    options = {name: chosen[name] for name in signature(find).parameters if name in chosen and name != "label_map"}
    if chosen.get("label_map") is not None:
        options["label_map"] = LabelMap.read(chosen.label_map)
    source: Source = find(chosen.source, **options)
    return source


def _generate(chosen: Namespace) -> None:
    from muvit.data.sources.synthetic import prepare_synthetic
    from muvit.data.synthetic.images import SyntheticConfig

    config = replace(SyntheticConfig(), seed=chosen.seed).at_size(chosen.size_px)
    with Progress("Synthetic images", "image") as progress:
        folder = prepare_synthetic(
            chosen.output,
            num_train=chosen.train,
            num_val=chosen.val,
            num_test=chosen.test,
            config=config,
            workers=chosen.workers,
            overwrite=chosen.overwrite,
            progress=progress,
        )
    print(f"{folder}: {chosen.train} train, {chosen.val} val, {chosen.test} test")
