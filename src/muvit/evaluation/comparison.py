"""A model and its controls under one budget: train each, label the test slides, score them, write a report."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.folders import open_folder, open_labelled_folder
from muvit.data.slides.slide import Slide
from muvit.errors import ExistsError, InputError
from muvit.evaluation.report import Example, ModelResult, write_report
from muvit.evaluation.scores.segmentation import Evaluation, evaluate_slides
from muvit.evaluation.side_by_side import Progress, Trained, train_and_label
from muvit.evaluation.variants import Variant
from muvit.levels import level_name
from muvit.pictures import to_rgb
from muvit.training.recipes import Recipe

PICTURE_PX = 1024
"""Longest side of a slide as shown in the report."""


def compare(
    variants: Sequence[Variant],
    test: Path,
    output: Path,
    *,
    title: str,
    intro: str,
    settings: dict[str, object] | None = None,
    num_examples: int = 3,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[ModelResult]:
    """Train and score models side by side, as many at a time as there are CPU cores.

    Args:
        variants: the models, the one in question first.
        test: folder with ``images`` and ``labels`` that none of them was trained on.
        output: receives ``runs/<slug>``, ``predictions/<slug>/<slide>.ome.zarr``, ``metrics.json``, ``metrics.csv``
            and ``index.html``.
        title: headline of the report.
        intro: its first paragraph.
        settings: facts for the report, added to those that the recipe tells.
        num_examples: test slides to show.
        resume: go on with a comparison that was stopped: what is trained is not trained again.
        overwrite: replace an earlier comparison.
        progress: called while the models train.

    Returns:
        What each model reached, in the order of ``variants``.
    """
    output = Path(output)
    if (output / "metrics.json").exists() and not overwrite:
        raise ExistsError(output / "metrics.json")
    slugs = [variant.slug for variant in variants]
    if len(set(slugs)) != len(slugs):
        raise InputError("variants", expected="different names", got=[variant.name for variant in variants])
    pairs = open_labelled_folder(test)
    slides = [image.path for image, _ in pairs]
    trained = train_and_label(variants, slides, output, resume=resume, overwrite=overwrite, progress=progress)
    num_classes = variants[0].recipe.model.num_classes
    ignore = variants[0].recipe.data.ignore_labels
    legend = Preprocessing.load(trained[0].folder)
    results, labels = [], {}
    for variant, run in zip(variants, trained, strict=True):
        labels[variant.name] = open_folder(output / "predictions" / variant.slug)
        scored = evaluate_slides(
            [(labels[variant.name][truth.name], truth) for _, truth in pairs],
            num_classes,
            ignore=ignore,
            class_names=legend.class_names,
        )
        results.append((_result(variant, run, scored, legend), scored))
    _write_metrics(output / "metrics.json", results)
    _write_table(output / "metrics.csv", results)
    examples = [
        _example(image, truth, {name: slides[truth.name] for name, slides in labels.items()})
        for image, truth in _spread(pairs, num_examples)
    ]
    recipe, first = variants[0].recipe, pairs[0][0].name
    write_report(
        output,
        title=title,
        intro=intro,
        models=[result for result, _ in results],
        class_names=legend.class_names,
        class_colors=legend.class_colors,
        examples=examples,
        settings=_settings(recipe) | (settings or {}),
        outputs={"image": os.path.relpath(pairs[0][0].path, output)}
        | {f"labels by {v.name}": f"predictions/{v.slug}/{first}.ome.zarr" for v in variants},
        ignore=ignore,
        overwrite=overwrite,
    )
    return [result for result, _ in results]


def _result(variant: Variant, run: Trained, scored: Evaluation, legend: Preprocessing) -> ModelResult:
    return ModelResult(
        name=variant.name,
        description=variant.description,
        dice={name: float(d) for name, d in zip(legend.class_names[1:], scored.pooled.dice[1:], strict=True)},
        mean_dice=scored.pooled.mean_dice,
        curves=run.curves,
        seconds=run.seconds,
        parameters=run.parameters,
    )


def _write_table(path: Path, results: Sequence[tuple[ModelResult, Evaluation]]) -> None:
    classes = list(results[0][0].dice)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["model", "mDSC", *classes, "mean slide mDSC", "parameters", "training minutes"])
        for result, scored in results:
            numbers = [result.mean_dice, *result.dice.values(), scored.mean_slide_dice]
            row = [result.name, *(f"{x:.4f}" for x in numbers), result.parameters, f"{result.seconds / 60:.1f}"]
            table.writerow(row)


def _write_metrics(path: Path, results: Sequence[tuple[ModelResult, Evaluation]]) -> None:
    metrics = {
        result.name: {"parameters": result.parameters, "training_seconds": round(result.seconds, 1)} | scored.to_dict()
        for result, scored in results
    }
    path.write_text(json.dumps(metrics, indent=2) + "\n")


def _example(image: Slide, truth: Slide, predictions: dict[str, Slide]) -> Example:
    def whole(slide: Slide) -> np.ndarray:
        """All of a slide, or the middle slice of a volume, ``(C, H, W)``."""
        level = next((lv for lv in slide.levels if max(slide.level_shape(lv)) <= PICTURE_PX), slide.levels[-1])
        *slices, height, width = slide.level_shape(level)
        pixels = slide.read(level, (*(n // 2 for n in slices), 0, 0), (*(1 for _ in slices), height, width))
        return pixels.reshape(-1, height, width)

    return Example(
        title=image.name,
        image=to_rgb(whole(image)),
        truth=whole(truth)[0],
        predictions={name: whole(slide)[0] for name, slide in predictions.items()},
    )


def _spread(pairs: list[tuple[Slide, Slide]], count: int) -> list[tuple[Slide, Slide]]:
    chosen = (
        np.linspace(0, len(pairs) - 1, min(count, len(pairs)) + 2)[1:-1] if len(pairs) > count else range(len(pairs))
    )
    return [pairs[int(i)] for i in chosen]


def _settings(recipe: Recipe) -> dict[str, object]:
    data, encoder = recipe.data, recipe.model.encoder
    return {
        "levels": ", ".join(map(level_name, encoder.levels)),
        "crop": f"{data.crop_size} px per level",
        "patch": f"{encoder.patch_size} px",
        "encoder": f"{encoder.num_layers} layers, width {encoder.dim}, {encoder.heads} heads",
        "training": f"{recipe.run.epochs} epochs of {data.samples_per_epoch} crops, {data.batch_size} per step",
        "learning rate": f"{recipe.optim.lr:g}, encoder {recipe.optim.lr * recipe.optim.encoder_lr_factor:g}",
        "seed": recipe.run.seed,
    }
