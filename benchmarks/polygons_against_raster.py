"""Does training from polygons give the model that training from label images gives? On mouse-brain sections, same seed.

    python benchmarks/polygons_against_raster.py sections runs/polygons

``sections`` holds ``images`` and ``labels`` as PNG (35 sections, see ``recipes/mouse_sections.yaml``). Each fifth
section tests. The label images are exported to GeoJSON as ``muvit export`` does, by default and with outlines
simplified by one pixel, and a model is trained from a table for each. Writes the table to
``benchmarks/results/polygons_against_raster.md``, below what its head says of the run.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from markdown_table import markdown_table

from muvit.data.annotations.objects import AnnotationConfig
from muvit.data.folders import list_slides, open_pairs
from muvit.data.slides.open import open_slide
from muvit.data.tables import SlideFiles, write_slides
from muvit.evaluation.scores.segmentation import Evaluation, evaluate_slides
from muvit.inference.export.geojson import GeoJsonConfig, write_geojson
from muvit.inference.export.labelled import LabelledImage
from muvit.inference.predict import predict_slide
from muvit.inference.run.plan import AS_PUBLISHED
from muvit.models.trained import load_model
from muvit.settings import read_settings
from muvit.training.fit import train_segmenter
from muvit.training.recipes import Recipe

IGNORED, NUM_CLASSES = 14, 14
CONFIG = AnnotationConfig(
    classes={f"class {i}": i for i in range(1, NUM_CLASSES)} | {f"class {IGNORED}": "ignore"}, unannotated="background"
)
POLYGONS = {"polygons": GeoJsonConfig(), "polygons, simplified by 1 px": GeoJsonConfig(simplify_px=1.0)}
VARIANTS: dict[str, GeoJsonConfig | None] = {"label images": None, **POLYGONS}


def write_table(sections: Path, folder: Path, polygons: GeoJsonConfig | None) -> Path:
    """A table of the sections with their label images, or with polygons made from them."""
    slides = []
    for i, slide in enumerate(list_slides(sections)):
        assert slide.labels is not None
        labels = slide.labels
        if polygons is not None:
            labels = folder / f"{slide.name}.geojson"
            source = LabelledImage(labels=open_slide(slide.labels, palette="index"))
            write_geojson(source, labels, polygons, overwrite=True)
        split = "test" if i % 5 == 4 else "train"
        slides.append(SlideFiles(image=slide.image, labels=labels, split=split))  # type: ignore[arg-type]
    write_slides(folder / "slides.csv", slides)
    return folder / "slides.csv"


def score(model: Path, truth: Path, folder: Path) -> Evaluation:
    """Scores of a model on the test sections, against their label images."""
    pairs, trained = [], load_model(model)
    for image, label in open_pairs(list_slides(truth, "test")):
        target = folder / f"{image.name}.ome.zarr"
        predict_slide(trained, image, target, options=AS_PUBLISHED, overwrite=True)
        pairs.append((open_slide(target), label))
    return evaluate_slides(pairs, NUM_CLASSES, ignore=(IGNORED,))


def agreement(table: Path, truth: Path) -> float:
    """Share of the pixels of all sections that have the label of the label images."""
    found, stored = (open_pairs(list_slides(one), annotations=CONFIG) for one in (table, truth))
    same = total = 0
    for (_, one), (_, other) in zip(found, stored, strict=True):
        pixels, true = (label.read(1, (0, 0), label.shape) for label in (one, other))
        pixels = np.where(np.isin(pixels, one.ignored_labels), IGNORED, pixels)
        same, total = same + int((pixels == true).sum()), total + true.size
    return same / total


def main() -> None:
    """Train, score, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--samples", type=int, default=1024)
    arguments = parser.parse_args()
    recipe = read_settings(Path(__file__).parents[1] / "recipes" / "mouse_sections.yaml", Recipe)
    encoder = replace(recipe.model.encoder, dim=64, num_layers=4, heads=2)  # type: ignore[union-attr]
    recipe = replace(recipe, model=replace(recipe.model, encoder=encoder))  # type: ignore[call-arg]
    run = replace(recipe.run, epochs=arguments.epochs, accelerator="cpu", progress=False, pictures=0)
    rows, truth = [], Path()
    for name, polygons in VARIANTS.items():
        folder = arguments.output / name.replace(", ", "_").replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        table = write_table(arguments.sections, folder, polygons)
        truth = table if polygons is None else truth
        data = replace(
            recipe.data,
            train=str(table),
            samples_per_epoch=arguments.samples,
            batch_size=8,
            annotations=None if polygons is None else CONFIG,
        )
        model = folder / "run" / "last"
        if not model.exists():  # a repeated call trains what is missing
            model = train_segmenter(replace(recipe, data=data, run=run), folder / "run", overwrite=True)
        scored = score(model, truth, folder / "predictions")
        rows.append([name, f"{agreement(table, truth):.4f}", f"{scored.pooled.mean_dice:.4f}"])
        rows[-1].append(f"{scored.mean_slide_dice:.4f}")
        print(rows[-1], flush=True)
    text = markdown_table(["labels of training", "pixels as in the label images", "mDSC", "mean section mDSC"], rows)
    file = Path(__file__).parent / "results" / "polygons_against_raster.md"
    before = file.read_text().partition("| labels of training |")[0] if file.exists() else ""
    file.write_text(f"{before}{text}\n")
    print(text)


if __name__ == "__main__":
    main()
