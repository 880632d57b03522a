"""``muvit suggest``."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.slides import add_pixel_size, add_selection, file_or_folder_targets, selection
from muvit.cli.terminal import Progress
from muvit.errors import ExistsError, InputError
from muvit.inference.run.execution import Execution
from muvit.inference.tiling.suggestions import SuggestConfig, write_suggestions

if TYPE_CHECKING:
    import shapely

    from muvit.data.slides.slide import Slide

_SUFFIX = ".geojson"
_WITHOUT = ("backend", "scheduler", "dask_workers", "part")
"""Settings of an execution that is spread over machines; `muvit predict` makes predictions there."""


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", type=Path, help="folder of a trained model, or of its run")
    parser.add_argument("slide", nargs="+", type=Path, help="images to choose from, or folders of them")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help=f"folder that receives <slide>{_SUFFIX} of each image with a region; for one image also a file that ends "
        f"in {_SUFFIX}",
    )
    parser.add_argument(
        "--predictions",
        type=Path | None,
        default=None,
        help="folder of predictions with entropy, as of muvit predict --entropy true: what is there is used, the rest "
        "is computed and kept there (default: the folder predictions beside the regions)",
    )
    parser.add_argument(
        "--annotated",
        type=Path | None,
        default=None,
        help=f"GeoJSON of what is annotated already, of one image, or a folder with <slide>{_SUFFIX}",
    )
    parser.add_class_arguments(SuggestConfig, as_group=False)
    parser.add_argument("--overwrite", action="store_true", help="replace earlier suggestions")
    add_pixel_size(parser)
    add_selection(parser)
    parser.add_class_arguments(Execution, as_group=False, skip=set(_WITHOUT))


def run(arguments: Namespace) -> None:
    """Propose regions, write a file for each slide that has some, and print them by rank."""
    targets = file_or_folder_targets(arguments.slide, arguments.output, _SUFFIX)
    for target in targets:
        if target.exists() and not arguments.overwrite:
            raise ExistsError(target)
    annotated_files = _annotated_files(arguments, targets)

    from muvit.data.slides.open import open_slide
    from muvit.inference.suggest import suggest_regions
    from muvit.models.segmentation_model import SegmentationModel
    from muvit.models.trained import load_model

    trained = load_model(arguments.model, kind=SegmentationModel)
    opened = {
        target: open_slide(path, pixel_size_um=arguments.pixel_size_um, **selection(arguments))
        for target, path in targets.items()
    }
    folder = next(iter(targets)).parent
    with Progress("Predicting", "tile") as progress:
        found = suggest_regions(
            trained,
            list(opened.values()),
            arguments.predictions or folder / "predictions",
            SuggestConfig(**{field.name: arguments[field.name] for field in fields(SuggestConfig)}),
            annotated={
                slide.name: _area(annotated_files[target], slide)
                for target, slide in opened.items()
                if target in annotated_files
            },
            execution=Execution(**{f.name: arguments[f.name] for f in fields(Execution) if f.name not in _WITHOUT}),
            progress=progress,
        )
    chosen = {one.slide for one in found}
    for target, slide in opened.items():
        if slide.name in chosen or target.exists():
            write_suggestions(found, slide, target, overwrite=arguments.overwrite)
    for one in found:
        y0, x0, y1, x1 = one.box
        print(f"{one.rank:>4}  {one.slide}  y {y0:.0f} to {y1:.0f}, x {x0:.0f} to {x1:.0f}  {one.uncertainty:.3f}")
    for target, slide in opened.items():
        if slide.name in chosen:
            print(target)


def _annotated_files(arguments: Namespace, targets: dict[Path, Path]) -> dict[Path, Path]:
    """Annotations that exist, by output."""
    from muvit.data.slides.formats import slide_name

    given: Path | None = arguments.annotated
    if given is None:
        return {}
    if not given.is_dir():
        if len(targets) > 1:
            raise InputError("--annotated", expected="a folder, for several images", got=given)
        return dict.fromkeys(targets, given)
    files = {target: given / f"{slide_name(path)}{_SUFFIX}" for target, path in targets.items()}
    return {target: file for target, file in files.items() if file.exists()}


def _area(file: Path, slide: "Slide") -> "shapely.Geometry":
    import shapely

    from muvit.inference.tiling.region import read_region

    return shapely.from_wkt(read_region(str(file), slide))
