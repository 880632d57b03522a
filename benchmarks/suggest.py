"""Does `muvit suggest` find regions of the mouse-brain sections that are worth more than random ones?

Round 1 labels a tenth of the area of all training sections, drawn at random on tissue. Every further round adds a
tenth, proposed by `muvit suggest` from the model of the round before, or drawn at random again. After each round a
model is trained from random weights, with the same number of steps whatever is labelled, and scored on the held-out
sections; a model with all labels is the reference. Only regions are labelled, all else is ignored; sections without one
are left out.

    python benchmarks/suggest.py --data data/mouse_sections --output runs/suggest

The model is small, and sees levels 4 and 16 of the sections, so that all six trainings take minutes; both levels learn
from the labels. With ``--errors MODEL`` nothing is trained: how many pixels of a trained model's labels are wrong is
measured in the regions that are proposed on the held-out sections, and in random ones.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import shapely
from markdown_table import markdown_table

from muvit.data.folders import image_files
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.data.tables import SlideFiles, write_slides
from muvit.evaluation.studies.epochs import read_epochs
from muvit.inference.suggest import suggest_regions
from muvit.inference.tiling.suggestions import SuggestConfig
from muvit.inference.tiling.tissue import find_tissue
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.segmenter import SegmenterConfig
from muvit.models.trained import load_model
from muvit.settings import read_settings
from muvit.training.fit import train_segmenter
from muvit.training.recipes import Recipe

IGNORED = 14
Box = tuple[float, float, float, float]
Regions = dict[str, list[Box]]
"""Boxes y0, x0, y1, x1 by name of the section."""


def random_regions(slides: Sequence[Slide], count: int, side: int, taken: Regions, rng: np.random.Generator) -> Regions:
    """Regions at multiples of half their side that do not overlap each other or those taken, a tenth of them tissue."""
    places = []
    for slide in slides:
        tissue = find_tissue(slide)
        step = int(tissue.level) if not isinstance(tissue.level, tuple) else int(tissue.level[0])
        for y in range(0, slide.shape[0] - side + 1, side // 2):
            for x in range(0, slide.shape[1] - side + 1, side // 2):
                part = tissue.mask[y // step : (y + side) // step, x // step : (x + side) // step]
                if part.mean() >= 0.1:
                    places.append((slide.name, (float(y), float(x), float(y + side), float(x + side))))
    chosen: Regions = {}
    for index in rng.permutation(len(places)):
        name, box = places[index]
        if sum(map(len, chosen.values())) < count and not any(
            _overlap(box, other) for other in (*taken.get(name, ()), *chosen.get(name, ()))
        ):
            chosen.setdefault(name, []).append(box)
    return chosen


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def write_table(data: Path, folder: Path, regions: Regions) -> Path:
    """Labels that are ignored outside of the regions, and the table of the sections that have some."""
    rows = []
    for image in image_files([data / "train"]):
        truth = open_slide(data / "train" / "labels" / image.name)
        boxes = regions.get(truth.name, [])
        if not boxes:
            continue
        labels = np.full(truth.shape, IGNORED, truth.dtype)
        pixels = truth.read(1, (0, 0), truth.shape)[0]
        for box in boxes:
            part = np.s_[int(box[0]) : int(box[2]), int(box[1]) : int(box[3])]
            labels[part] = pixels[part]
        path = folder / "labels" / f"{truth.name}.ome.zarr"
        writer = PyramidWriter.create(
            path,
            overwrite=path.exists(),
            shape=truth.shape,
            num_channels=1,
            dtype=truth.dtype,
            kind="label",
            levels=(1, 4, 16),
            pixel_size_um=truth.pixel_size_um,
            label_names=dict(truth.label_names),
        )
        writer.write((0, 0), labels[None])
        writer.finish()
        rows.append(SlideFiles(image=image.resolve(), labels=path.resolve()))
    write_slides(folder / "slides.csv", rows)
    return folder / "slides.csv"


def train(recipe: Recipe, table: Path, output: Path) -> float:
    """mDSC on the held-out sections after the last epoch."""
    if not (output / "done").exists():
        train_segmenter(replace(recipe, data=replace(recipe.data, train=str(table))), output, overwrite=True)
        (output / "done").touch()
    return read_epochs(output)[recipe.run.epochs]


def propose(run: Path, slides: Sequence[Slide], count: int, side: int, taken: Regions) -> Regions:
    """Regions that `muvit suggest` proposes, close to each other if need be."""
    annotated = {
        name: shapely.union_all([shapely.box(b[1], b[0], b[3], b[2]) for b in boxes]) for name, boxes in taken.items()
    }
    found = suggest_regions(
        load_model(run / "last", kind=SegmentationModel),
        slides,
        run / "predictions",
        SuggestConfig(n=count, region_px=side, spacing=0),
        annotated=annotated,
    )
    chosen: Regions = {}
    for one in found:
        chosen.setdefault(one.slide, []).append(one.box)
    return chosen


def compare_errors(model: Path, data: Path, output: Path, side: int, share: float, seed: int) -> list[list[str]]:
    """Share of wrong pixels in proposed regions of labelled sections, by diversity, and in random regions."""
    trained = load_model(model, kind=SegmentationModel)
    slides = [open_slide(file) for file in image_files([data])]
    truth = {s.name: open_slide(data / "labels" / s.path.name).read(1, (0, 0), s.shape)[0] for s in slides}
    count = round(share * sum(slide.shape[0] * slide.shape[1] for slide in slides) / side**2)

    def wrong(regions: Regions) -> float:
        parts = [
            (predicted[name][cut] != truth[name][cut])[truth[name][cut] != IGNORED]
            for name, boxes in regions.items()
            for cut in (np.s_[int(b[0]) : int(b[2]), int(b[1]) : int(b[3])] for b in boxes)
        ]
        return float(np.concatenate(parts).mean())

    chosen: dict[str, Regions] = {}
    for diversity in (0.0, 1.0):
        config = SuggestConfig(n=count, region_px=side, spacing=0, diversity=diversity)
        regions: Regions = {}
        for one in suggest_regions(trained, slides, output, config):
            regions.setdefault(one.slide, []).append(one.box)
        chosen[f"proposed, diversity {diversity:g}"] = regions
    predicted = {s.name: open_slide(output / f"{s.name}.ome.zarr").read(1, (0, 0), s.shape)[0] for s in slides}
    rng = np.random.default_rng(seed)
    draws = [wrong(random_regions(slides, count, side, {}, rng)) for _ in range(20)]
    everywhere: Regions = {slide.name: [(0, 0, *map(float, slide.shape))] for slide in slides}
    rows = [[name, f"{wrong(regions):.3f}"] for name, regions in chosen.items()]
    rows.append(
        ["random on tissue, mean and range of 20 draws", f"{np.mean(draws):.3f} ({min(draws):.3f} to {max(draws):.3f})"]
    )
    return [*rows, ["everywhere", f"{wrong(everywhere):.3f}"]]


def main() -> None:
    """Train all rounds that are not done yet, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/mouse_sections"))
    parser.add_argument("--output", type=Path, default=Path("runs/suggest"))
    parser.add_argument("--recipe", type=Path, default=Path("recipes/mouse_sections.yaml"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--samples", type=int, default=1024, help="crops per epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.1, help="of the area of all sections, labelled in each round")
    parser.add_argument("--region_px", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--errors", type=Path, metavar="MODEL", help="measure the errors of this model instead")
    arguments = parser.parse_args()
    if arguments.errors is not None:
        chosen = (arguments.region_px, arguments.share, arguments.seed)
        rows = compare_errors(arguments.errors, arguments.data / "test", arguments.output / "errors", *chosen)
        print(markdown_table(["regions", "share of wrong pixels"], rows))
        return
    recipe = small_recipe(arguments)
    slides = [open_slide(file) for file in image_files([arguments.data / "train"])]
    side = arguments.region_px
    area = sum(slide.shape[0] * slide.shape[1] for slide in slides)
    count = round(arguments.share * area / side**2)
    rng = np.random.default_rng(arguments.seed)
    first = random_regions(slides, count, side, {}, rng)
    everything: Regions = {slide.name: [(0, 0, *map(float, slide.shape))] for slide in slides}
    full = train(
        recipe, write_table(arguments.data, arguments.output / "full", everything), arguments.output / "full" / "run"
    )
    print(f"all labels: mDSC {full:.4f}", flush=True)
    rows = []
    for strategy in ("suggest", "random"):
        taken: Regions = {}
        run = arguments.output / "first" / "run"
        for number in range(1, arguments.rounds + 1):
            if number == 1:
                new = first
            elif strategy == "random":
                new = random_regions(slides, count, side, taken, rng)
            else:
                new = propose(run, slides, count, side, taken)
            taken = {name: taken.get(name, []) + new.get(name, []) for name in sorted({*taken, *new})}
            labelled = sum((b[2] - b[0]) * (b[3] - b[1]) for boxes in taken.values() for b in boxes) / area
            folder = arguments.output / ("first" if number == 1 else f"{strategy}_{number}")
            run = folder / "run"
            score = train(recipe, write_table(arguments.data, folder, taken), run)
            rows.append([strategy, str(number), f"{labelled:.1%}", f"{score:.4f}", f"{score / full:.1%}"])
            print(*rows[-1], flush=True)
    print(f"\n{markdown_table(['regions', 'round', 'labelled area', 'mDSC', 'of that with all labels'], rows)}")


def small_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe of the sections, with a small model of levels 4 and 16."""
    recipe = read_settings(arguments.recipe, Recipe)
    assert isinstance(recipe.model, SegmenterConfig)
    encoder = replace(recipe.model.encoder, levels=(4, 16), num_layers=4)
    return replace(
        recipe,
        model=replace(recipe.model, encoder=encoder, decode="all", decoder_widths=(32, 16, 16, 8), stem_width=8),
        data=replace(
            recipe.data,
            val=str(arguments.data / "test"),
            samples_per_epoch=arguments.samples,
            label_levels="all",
            balance="foreground",
            foreground_fraction=0.9,
        ),
        run=replace(recipe.run, epochs=arguments.epochs, seed=arguments.seed, pictures=0, progress=False),
    )


if __name__ == "__main__":
    main()
