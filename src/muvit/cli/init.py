"""``muvit init``."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.data.slides.slide import Slide
from muvit.durable import write_whole
from muvit.errors import ExistsError


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "data",
        type=Path,
        help="folder with images and labels to train on, or with such folders train and val; or a table of slides",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="recipe to write; beside it, a picture of its first samples (.png)"
    )
    parser.add_argument(
        "--val", type=Path | None, default=None, help="folder to validate on (default: val beside train)"
    )
    parser.add_argument(
        "--encoder",
        type=Path | None,
        default=None,
        help="pre-trained model to start from; its levels and sizes are taken (default: none)",
    )
    parser.add_argument("--hours", type=float, default=1.0, help="time to train for, on this machine")
    parser.add_argument("--overwrite", action="store_true", help="replace a recipe or picture that is there already")


def run(arguments: Namespace) -> None:
    """Look at the data, measure the machine, write recipe and picture, and print what was found."""
    picture = arguments.output.with_suffix(".png")
    for file in (arguments.output, picture):
        if file.exists() and not arguments.overwrite:
            raise ExistsError(file)
    from muvit.cli.samples import write_samples
    from muvit.errors import InputError
    from muvit.models.trained import load_encoder
    from muvit.training.proposal import describe, propose, render, this_machine
    from muvit.training.survey import survey_folder

    if not arguments.hours > 0:
        raise InputError("--hours", expected="a positive number", got=arguments.hours)
    train, val = _folders(arguments.data, arguments.val)
    encoder = None if arguments.encoder is None else (str(arguments.encoder), load_encoder(arguments.encoder).config)
    survey = survey_folder(train)
    extent = max(map(_tissue_extent, survey.slides))
    choices = propose(survey, extent, this_machine(), train=train, val=val, encoder=encoder, hours=arguments.hours)
    facts = describe(survey, extent)
    head = [
        f"Recipe for {arguments.data}, proposed by muvit init. Change what you know better.",
        "",
        f"  muvit train --config {arguments.output} --output runs/first",
        "",
        *facts,
    ]
    write_whole(arguments.output, render(choices, head).encode())
    write_samples(arguments.output, picture)
    print(*facts, picture, arguments.output, sep="\n")


def _folders(data: Path, val: Path | None) -> tuple[Path, Path | None]:
    """Folders to train and to validate on."""
    train = data / "train" if (data / "train").is_dir() else data
    beside = train.parent / "val"
    return train, val if val is not None else beside if train.name == "train" and beside.is_dir() else None


def _tissue_extent(slide: Slide) -> float:
    """Longest side of what holds all tissue, in world pixels."""
    import numpy as np

    from muvit.inference.tiling.tissue import find_tissue
    from muvit.levels import level_factors

    tissue = find_tissue(slide)
    size = np.ptp(np.argwhere(tissue.mask), axis=0) + 1
    return float((size * level_factors(tissue.level, slide.ndim)).max())
